"""A product of one token with a whole matrix, norm before and sum behind, in one launch.

With one token a product is the time that its weights take to arrive. Every program holds one block
of weights in registers, fetched in a single burst. On Hopper launches are chained: a program
fetches its weights while the kernel before still runs.

Shapes: D inputs, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.gpu._triton import cdiv, chain, gdc_launch_dependents, gdc_wait, jit, tl
from engine.gpu.add_norm import Norm, normed_reference
from engine.gpu.ffn.activations import activate
from engine.gpu.ffn.few_tokens import row_blocks
from engine.model.activations import ACTIVATIONS, activate_reference


def thin_linear_reference(
    x_1D: Tensor,
    weight_ND: Tensor,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    add_to: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The reference of `thin_linear`, in plain torch."""
    x = normed_reference(x_1D, norm)
    y_1N = x @ weight_ND.to(x.dtype).T
    if activation is not None:
        y_1N = activate_reference(y_1N, activation)
    if add_to is not None:
        y_1N = y_1N + add_to.to(x.dtype)
    return y_1N.to(dtype or x_1D.dtype)


@jit
def _thin_linear_kernel(
    x_ptr,
    norm_ptr,
    weight_ptr,
    residual_ptr,
    y_ptr,
    outputs,
    d_model,
    epsilon,
    NORMED: tl.constexpr,
    ADDED: tl.constexpr,
    RECTIFIED: tl.constexpr,
    SQUARE: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program i computes outputs i * BLOCK_N .. (i + 1) * BLOCK_N."""
    # 1. Fetch the weights, which no kernel writes, while the kernel before still runs.
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_n, in_d = n < outputs, d < d_model
    rows = n.to(tl.int64)[:, None] * d_model + d[None, :]
    weight = tl.load(weight_ptr + rows, mask=in_n[:, None] & in_d[None, :], other=0.0)
    if NORMED:
        norm = tl.load(norm_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()

    # 2. Multiply. The norm's factor is common to all inputs, so it is applied to the sums.
    x = tl.load(x_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    scaled = x * norm if NORMED else x
    y = tl.sum(weight.to(tl.float32) * scaled[None, :], axis=1)
    if NORMED:
        y *= 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / d_model + epsilon)

    # 3. Activate and add what is asked for.
    if RECTIFIED:
        y = activate(y, SQUARE)
    if ADDED:
        y += tl.load(residual_ptr + n, mask=in_n, other=0.0).to(tl.float32)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=in_n)


def thin_linear(
    x_1D: Tensor,
    weight_ND: Tensor,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    add_to: Tensor | None = None,
    dtype: torch.dtype | None = None,
    blocks: dict[str, int] | None = None,
) -> Tensor:
    """act(norm(x) @ weight.T) + add_to, summed in float32: [1, N].

    Args:
        x_1D: [1, D], contiguous; float32, bfloat16 or float16.
        weight_ND: contiguous, dtype of x.
        norm: the norm that is applied to x first, or None.
        activation: one of ACTIVATIONS, or none.
        add_to: [1, N], contiguous, any float type.
        dtype: type of the result; by default that of x.
        blocks: block sizes, for measurements.
    """
    (tokens, d_model), outputs = x_1D.shape, weight_ND.shape[0]
    assert tokens == 1
    assert activation is None or activation in ACTIVATIONS
    assert weight_ND.dtype == x_1D.dtype
    for tensor in (x_1D, weight_ND) if add_to is None else (x_1D, weight_ND, add_to):
        assert tensor.is_contiguous()
    y_1N = torch.empty((1, outputs), dtype=dtype or x_1D.dtype, device=x_1D.device)
    blocks = blocks or row_blocks(d_model)
    # A kernel needs a tensor for every pointer: an absent one is another tensor, which is never
    # read.
    _thin_linear_kernel[(cdiv(outputs, blocks["BLOCK_N"]),)](
        x_1D,
        x_1D if norm is None else norm.weight_D,
        weight_ND,
        x_1D if add_to is None else add_to,
        y_1N,
        outputs,
        d_model,
        0.0 if norm is None else norm.epsilon,
        NORMED=norm is not None,
        ADDED=add_to is not None,
        RECTIFIED=activation is not None,
        SQUARE=activation == "relu2",
        **blocks,
        **chain(x_1D.device),
    )
    return y_1N
