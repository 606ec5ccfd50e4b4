"""Held-out perplexity, dense and at every share of the experts.

Shapes: B sequences, L length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.config import QualityPoint
from engine.experts import Trace, true_mass
from engine.model import Decoder
from engine.request import ExpertPolicy
from training import data
from training.errors import DataError

_EVAL_BATCH: Final = 4
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
def evaluate(
    model: Decoder, batches: Iterable[tuple[Tensor, Tensor]], policy: ExpertPolicy
) -> Evaluation:
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


def evaluate_paths(
    checkpoint: Checkpoint,
    paths: Sequence[Path],
    max_tokens: int,
    report: Callable[[str], None] = lambda _policy: None,
) -> QualityCurve:
    """Evaluate a checkpoint on text files; no paths mean what its own training held out.

    Raises:
        DataError: if the text cannot be read or does not fill one sequence.
    """
    documents = data.read_paths(paths) if paths else _held_out(checkpoint.report)
    tokens = data.encode_documents(checkpoint.tokenizer, documents)
    length = min(checkpoint.config.max_position_embeddings, max_tokens)
    count = max(1, max_tokens // (_EVAL_BATCH * length))
    batches = list(data.consecutive_batches(tokens, _EVAL_BATCH, length, count))
    if not batches:
        raise DataError(
            f"the text has {tokens.size} tokens, fewer than one sequence of {length + 1}"
        )
    return quality_curve(checkpoint.model, batches, report)


def _held_out(report: Mapping[str, Any]) -> list[data.Document]:
    """The documents of the standard library that this checkpoint's training held out."""
    try:
        share, seed = float(report["config"]["valid_share"]), int(report["config"]["seed"])
        fingerprint = report["corpus"]["fingerprint"]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError("training_report.json names no corpus; give --data") from error
    corpus = data.load_corpus([], share, seed)
    if corpus.fingerprint != fingerprint:
        raise DataError(
            f"this checkpoint was trained on other text than the {corpus.description}, so what was "
            f"held out is not known here; give --data"
        )
    return corpus.valid
