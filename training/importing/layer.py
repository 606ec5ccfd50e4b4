"""One layer's neurons become experts, and its router is fitted.

Shapes: T tokens, D model, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.model.experts import ExpertLayout
from engine.model.ffn import ExpertFFN
from training.experts.conversion import (
    calibrate_router,
    cluster_neurons,
    learn_router,
    permute_neurons,
    token_mass,
)
from training.experts.study import LayerStudy, study_layer
from training.quality.expert_use import ExpertUse

_JUDGED_SHARE: Final = 8  # routers are compared, and layers studied, at an eighth of the experts


@dataclass(frozen=True)
class LayerResult:
    """The measurements of a converted layer.

    Attributes:
        study: its activations and its router, measured on calibration tokens that fitted nothing.
        router: the one that was kept: `fitted` or `centroid`.
        uses: how each stream used the experts, on held-out tokens.
    """

    study: LayerStudy
    router: str
    uses: dict[str, ExpertUse]

    def to_dict(self) -> dict[str, Any]:
        uses = {name: dataclasses.asdict(use) for name, use in self.uses.items()}
        return {"study": self.study.to_dict(), "router": self.router, "uses": uses}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; raises CheckpointError for anything else."""
        try:
            uses = {name: ExpertUse(**use) for name, use in values["uses"].items()}
            return cls(LayerStudy.from_dict(values["study"]), str(values["router"]), uses)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"result of a layer: {error!r}") from error


def judged_k(num_experts: int) -> int:
    """The number of experts at which routers are compared."""
    return max(1, num_experts // _JUDGED_SHARE)


@torch.no_grad()
def build_layer_experts(ffn: ExpertFFN, generator: torch.Generator) -> None:
    """Cluster the neurons and move them; the FFN's function stays what it was."""
    clusters = cluster_neurons(ffn, generator)
    permute_neurons(ffn, ExpertLayout.from_labels(clusters.labels_F, ffn.num_experts), None)


@torch.no_grad()
def fit_layer_router(ffn: ExpertFFN, fit_TD: Tensor, check_TD: Tensor, kind: str) -> str:
    """Give the FFN its router; returns the kind that was kept.

    A fit on few tokens may do worse on others than the centroids that it began from: of the two,
    the one that covers more of the true mass on `check_TD` is kept.
    """
    mass_TE = token_mass(ffn, fit_TD)
    calibrate_router(ffn, fit_TD, mass_TE)
    if kind == "centroid":
        return kind
    centroids_ED, check_TE = ffn.router.clone(), token_mass(ffn, check_TD)
    before = _inside(ffn, check_TD, check_TE)
    learn_router(ffn, fit_TD, mass_TE)
    if _inside(ffn, check_TD, check_TE) > before:
        return kind
    ffn.router.copy_(centroids_ED)
    return "centroid"


def _inside(ffn: ExpertFFN, x_TD: Tensor, mass_TE: Tensor) -> float:
    best_TK = ffn.scores(x_TD).topk(judged_k(ffn.num_experts), dim=1).indices
    return float(mass_TE.gather(1, best_TK).sum())


def studied(ffn: ExpertFFN, check_TD: Tensor) -> LayerStudy:
    """The layer's activations and router on tokens that fitted nothing."""
    return study_layer(ffn, check_TD, judged_k(ffn.num_experts))
