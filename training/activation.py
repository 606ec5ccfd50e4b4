"""Which neurons fire: activation patterns on a fixed probe batch, and how alike two of them are.

The paper's finding is that ReLU models grow sparse while they train and that *which* neurons fire
together settles only gradually. We watch the set of active neurons of every probe token in every
layer; two looks are as similar as their sets overlap. The measure is ours: the paper does not
publish its own.

Shapes: T probe tokens, F neurons, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.gpu.ffn.activations import activate_reference, gated_reference
from engine.model.decoder import Decoder
from engine.model.experts import ExpertFFN, ExpertLayout, Trace
from engine.serving.request import ExpertPolicy
from training.sharding import whole


@dataclass(frozen=True)
class ActivationPattern:
    """Active neurons of the probe tokens: one bool [T, F] a layer."""

    layers: tuple[Tensor, ...]

    def permute(self, layouts: list[ExpertLayout]) -> ActivationPattern:
        """The same pattern after each layer's neurons have moved."""
        pairs = zip(self.layers, layouts, strict=True)
        return ActivationPattern(tuple(layout.apply(p.T).T.contiguous() for p, layout in pairs))

    @property
    def active_shares(self) -> list[float]:
        """Share of active neurons, per layer."""
        return [float(pattern.float().mean()) for pattern in self.layers]


def similarity(first: ActivationPattern, second: ActivationPattern) -> float:
    """Overlap coefficient |A and B| / min(|A|, |B|), mean over layers; 1 is identical.

    Unlike the Jaccard index it stays at 1 when activations merely get sparser, as the penalty
    makes them, with the neurons that remain being the same.
    """
    scores = []
    for a, b in zip(first.layers, second.layers, strict=True):
        smaller = min(int(a.sum()), int(b.sum()))
        scores.append(int((a & b).sum()) / smaller if smaller else 1.0)
    return sum(scores) / len(scores)


@torch.no_grad()
def ffn_inputs(model: Decoder, probe_BL: Tensor) -> list[Tensor]:
    """Each layer's FFN input [T, D] on the probe batch, run dense."""
    trace = Trace(keep_inputs=True)
    model.logits(probe_BL, ExpertPolicy.dense(), trace)
    return trace.inputs


@torch.no_grad()
def observe(model: Decoder, probe_BL: Tensor) -> ActivationPattern:
    """The pattern of `model`, run dense, on the probe batch."""
    inputs = ffn_inputs(model, probe_BL)
    pairs = zip(inputs, model.ffns(), strict=True)
    return ActivationPattern(tuple(hidden(ffn, x_TD) != 0 for x_TD, ffn in pairs))


def hidden(ffn: ExpertFFN, x_TD: Tensor) -> Tensor:
    """The activations of all neurons, [T, F], also where processes divide the weights."""
    x_TD = x_TD.to(ffn.up.dtype)
    up_TF = x_TD @ whole(ffn.up).T
    if ffn.up_bias is not None:
        up_TF = up_TF + whole(ffn.up_bias)
    if ffn.gate is None:
        return activate_reference(up_TF, ffn.activation, ffn.threshold)
    return gated_reference(x_TD @ whole(ffn.gate).T, up_TF, ffn.activation, ffn.threshold)


def deciding_rows(ffn: ExpertFFN) -> Tensor:
    """The weights that decide whether a neuron fires, [F, D]: of its gate, if it has one."""
    return whole(ffn.up if ffn.gate is None else ffn.gate)
