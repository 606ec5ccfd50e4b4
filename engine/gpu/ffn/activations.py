"""The activations of an FFN for use inside kernels; engine/model/activations.py says what they are.

A gated layer computes act(x @ gate.T) * (x @ up.T + up_bias).
"""

from __future__ import annotations

from engine.gpu._triton import jit, tl
from engine.model.activations import MORE_ACTIVATIONS


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
