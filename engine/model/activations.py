"""The activations that experts may have. All are exactly zero where a neuron is silent.

Shapes: T tokens, D model, N neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATIONS = ("relu", "relu2")
# Imported models may have these as well: zero up to a threshold, and, in gated models, ReLU of the
# gate and of what it multiplies.
MORE_ACTIVATIONS = (*ACTIVATIONS, "fatrelu", "drelu")


def activate_reference(x: Tensor, activation: str, threshold: float = 0.0) -> Tensor:
    """ReLU, its square, or zero up to a threshold; NaN stays NaN."""
    assert activation in MORE_ACTIVATIONS
    if activation == "fatrelu":
        return torch.nn.functional.threshold(x, threshold, 0.0)
    positive = x.relu()
    return positive.square() if activation == "relu2" else positive


def gated_reference(gate: Tensor, up: Tensor, activation: str, threshold: float = 0.0) -> Tensor:
    """act(gate) * up, with "drelu" act(gate) * relu(up)."""
    return activate_reference(gate, activation, threshold) * (
        up.relu() if activation == "drelu" else up
    )


def hidden_reference(
    x_TD: Tensor,
    up_ND: Tensor,
    activation: str,
    gate_ND: Tensor | None = None,
    up_bias_N: Tensor | None = None,
    threshold: float = 0.0,
) -> Tensor:
    """Activations [T, N] of N neurons, in the dtype of x."""
    up_TN = x_TD @ up_ND.to(x_TD.dtype).T
    if up_bias_N is not None:
        up_TN = up_TN + up_bias_N.to(x_TD.dtype)
    if gate_ND is None:
        return activate_reference(up_TN, activation, threshold)
    return gated_reference(x_TD @ gate_ND.to(x_TD.dtype).T, up_TN, activation, threshold)
