"""Held-out perplexity, dense and at every share of the experts.

Shapes: B sequences, L length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.config import QualityPoint
from engine.model.decoder import Decoder
from engine.model.trace import Trace
from engine.policy import ExpertPolicy
from training.data.batches import Batches, consecutive_batches
from training.data.corpus import Document, load_corpus, read_paths
from training.data.text import path_sha256
from training.data.vocabulary import encode_documents
from training.errors import DataError
from training.experts.shares import SHARES, top_k_of
from training.quality.expert_use import ExpertUse

_EVAL_BATCH: Final = 4


@dataclass(frozen=True)
class Evaluation:
    """One policy's result on a set of batches.

    Attributes:
        policy: the expert policy, as text.
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
    loss_sum, tokens, use = 0.0, 0, ExpertUse()
    for inputs_BL, targets_BL in batches:
        trace = Trace(keep_inputs=policy.kind != "dense")
        logits_BLV = model.logits(inputs_BL, policy, trace)
        loss_sum += float(
            F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten(), reduction="sum")
        )
        tokens += targets_BL.numel()
        use.add(model, trace)
    return Evaluation(
        str(policy), math.exp(min(loss_sum / tokens, 700.0)), use.activated_ratio, use.coverage
    )


@dataclass(frozen=True)
class QualityCurve:
    """Perplexity against the share of the experts, beside the dense mode.

    Attributes:
        dense: the result with all experts.
        routed: the results with the k experts that the router chooses, by k.
        oracle: the results with the k experts of the most true mass, by k; no router covers more.
        random: the results with k experts drawn by chance, by k: the floor; empty if not measured.
    """

    dense: Evaluation
    routed: dict[int, Evaluation]
    oracle: dict[int, Evaluation]
    random: dict[int, Evaluation] = field(default_factory=dict)

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
        kinds = {"routed": self.routed, "oracle": self.oracle, "random": self.random}
        return {
            "dense": vars(self.dense),
            **{
                kind: {str(k): vars(result) for k, result in results.items()}
                for kind, results in kinds.items()
                if results
            },
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


@dataclass(frozen=True)
class TextSet:
    """Text cut into sequences, ready to be evaluated.

    Attributes:
        batches: inputs and targets, each int64 [B, L].
        length: tokens predicted in each sequence.
        sequences: how many of those.
        available: tokens that the whole text has.
        sources: where it came from: {"path" or "description", "sha256"}.
    """

    batches: Batches
    length: int
    sequences: int
    available: int
    sources: tuple[dict[str, str], ...]

    @property
    def tokens(self) -> int:
        """Tokens predicted, never more than asked for."""
        return self.sequences * self.length


def read_text(checkpoint: Checkpoint, paths: Sequence[Path], max_tokens: int) -> TextSet:
    """The first whole sequences of some text that have `max_tokens` tokens together at most.

    A sequence is as long as the model's context, or `max_tokens` if that is less. No paths mean
    what the checkpoint's own training held out.

    Raises:
        DataError: if the text cannot be read or does not fill one sequence.
    """
    documents = read_paths(paths) if paths else _held_out(checkpoint.report)
    tokens = encode_documents(checkpoint.tokenizer, documents)
    length = min(checkpoint.config.max_position_embeddings, max_tokens)
    sequences = min((tokens.size - 1) // length, max_tokens // length)
    if not sequences:
        raise DataError(
            f"the text has {tokens.size} tokens, fewer than one sequence of {length + 1}; give "
            f"more text or a smaller --max-tokens"
        )
    kept = tokens[: sequences * length + 1]
    batches = list(consecutive_batches(kept, _EVAL_BATCH, length, sequences))
    if paths:
        sources = [{"path": str(path), "sha256": path_sha256(path)} for path in paths]
    else:
        corpus = checkpoint.report["corpus"]
        description = f"held out of the {corpus['description']}"
        sources = [{"description": description, "sha256": corpus["fingerprint"]}]
    return TextSet(batches, length, sequences, tokens.size, tuple(sources))


def _held_out(report: Mapping[str, Any]) -> list[Document]:
    """The documents of the standard library that this checkpoint's training held out."""
    try:
        share, seed = float(report["config"]["valid_share"]), int(report["config"]["seed"])
        fingerprint = report["corpus"]["fingerprint"]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError("training_report.json names no corpus; give --data") from error
    corpus = load_corpus([], share, seed)
    if corpus.fingerprint != fingerprint:
        raise DataError(
            f"this checkpoint was trained on other text than the {corpus.description}, so what was "
            f"held out is not known here; give --data"
        )
    return corpus.valid
