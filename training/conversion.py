"""Dense to experts: cluster the neurons, move them, fit the router.

Moving neurons permutes the rows of `up` and `down` and of the optimiser's moments of both, so the
dense function and the next optimiser step stay what they were.

Shapes: T tokens, D model, F neurons, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.experts import ExpertFFN, ExpertLayout, centroid_router, true_mass
from engine.model import Decoder
from training.activation import ffn_inputs
from training.clustering import balanced_kmeans

# Candidate router norms: the calibration picks among them, layer by layer.
_NORMS = torch.logspace(-1.0, 2.0, 61)


def permute_neurons(
    ffn: ExpertFFN, layout: ExpertLayout, optimizer: torch.optim.Optimizer | None
) -> None:
    """Move the neurons of one FFN, and everything the optimiser remembers about them."""
    for parameter in (ffn.up, ffn.down):
        parameter.data.copy_(layout.apply(parameter.data))
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.copy_(layout.apply(value))


@torch.no_grad()
def refresh_router(ffn: ExpertFFN) -> None:
    """Recompute the centroids from the current rows of `up`, keeping the common norm."""
    norm = float(ffn.router.norm(dim=1).mean()) or 1.0
    ffn.router.copy_(centroid_router(ffn.up, ffn.num_experts, norm))


@torch.no_grad()
def calibrate_router(ffn: ExpertFFN, x_TD: Tensor) -> float:
    """Set the router's common norm so that softmax(scores) predicts the shares of true mass.

    The norm leaves every ranking as it is; the one with the least cross-entropy to the true shares
    on `x_TD` is chosen. Returns that cross-entropy in nats.
    """
    mass_TE = true_mass(x_TD, ffn.up, ffn.num_experts, ffn.activation).float()
    share_TE = mass_TE / mass_TE.sum(1, keepdim=True).clamp_min(1e-20)
    unit_ED = centroid_router(ffn.up, ffn.num_experts)
    scores_TE = x_TD.float() @ unit_ED.T
    losses = torch.stack(
        [-(share_TE * (scores_TE * norm).log_softmax(1)).sum(1).mean() for norm in _NORMS]
    )
    best = int(losses.argmin())
    ffn.router.copy_(unit_ED * _NORMS[best])
    return float(losses[best])


@torch.no_grad()
def build_experts(
    model: Decoder,
    optimizer: torch.optim.Optimizer | None,
    probe_BL: Tensor,
    generator: torch.Generator,
    *,
    warm_start: bool,
) -> list[ExpertLayout]:
    """Cluster, permute and route every layer; returns the layouts that were applied.

    Args:
        model: its dense function stays the same.
        optimizer: its moments move along; None if there is none.
        probe_BL: token ids on which the routers are calibrated.
        generator: for the clustering's seeds.
        warm_start: start from the present experts' centroids as well.
    """
    layouts = []
    for ffn in model.ffns():
        previous_ED = centroid_router(ffn.up, ffn.num_experts) if warm_start else None
        clusters = balanced_kmeans(ffn.up, ffn.num_experts, generator, previous_ED)
        layout = ExpertLayout.from_labels(clusters.labels_F, ffn.num_experts)
        permute_neurons(ffn, layout, optimizer)
        layouts.append(layout)
    calibrate_routers(model, probe_BL)
    return layouts


@torch.no_grad()
def calibrate_routers(model: Decoder, probe_BL: Tensor) -> None:
    """Calibrate every layer's router on the model's own activations of the probe batch."""
    for ffn, x_TD in zip(model.ffns(), ffn_inputs(model, probe_BL), strict=True):
        calibrate_router(ffn, x_TD)
