"""A residual sum and the RMSNorm that follows it, in one launch.

Decoding a few tokens is a chain of small launches, and each costs more than its arithmetic: a layer
has two such pairs.

Shapes: T tokens, D model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.gpu._triton import jit, next_power_of_2, tl


class Norm(NamedTuple):
    """An RMSNorm: its weight [D], and the epsilon that is added to the mean square."""

    weight_D: Tensor
    epsilon: float


def normed_reference(x_TD: Tensor, norm: Norm | None) -> Tensor:
    """x in float32 (or its float64), normed if asked."""
    x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    if norm is None:
        return x_TD
    scale_T1 = (x_TD.square().mean(1, keepdim=True) + norm.epsilon).rsqrt()
    return x_TD * scale_T1 * norm.weight_D.to(x_TD.dtype)


def add_norm_reference(
    x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The reference of `add_norm`, in plain torch."""
    sum_TD = x_TD + delta_TD
    wide_TD = sum_TD.float()
    scale_T1 = (wide_TD.square().mean(1, keepdim=True) + epsilon).rsqrt()
    return sum_TD, (wide_TD * scale_T1 * weight_D.float()).to(x_TD.dtype)


@jit
def _add_norm_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    sum_ptr,
    normed_ptr,
    epsilon,
    d_model,
    BLOCK_D: tl.constexpr,
):
    """Program t computes row t."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    real = d < d_model
    x = tl.load(x_ptr + t * d_model + d, mask=real, other=0.0).to(tl.float32)
    delta = tl.load(delta_ptr + t * d_model + d, mask=real, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=real, other=0.0).to(tl.float32)
    # The sum is rounded as it is stored: the norm must be that of what later layers read.
    total = (x + delta).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + t * d_model + d, total, mask=real)
    total = total.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(total * total, axis=0) / d_model + epsilon)
    normed = (total * scale * weight).to(normed_ptr.dtype.element_ty)
    tl.store(normed_ptr + t * d_model + d, normed, mask=real)


def add_norm_blocks(d_model: int) -> dict[str, int]:
    """Block sizes of `_add_norm_kernel`: up to 8 elements a thread, then more of them."""
    block_d = next_power_of_2(d_model)
    return {"BLOCK_D": block_d, "num_warps": min(32, max(1, block_d // 256))}


def add_norm(
    x_TD: Tensor, delta_TD: Tensor, weight_D: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """(x + delta, its RMSNorm times `weight`), both [T, D] in the dtype of x.

    Args:
        x_TD, delta_TD: contiguous, one dtype; T >= 1.
        weight_D: contiguous, any float type.
        epsilon: added to the mean square.
    """
    assert x_TD.is_contiguous()
    assert delta_TD.is_contiguous()
    assert x_TD.dtype == delta_TD.dtype
    num_tokens, d_model = x_TD.shape
    sum_TD, normed_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
    _add_norm_kernel[(num_tokens,)](
        x_TD, delta_TD, weight_D, sum_TD, normed_TD, epsilon, d_model, **add_norm_blocks(d_model)
    )
    return sum_TD, normed_TD
