"""The activations of an FFN, in plain torch and for use inside kernels.

A layer without gates computes act(x @ up.T); with biases act(x @ up.T + up_bias). A gated layer
computes act(x @ gate.T) * (x @ up.T + up_bias). ReLU, its square and "fatrelu" (zero up to a
threshold) are all exactly zero for much of their input: this is what makes experts sparse.
"drelu" takes ReLU of the gate and of what the gate multiplies.

Shapes: T tokens, D model, N neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.gpu._triton import jit, tl

# Every kernel takes these.
ACTIVATIONS = ("relu", "relu2")
# The FFNs for few and for many tokens take these as well.
MORE_ACTIVATIONS = (*ACTIVATIONS, "fatrelu", "drelu")


# --- in plain torch ------------------------------------------------------------------------------


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


# --- inside kernels ------------------------------------------------------------------------------


def activation_flags(activation: str) -> dict[str, bool]:
    """The constants by which a kernel knows which of MORE_ACTIVATIONS it computes."""
    assert activation in MORE_ACTIVATIONS
    return {
        "SQUARE": activation == "relu2",
        "FAT": activation == "fatrelu",
        "BOTH": activation == "drelu",
    }


@jit
def activate(x, SQUARE: tl.constexpr):
    """ReLU or its square. NaN stays NaN, which tl.maximum would not keep."""
    positive = tl.where(x < 0.0, 0.0, x)
    if SQUARE:
        positive = positive * positive
    return positive


@jit
def activate_more(x, SQUARE: tl.constexpr, FAT: tl.constexpr, threshold):
    """What `activate` computes, or zero up to a threshold."""
    return tl.where(x <= threshold, 0.0, x) if FAT else activate(x, SQUARE)


@jit
def gated(gate, up, SQUARE: tl.constexpr, FAT: tl.constexpr, BOTH: tl.constexpr, threshold):
    """act(gate) * up, or act(gate) * relu(up)."""
    if BOTH:
        up = activate(up, False)
    return activate_more(gate, SQUARE, FAT, threshold) * up
