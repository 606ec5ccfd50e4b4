"""The sparse FFN for a batch of decoding tokens: it reads every expert that any of them uses, once.

Up to some dozens of tokens time is still the bytes of weights, and multiplying all tokens with an
expert that one of them chose costs nothing beside reading it. So nothing is sorted or gathered.
`_first_kernel` multiplies every token with the neurons of the used experts and zeroes what a token
did not choose; `_second_kernel` multiplies those activations with the rows of the used experts, one
share of them a program; a last launch adds the shares in a fixed order. Experts that nobody chose
are not read.

Weights are the first operand of the products, tokens the second: tensor cores want at least 64 rows
of the first and are content with 16 of the second.

Shapes: T tokens, D model, F neurons, E experts, S neurons per expert, P shares of a sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.gpu._triton import (
    INTERPRETED,
    cdiv,
    chain,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    next_power_of_2,
    tl,
)
from engine.gpu.ffn.activations import activate
from engine.model.activations import ACTIVATIONS, activate_reference

MOST_TOKENS = 64


def ffn_reference(
    x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, chosen_TE: Tensor, activation: str
) -> Tensor:
    """What `ffn` computes, in float32 or the inputs' float64: what was not chosen is zeroed."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    h_TF = activate_reference(x_TD.to(wide) @ up_FD.to(wide).T, activation)
    h_TES = h_TF.view(*chosen_TE.shape, -1) * chosen_TE[:, :, None]
    return (h_TES.flatten(1) @ down_FD.to(wide)).to(x_TD.dtype)


@jit
def _list_used(
    chosen_ptr, list_ptr, num_tokens, num_experts, BLOCK_L: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Write how many experts any token chose, and then which, ascending."""
    e = tl.arange(0, BLOCK_E)
    used = tl.zeros((BLOCK_E,), tl.int32)
    for start in range(0, num_tokens, BLOCK_L):
        t = start + tl.arange(0, BLOCK_L)[:, None]
        at = chosen_ptr + t * num_experts + e[None, :]
        chosen = tl.load(at, mask=(t < num_tokens) & (e < num_experts)[None, :], other=0)
        used = tl.maximum(used, tl.max(chosen.to(tl.int32), axis=0))
    tl.store(list_ptr + tl.cumsum(used, axis=0), e, mask=used != 0)
    tl.store(list_ptr, tl.sum(used, axis=0))


@jit
def _first_kernel(
    x_ptr,
    up_ptr,
    chosen_ptr,
    h_ptr,
    list_ptr,
    num_tokens,
    num_experts,
    d_model,
    expert_size,
    SQUARE: tl.constexpr,
    WIDEN: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Program i: BLOCK_N neurons of one expert; the first also lists the used experts."""
    # 1. See who chose the expert; if nobody did, there is nothing to do.
    blocks = tl.cdiv(expert_size, BLOCK_N)
    i = tl.program_id(0)
    expert = i // blocks
    t = tl.arange(0, BLOCK_T)
    in_t = t < num_tokens
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    chosen = tl.load(chosen_ptr + t * num_experts + expert, mask=in_t, other=0) != 0
    if i == 0:
        _list_used(chosen_ptr, list_ptr, num_tokens, num_experts, BLOCK_L, BLOCK_E)
    if tl.max(chosen.to(tl.int32), axis=0) == 0:
        return

    # 2. Multiply all tokens with the neurons.
    s = (i % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_s = s < expert_size
    up_rows = up_ptr + (expert.to(tl.int64) * expert_size + s)[:, None] * d_model
    x_rows = x_ptr + t[:, None] * d_model
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for start in range(0, d_model, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        up = tl.load(up_rows + d, mask=in_s[:, None] & (d < d_model), other=0.0)
        x = tl.load(x_rows + d, mask=in_t[:, None] & (d < d_model), other=0.0)
        if WIDEN:
            up, x = up.to(tl.float32), x.to(tl.float32)
        acc = tl.dot(up, tl.trans(x), acc, input_precision="ieee")

    # 3. Store the activations of the tokens that chose the expert, zeros of the others.
    h = tl.where(chosen[None, :], activate(acc, SQUARE), 0.0).to(h_ptr.dtype.element_ty)
    at = h_ptr + t[None, :] * (num_experts * expert_size) + expert * expert_size + s[:, None]
    tl.store(at, h, mask=in_s[:, None] & in_t[None, :])


@jit
def _second_kernel(
    h_ptr,
    down_ptr,
    list_ptr,
    partial_ptr,
    num_tokens,
    num_experts,
    d_model,
    expert_size,
    WIDEN: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (j, p): columns j of share p of the used experts' rows."""
    # 1. Find the share: some steps of BLOCK_S rows, through the list of the used experts.
    j = tl.program_id(0)
    share = tl.program_id(1)
    shares = tl.num_programs(1)
    d = j * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < d_model
    t = tl.arange(0, BLOCK_T)
    in_t = t < num_tokens
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    per_expert = tl.cdiv(expert_size, BLOCK_S)
    steps = tl.load(list_ptr) * per_expert
    each = tl.cdiv(steps, shares)
    first = share * each
    neurons = num_experts * expert_size

    # 2. Multiply them with all tokens' activations; unchosen ones are zeros.
    acc = tl.zeros((BLOCK_D, BLOCK_T), tl.float32)
    for step in range(first, tl.minimum(first + each, steps)):
        expert = tl.load(list_ptr + 1 + step // per_expert)
        s = (step % per_expert) * BLOCK_S + tl.arange(0, BLOCK_S)
        in_s = s < expert_size
        neuron = expert * expert_size + s
        down = tl.load(
            down_ptr + neuron.to(tl.int64)[:, None] * d_model + d[None, :],
            mask=in_s[:, None] & in_d[None, :],
            other=0.0,
        )
        h = tl.load(
            h_ptr + t[:, None] * neurons + neuron[None, :],
            mask=in_t[:, None] & in_s[None, :],
            other=0.0,
        )
        if WIDEN:
            down, h = down.to(tl.float32), h.to(tl.float32)
        acc = tl.dot(tl.trans(down), tl.trans(h), acc, input_precision="ieee")

    # 3. Write the share's part of the sum.
    at = t[None, :] * d_model + d[:, None]
    real = in_t[None, :] & in_d[:, None]
    tl.store(partial_ptr + share * num_tokens * d_model + at, acc, mask=real)


@jit
def _sum_shares_kernel(
    partial_ptr,
    y_ptr,
    elements,
    shares,
    CHAINED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Program i: BLOCK_I elements of y, the sum of their shares."""
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    p = tl.arange(0, BLOCK_P)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    at = partial_ptr + p.to(tl.int64)[:, None] * elements + i[None, :]
    real = (p < shares)[:, None] & (i < elements)[None, :]
    y = tl.sum(tl.load(at, mask=real, other=0.0), axis=0)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < elements)


def first_blocks(num_tokens: int) -> dict[str, int]:
    """Block sizes of `_first_kernel`."""
    few = num_tokens <= 8
    return {
        "BLOCK_T": max(16, next_power_of_2(num_tokens)),
        "BLOCK_N": 64,
        "BLOCK_D": 256 if few else 64,
        "num_warps": 4,
        "num_stages": 3 if few else 5,
    }


def second_blocks(num_tokens: int) -> dict[str, int]:
    """Block sizes of `_second_kernel`."""
    few = num_tokens <= 8
    return {
        "BLOCK_T": max(16, next_power_of_2(num_tokens)),
        "BLOCK_S": 64 if few else 128,
        "BLOCK_D": 64,
        "num_warps": 4,
        "num_stages": 8 if few else 6,
    }


def sum_shares(columns: int) -> int:
    """Shares that the rows of a column are cut into: about two programs a core."""
    return max(1, min(16, 256 // columns))


def sum_blocks(shares: int) -> dict[str, int]:
    """Block sizes of `_sum_shares_kernel`."""
    return {"BLOCK_P": next_power_of_2(shares), "BLOCK_I": 256, "num_warps": 4}


def ffn(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    chosen_TE: Tensor,
    activation: str,
    *,
    first: dict[str, int] | None = None,
    second: dict[str, int] | None = None,
    shares: int | None = None,
) -> Tensor:
    """y [T, D] of the chosen experts, summed in float32, in the dtype of x.

    Between the products, activations are rounded to the dtype of x.

    Args:
        x_TD: [T, D], contiguous; float32, bfloat16 or float16; T from 1 to MOST_TOKENS.
        up_FD, down_FD: [F, D], contiguous, dtype of x; expert e owns rows e*S .. (e+1)*S.
        chosen_TE: bool [T, E], contiguous.
        activation: one of ACTIVATIONS.
        first, second, shares: block sizes and shares of the sum, for measurements.
    """
    assert activation in ACTIVATIONS
    (num_tokens, num_experts), d_model = chosen_TE.shape, x_TD.shape[1]
    assert 1 <= num_tokens <= MOST_TOKENS
    for tensor in (x_TD, up_FD, down_FD, chosen_TE):
        assert tensor.is_contiguous()
    size, device = up_FD.shape[0] // num_experts, x_TD.device
    first = first or first_blocks(num_tokens)
    second = second or second_blocks(num_tokens)
    h_TF = torch.empty((num_tokens, up_FD.shape[0]), dtype=x_TD.dtype, device=device)
    used_E1 = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    _first_kernel[(num_experts * cdiv(size, first["BLOCK_N"]),)](
        x_TD,
        up_FD,
        chosen_TE,
        h_TF,
        used_E1,
        num_tokens,
        num_experts,
        d_model,
        size,
        SQUARE=activation == "relu2",
        WIDEN=INTERPRETED,
        BLOCK_L=8,
        BLOCK_E=next_power_of_2(num_experts),
        **first,
        **chain(device),
    )
    columns = cdiv(d_model, second["BLOCK_D"])
    shares = shares or sum_shares(columns)
    partial_PTD = torch.empty((shares, num_tokens, d_model), dtype=torch.float32, device=device)
    _second_kernel[(columns, shares)](
        h_TF,
        down_FD,
        used_E1,
        partial_PTD,
        num_tokens,
        num_experts,
        d_model,
        size,
        WIDEN=INTERPRETED,
        **second,
        **chain(device),
    )
    y_TD = torch.empty_like(x_TD)
    blocks = sum_blocks(shares)
    _sum_shares_kernel[(cdiv(y_TD.numel(), blocks["BLOCK_I"]),)](
        partial_PTD, y_TD, y_TD.numel(), shares, **blocks, **chain(device)
    )
    return y_TD
