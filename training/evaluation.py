"""Held-out perplexity, dense and at every share of the experts.

Shapes: B sequences, L length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import QualityPoint
from engine.experts import Trace, true_mass
from engine.model import Decoder
from engine.request import ExpertPolicy

SHARES: Final = (Fraction(1, 16), Fraction(1, 8), Fraction(1, 4), Fraction(1, 2))

Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Evaluation:
    """One policy's result on a set of batches.

    Attributes:
        policy: as text.
        perplexity: exp of the mean loss per token.
        activated_ratio: share of the experts that tokens used, over all layers.
        coverage: share of the true activation mass inside the chosen experts; 1 if dense.
    """

    policy: str
    perplexity: float
    activated_ratio: float
    coverage: float


@torch.no_grad()
def evaluate(model: Decoder, batches: Iterable[tuple[Tensor, Tensor]], policy: ExpertPolicy) -> Evaluation:
    """Perplexity of `model` under `policy`."""
    loss_sum, tokens, activated, available = 0.0, 0, 0, 0
    inside, total = 0.0, 0.0
    for inputs_BL, targets_BL in batches:
        trace = Trace(keep_inputs=policy.kind != "dense")
        logits_BLV = model.logits(inputs_BL, policy, trace)
        loss_sum += float(
            F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten(), reduction="sum")
        )
        tokens += targets_BL.numel()
        activated += sum(int(count.sum()) for count in trace.counts)
        available += targets_BL.numel() * len(trace.counts) * model.config.experts.num_experts
        chosen_mass, all_mass = _masses(model, trace)
        inside, total = inside + chosen_mass, total + all_mass
    return Evaluation(
        str(policy),
        math.exp(min(loss_sum / tokens, 700.0)),
        activated / available,
        inside / total if total else 1.0,
    )


def _masses(model: Decoder, trace: Trace) -> tuple[float, float]:
    """(activation mass inside the chosen experts, all of it), summed over layers and tokens."""
    inside = total = 0.0
    for ffn, x_TD, chosen_TE in zip(model.ffns(), trace.inputs, trace.chosen, strict=False):
        if chosen_TE is not None:
            mass_TE = true_mass(x_TD, ffn.up, ffn.num_experts, ffn.activation)
            inside += float((mass_TE * chosen_TE).sum())
            total += float(mass_TE.sum())
    return inside, total


def top_k_of(share: Fraction, num_experts: int) -> int:
    """The number of experts that a share stands for, at least one."""
    return max(1, round(share * num_experts))


@dataclass(frozen=True)
class QualityCurve:
    """Perplexity against the share of the experts, routed and by oracle, beside the dense mode."""

    dense: Evaluation
    routed: dict[int, Evaluation]
    oracle: dict[int, Evaluation]

    def points(self, num_experts: int) -> tuple[QualityPoint, ...]:
        """The routed part as a checkpoint's config keeps it."""
        return tuple(
            QualityPoint(
                k,
                k / num_experts,
                round(result.perplexity, 4),
                round(result.perplexity / self.dense.perplexity - 1, 6),
            )
            for k, result in sorted(self.routed.items())
        )

    def recommended(self, num_experts: int, tolerance: float = 0.01) -> str:
        """The sparsest measured policy whose perplexity is within `tolerance` of dense."""
        for point in self.points(num_experts):
            if point.relative <= tolerance:
                return f"top_k:{point.top_k}"
        return "dense"

    def to_dict(self) -> dict[str, Any]:
        return {
            "dense": vars(self.dense),
            "routed": {str(k): vars(result) for k, result in self.routed.items()},
            "oracle": {str(k): vars(result) for k, result in self.oracle.items()},
        }


def quality_curve(
    model: Decoder, batches: Batches, report: Callable[[str], None] = lambda _policy: None
) -> QualityCurve:
    """Evaluate dense and, routed and by oracle, at each of SHARES; `report` hears each policy."""
    num_experts = model.config.experts.num_experts
    ks = sorted({top_k_of(share, num_experts) for share in SHARES})

    def run(policy: ExpertPolicy) -> Evaluation:
        report(str(policy))
        return evaluate(model, batches, policy)

    return QualityCurve(
        run(ExpertPolicy.dense()),
        {k: run(ExpertPolicy.top_k(k)) for k in ks},
        {k: run(ExpertPolicy.oracle(k)) for k in ks},
    )
