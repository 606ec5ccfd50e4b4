"""How neurons are grouped and how experts are chosen, compared on one model.

Coverage is the share of the true activation mass inside the chosen experts. It is measured on the
inputs of the dense model, so that every grouping and router sees the same tokens; perplexity is
that of the model run with the choice in every layer.

Shapes: B sequences, L length, T tokens, D model, F neurons, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from engine.config import check_choice
from engine.errors import require
from engine.model.decoder import Decoder
from engine.model.experts import ExpertLayout
from engine.model.ffn import ExpertFFN
from engine.policy import ExpertPolicy
from training.data.batches import Batches
from training.experts.activation import ffn_inputs
from training.experts.conversion import (
    calibrate_router,
    cluster_neurons,
    learn_router,
    permute_neurons,
    token_mass,
)
from training.quality.evaluation import evaluate

# "present" leaves the experts as the model has them; "random" draws equal groups: the floor.
GROUPINGS: Final = ("present", "weights", "random")
# "stored" takes the checkpoint's own routers, which fit its present experts alone.
ROUTERS: Final = ("stored", "centroid", "fitted", "oracle")


@dataclass(frozen=True)
class Choice:
    """One grouping, router and k: what its choice of experts keeps.

    Attributes:
        grouping: one of GROUPINGS.
        router: one of ROUTERS.
        k: experts per token.
        coverage: share of the true activation mass inside the chosen experts, mean over layers.
        perplexity: what the model scores with that choice.
    """

    grouping: str
    router: str
    k: int
    coverage: float
    perplexity: float


@torch.no_grad()
def compare(
    model: Decoder,
    fit_BL: Sequence[Tensor],
    held_out: Batches,
    ks: Sequence[int],
    seed: int,
    groupings: Sequence[str] = GROUPINGS,
    report: Callable[[str], None] = lambda _line: None,
) -> list[Choice]:
    """Every grouping with every router at every k; `model` stays as it is.

    Args:
        model: dense or sparse trained; parameters on any device.
        fit_BL: batches of token ids that calibration and fit may see.
        held_out: other batches, on which coverage and perplexity are measured.
        ks: experts per token, each between 1 and E.
        seed: decides the clusterings.
        groupings: some of GROUPINGS.
        report: hears what is at work.

    Raises:
        ConfigError: if a grouping or k is not one of those.
    """
    experts = model.config.experts.num_experts
    for grouping in groupings:
        check_choice("grouping", grouping, GROUPINGS)
    for k in ks:
        require(1 <= k <= experts, f"k must be between 1 and {experts}; got {k}")
    fit = _layer_inputs(model, fit_BL)
    test = _layer_inputs(model, [inputs_BL for inputs_BL, _ in held_out])
    choices = []
    for grouping in groupings:
        grouped = copy.deepcopy(model)
        generator = torch.Generator().manual_seed(seed)
        for ffn in grouped.ffns():
            _regroup(ffn, grouping, generator)
        for router in _routers(grouped, grouping, fit):
            report(f"{grouping}, {router}")
            for k in ks:
                policy = ExpertPolicy.oracle(k) if router == "oracle" else ExpertPolicy.top_k(k)
                coverage = _coverage(grouped, test, k, oracle=router == "oracle")
                perplexity = evaluate(grouped, held_out, policy).perplexity
                choices.append(Choice(grouping, router, k, coverage, perplexity))
    return choices


def _layer_inputs(model: Decoder, batches: Sequence[Tensor]) -> list[Tensor]:
    """Each layer's FFN input [T, D] on all batches, run dense."""
    parts = [ffn_inputs(model, ids_BL) for ids_BL in batches]
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


def _regroup(ffn: ExpertFFN, grouping: str, generator: torch.Generator) -> None:
    """Move the neurons of one FFN into the experts of `grouping`."""
    if grouping == "present":
        return
    if grouping == "random":
        order_F = torch.randperm(ffn.up.shape[0], generator=generator)
        layout = ExpertLayout(order_F, ffn.num_experts)
    else:
        labels_F = cluster_neurons(ffn, generator).labels_F
        layout = ExpertLayout.from_labels(labels_F, ffn.num_experts)
    permute_neurons(ffn, layout, None)


def _routers(model: Decoder, grouping: str, fit: list[Tensor]) -> Iterator[str]:
    """Give the model one router after another; yields the name of the one it has."""
    pairs = list(zip(model.ffns(), fit, strict=True))
    if grouping == "present":
        yield "stored"
    for ffn, x_TD in pairs:
        calibrate_router(ffn, x_TD)
    yield "centroid"
    for ffn, x_TD in pairs:
        learn_router(ffn, x_TD)
    yield "fitted"
    yield "oracle"


def _coverage(model: Decoder, test: list[Tensor], k: int, *, oracle: bool) -> float:
    """Share of the true mass inside the k experts chosen on these FFN inputs, mean over layers."""
    shares = []
    for ffn, x_TD in zip(model.ffns(), test, strict=True):
        mass_TE = token_mass(ffn, x_TD)
        best_TK = (mass_TE if oracle else ffn.scores(x_TD)).topk(k, dim=1).indices
        shares.append(float(mass_TE.gather(1, best_TK).sum() / mass_TE.sum().clamp_min(1e-20)))
    return sum(shares) / len(shares)
