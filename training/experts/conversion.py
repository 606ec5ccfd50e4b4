"""Dense to experts: cluster the neurons, move them, fit the router.

Moving neurons permutes all that is stored neuron by neuron, and the optimiser's moments of it, so
the dense function and the next optimiser step stay what they were.

Shapes: T tokens, D model, F neurons, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from engine.model.decoder import Decoder
from engine.model.experts import ExpertLayout, centroid_router
from engine.model.ffn import ExpertFFN
from training.experts.activation import deciding_rows, ffn_inputs, hidden
from training.experts.clustering import Clustering, balanced_kmeans
from training.experts.router_fit import fit_router, share_loss, true_shares
from training.parallel.sharding import whole, write_whole

# Candidate router norms: the calibration picks among them, layer by layer.
_NORMS: Final = torch.logspace(-1.0, 2.0, 61)
_CHUNK: Final = 4096  # tokens whose activations are in memory at once


def permute_neurons(
    ffn: ExpertFFN, layout: ExpertLayout, optimizer: torch.optim.Optimizer | None
) -> None:
    """Move the neurons of one FFN, and everything the optimiser remembers about them."""
    for parameter in ffn.per_neuron():
        write_whole(parameter, layout.apply(whole(parameter.detach())))
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                write_whole(value, layout.apply(whole(value)))


@torch.no_grad()
def refresh_router(ffn: ExpertFFN) -> None:
    """Recompute the centroids from the current rows of `up`, keeping the common norm."""
    norm = float(ffn.router.norm(dim=1).mean()) or 1.0
    ffn.router.copy_(centroid_router(deciding_rows(ffn), ffn.num_experts, norm))


def refresh_routers(model: Decoder) -> None:
    """Let the router of every layer follow the weights, as before every training step."""
    for ffn in model.ffns():
        refresh_router(ffn)


def token_mass(ffn: ExpertFFN, x_TD: Tensor) -> Tensor:
    """True activation mass [T, E], float32, of many tokens; a chunk at a time."""
    chunks = torch.split(x_TD, _CHUNK)
    return torch.cat([ffn.mass_of(hidden(ffn, x_CD)).float() for x_CD in chunks])


@torch.no_grad()
def calibrate_router(ffn: ExpertFFN, x_TD: Tensor, mass_TE: Tensor | None = None) -> float:
    """Set the router's common norm so that softmax(scores) predicts the shares of true mass.

    The norm leaves every ranking as it is; the one with the least cross-entropy to the true shares
    on `x_TD` is chosen. `mass_TE` is their true mass, if known. Returns that cross-entropy in nats.
    """
    share_TE = true_shares(token_mass(ffn, x_TD) if mass_TE is None else mass_TE)
    unit_ED = centroid_router(deciding_rows(ffn), ffn.num_experts)
    scores_TE = x_TD.float() @ unit_ED.T
    losses = torch.stack([share_loss(scores_TE * norm, share_TE) for norm in _NORMS.tolist()])
    best = int(losses.argmin())
    ffn.router.copy_(unit_ED * _NORMS[best])
    return float(losses[best])


@torch.no_grad()
def learn_router(ffn: ExpertFFN, x_TD: Tensor, mass_TE: Tensor | None = None) -> None:
    """Calibrate the centroids on these FFN inputs, then fit the router's rows to the true mass.

    `mass_TE` is the true mass of these tokens, if known.
    """
    mass_TE = token_mass(ffn, x_TD) if mass_TE is None else mass_TE
    calibrate_router(ffn, x_TD, mass_TE)
    ffn.router.copy_(fit_router(x_TD, mass_TE, ffn.router))


@torch.no_grad()
def cluster_neurons(
    ffn: ExpertFFN,
    generator: torch.Generator,
    *,
    warm_start: bool = False,
) -> Clustering:
    """Group the neurons of one FFN into equal experts by the rows that decide what fires.

    Nothing is moved yet.

    Args:
        ffn: the layer whose neurons are grouped.
        generator: draws the clustering's seeds; on the CPU.
        warm_start: start from the present experts as well; the better of both results is kept.
    """
    rows = deciding_rows(ffn).detach()
    present = centroid_router(rows, ffn.num_experts) if warm_start else None
    return balanced_kmeans(rows, ffn.num_experts, generator, present)


@torch.no_grad()
def build_experts(
    model: Decoder,
    optimizer: torch.optim.Optimizer | None,
    probe_BL: Tensor,
    generator: torch.Generator,
    *,
    warm_start: bool,
    agree: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> list[ExpertLayout]:
    """Cluster, permute and route every layer; returns the layouts that were applied.

    Args:
        model: its dense function stays the same.
        optimizer: its moments move along; None if there is none.
        probe_BL: token ids [B, L] on which the routers are calibrated.
        generator: draws the clustering's seeds.
        warm_start: start from the present experts as well.
        agree: gives every process the first one's values of a tensor (`Team.agree`).
    """
    layouts = []
    for ffn, x_TD in zip(model.ffns(), ffn_inputs(model, probe_BL), strict=True):
        clusters = cluster_neurons(ffn, generator, warm_start=warm_start)
        layout = ExpertLayout.from_labels(agree(clusters.labels_F), ffn.num_experts)
        permute_neurons(ffn, layout, optimizer)
        calibrate_router(ffn, x_TD)
        agree(ffn.router)
        layouts.append(layout)
    return layouts


@torch.no_grad()
def calibrate_routers(model: Decoder, probe_BL: Tensor) -> None:
    """Calibrate every layer's router on the model's own activations of the probe batch."""
    for ffn, x_TD in zip(model.ffns(), ffn_inputs(model, probe_BL), strict=True):
        calibrate_router(ffn, x_TD)
