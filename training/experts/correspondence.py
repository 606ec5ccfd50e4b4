"""Two models side by side on the same tokens: which neuron is which, and do they fire alike?

Every clustering permutes neurons, so place in the matrix says nothing. Models of one lineage (the
same run at two times, a model and its continuation) still share their neurons: a neuron's weights
move slowly, and its partner is the one whose weights point the same way, if both find each other.
Models that were started apart have no such partners; then all that can be compared is how many
neurons a token activates, and no similarity is reported.

Shapes: B sequences, L length, T tokens, D model, F neurons.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import require
from engine.model.decoder import Decoder
from engine.model.ffn import ExpertFFN
from training.experts.activation import ActivationPattern, observe, similarity
from training.experts.study import adjusted_rand_index

# Unrelated neurons stay far below this: with hundreds of dimensions, chance gives less than 0.2.
_LEAST_COSINE: Final = 0.5
_LEAST_MATCHED: Final = 0.5  # share of a layer's neurons
_CHUNK: Final = 2048


@dataclass(frozen=True)
class LayerComparison:
    """One layer of two models on the same tokens.

    Attributes:
        matched: share of the first model's neurons that have a partner in the second.
        similarity: overlap of the active sets of the partners (`activation.similarity`); None where
            fewer than half of the neurons have one.
        adjusted_rand: agreement of the two clusterings of the partners; None likewise.
        active: share of active neurons, of the first and of the second model.
        correlation: Pearson's, over tokens, of the shares of active neurons; None if one of them
            is the same for every token.
    """

    matched: float
    similarity: float | None
    adjusted_rand: float | None
    active: tuple[float, float]
    correlation: float | None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON."""
        return {**dataclasses.asdict(self), "active": list(self.active)}


@torch.no_grad()
def partners(first: ExpertFFN, second: ExpertFFN) -> Tensor:
    """For each neuron of `first`, its partner's number in `second`, or -1; int64 [F].

    Partners are each other's best by the mean cosine of their `up` and `down` rows, which must be
    at least 0.5. FFNs of different widths D have none.
    """
    if first.up.shape[1] != second.up.shape[1]:
        return torch.full((first.up.shape[0],), -1, device=first.up.device)
    a_FD, b_FD = (
        torch.cat([F.normalize(m.float(), dim=1) for m in (ffn.up, ffn.down)], dim=1)
        for ffn in (first, second)
    )
    best_F = torch.empty(a_FD.shape[0], dtype=torch.long, device=a_FD.device)
    cosine_F = torch.empty_like(a_FD[:, 0])
    back = torch.full_like(b_FD[:, 0], -torch.inf)
    back_index = torch.zeros(b_FD.shape[0], dtype=torch.long, device=a_FD.device)
    for start in range(0, a_FD.shape[0], _CHUNK):
        cosines = a_FD[start : start + _CHUNK] @ b_FD.T / 2
        cosine_F[start : start + _CHUNK], best_F[start : start + _CHUNK] = cosines.max(1)
        values, index = cosines.max(0)
        better = values > back
        back[better], back_index[better] = values[better], index[better] + start
    mutual = back_index[best_F] == torch.arange(a_FD.shape[0], device=a_FD.device)
    return torch.where(mutual & (cosine_F >= _LEAST_COSINE), best_F, -1)


def compare(first: Decoder, second: Decoder, probe_BL: Tensor) -> tuple[LayerComparison, ...]:
    """Compare two models, which must read the same token ids, layer by layer on `probe_BL`.

    Raises:
        ConfigError: unless they have the same number of layers and of tokens in their vocabulary.
    """
    for name in ("num_hidden_layers", "vocab_size"):
        a, b = getattr(first.config, name), getattr(second.config, name)
        require(a == b, f"--against: {name} must be the same, got {a} and {b}")
    patterns = zip(observe(first, probe_BL).layers, observe(second, probe_BL).layers, strict=True)
    ffns = zip(first.ffns(), second.ffns(), strict=True)
    return tuple(_compare(*pair, *active) for pair, active in zip(ffns, patterns, strict=True))


def _compare(first: ExpertFFN, second: ExpertFFN, a_TF: Tensor, b_TF: Tensor) -> LayerComparison:
    partner_F = partners(first, second)
    mine = (partner_F >= 0).nonzero().flatten()
    theirs = partner_F[mine]
    matched = mine.numel() / partner_F.numel()
    alike = rand = None
    if matched >= _LEAST_MATCHED:
        pair = (ActivationPattern((active,)) for active in (a_TF[:, mine], b_TF[:, theirs]))
        alike = similarity(*pair)
        rand = adjusted_rand_index(_experts(first, mine), _experts(second, theirs))
    shares = [active_TF.float().mean(1) for active_TF in (a_TF, b_TF)]
    means = (float(shares[0].mean()), float(shares[1].mean()))
    return LayerComparison(matched, alike, rand, means, _correlation(*shares))


def _experts(ffn: ExpertFFN, neurons: Tensor) -> Tensor:
    return neurons // (ffn.up.shape[0] // ffn.num_experts)


def _correlation(a_T: Tensor, b_T: Tensor) -> float | None:
    a_T, b_T = a_T.double() - a_T.double().mean(), b_T.double() - b_T.double().mean()
    scale = float(a_T.norm() * b_T.norm())
    return float(a_T @ b_T) / scale if scale > 1e-12 else None
