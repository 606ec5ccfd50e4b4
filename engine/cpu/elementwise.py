"""The steps between the products of a layer (sums, norms and rotation) by the CPU's kernels.

Shapes: T tokens, D model, H heads, d head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.cpu.native import FLOAT, LONG, call, pointer


def add_scaled_(x_TD: Tensor, delta_TD: Tensor, multiplier: float) -> Tensor:
    """x + multiplier * delta, [T, D], rounded to its type once; replaces x in place."""
    T, D = x_TD.shape
    call(
        "add_scaled", x_TD.dtype, pointer(x_TD), pointer(delta_TD), LONG(T), LONG(D),
        FLOAT(multiplier),
    )  # fmt: skip
    return x_TD


def rms_norm(
    x_TD: Tensor, delta_TD: Tensor | None, weight_D: Tensor, eps: float, multiplier: float = 1.0
) -> Tensor:
    """RMSNorm (Zhang and Sennrich, 2019) of x + multiplier * delta, [T, D]; the sum replaces x."""
    T, D = x_TD.shape
    out_TD = torch.empty_like(x_TD)
    call(
        "rms_norm", x_TD.dtype, pointer(x_TD), pointer(delta_TD), pointer(weight_D),
        pointer(out_TD), LONG(T), LONG(D), FLOAT(multiplier), FLOAT(eps),
    )  # fmt: skip
    return out_TD


def layer_norm(
    x_TD: Tensor,
    delta_TD: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    multiplier: float = 1.0,
) -> Tensor:
    """LayerNorm (Ba et al. 2016) of x + multiplier * delta, [T, D]; the sum replaces x."""
    T, D = x_TD.shape
    out_TD = torch.empty_like(x_TD)
    call(
        "layer_norm", x_TD.dtype, pointer(x_TD), pointer(delta_TD), pointer(weight_D),
        pointer(bias_D), pointer(out_TD), LONG(T), LONG(D), FLOAT(multiplier), FLOAT(eps),
    )  # fmt: skip
    return out_TD


def rotate_(x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    """`attention.rotate` in place, on heads that lie one after another in each row."""
    T, heads, d = x_THd.shape
    call(
        "rotate", x_THd.dtype, pointer(x_THd), pointer(cos_Td), pointer(sin_Td), LONG(T),
        LONG(heads), LONG(d), LONG(x_THd.stride(0)),
    )  # fmt: skip
    return x_THd
