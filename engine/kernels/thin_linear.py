# Triton types a kernel's arguments by itself, at each launch.
# mypy: disable-error-code="no-untyped-def"
"""Products of a few tokens with matrices, with the norm before and the sum behind in one launch.

With a few tokens a product is the time that its weights take to arrive. Every program holds one
tile of weights in registers, fetched in a single burst, and multiplies each token with it in turn,
so a token's result is the same, bit for bit, alone or beside others. On Hopper the launches are
chained: a program fetches its weights while the kernel before still runs.

`thin_linear` multiplies with rows of outputs, W [N, D]: y = x @ W.T. `expert_up` does the same for
the rows of each token's experts. `thin_down` and `expert_down` multiply with rows of inputs,
W [F, D]: y = h @ W; programs share a column's sum, and the last to arrive adds what the others
left, in a fixed order. `expert_down` does not read rows whose neuron is silent.

Shapes: T tokens, D inputs of a row (and outputs of `down`), N outputs, F neurons, S neurons per
expert, K slots per token, C pieces of a sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.kernels._triton import (
    cdiv,
    chain,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    next_power_of_2,
    tl,
)
from engine.kernels.arrivals import Arrivals
from engine.kernels.expert_ffn import ACTIVATIONS, activate, activate_reference

# One launch multiplies no more tokens; with more, tensor cores are faster.
MOST_TOKENS = 4

# Elements of a program's tile: in bfloat16, 16 KB on the way to each of several programs a core.
TILE_ELEMENTS = 8192

# Pieces of a sum that the last program adds side by side; fixes the order of the sum.
PIECES_AT_ONCE = 8


class Norm(NamedTuple):
    """An RMSNorm: weight [D], and what is added to the mean square."""

    weight_D: Tensor
    epsilon: float


# --- references ----------------------------------------------------------------------------------


def normed_reference(x_TD: Tensor, norm: Norm | None) -> Tensor:
    """x in float32 (or its float64), normed if asked."""
    x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    if norm is None:
        return x_TD
    scale_T1 = (x_TD.square().mean(1, keepdim=True) + norm.epsilon).rsqrt()
    return x_TD * scale_T1 * norm.weight_D.to(x_TD.dtype)


def thin_linear_reference(
    x_TD: Tensor,
    weight_ND: Tensor,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    add_to: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """As `thin_linear`."""
    x = normed_reference(x_TD, norm)
    y_TN = x @ weight_ND.to(x.dtype).T
    if activation is not None:
        y_TN = activate_reference(y_TN, activation)
    if add_to is not None:
        y_TN = y_TN + add_to.to(x.dtype)
    return y_TN.to(dtype or x_TD.dtype)


def expert_up_reference(
    x_TD: Tensor,
    up_FD: Tensor,
    ids_TK: Tensor,
    expert_size: int,
    activation: str,
    norm: Norm | None = None,
) -> Tensor:
    """As `expert_up`; unused slots hold zeros."""
    x = normed_reference(x_TD, norm)
    h_TF = activate_reference(x @ up_FD.to(x.dtype).T, activation)
    h_TES = h_TF.view(x.shape[0], -1, expert_size)
    h_TKS = h_TES[torch.arange(x.shape[0], device=x.device)[:, None], ids_TK.clamp_min(0).long()]
    return h_TKS.masked_fill(ids_TK[:, :, None] < 0, 0.0).to(x_TD.dtype)


def expert_down_reference(h_TKS: Tensor, down_FD: Tensor, ids_TK: Tensor, add_to: Tensor) -> Tensor:
    """As `expert_down`."""
    wide = torch.promote_types(h_TKS.dtype, torch.float32)
    y_TD = add_to.to(wide).clone()
    size = h_TKS.shape[2]
    for token, ids in enumerate(ids_TK.tolist()):
        for slot, expert in enumerate(ids):
            if expert >= 0:
                rows_SD = down_FD[expert * size : (expert + 1) * size].to(wide)
                y_TD[token] += h_TKS[token, slot].to(wide) @ rows_SD
    return y_TD.to(add_to.dtype)


# --- kernels -------------------------------------------------------------------------------------


@jit
def _thin_linear_kernel(
    x_ptr,
    weight_ptr,
    norm_ptr,
    residual_ptr,
    y_ptr,
    outputs,
    d_model,
    epsilon,
    TOKENS: tl.constexpr,
    NORMED: tl.constexpr,
    ADDED: tl.constexpr,
    RECTIFIED: tl.constexpr,
    SQUARE: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program i: BLOCK_N outputs of all tokens."""
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
    for t in tl.static_range(TOKENS):
        x = tl.load(x_ptr + t * d_model + d, mask=in_d, other=0.0).to(tl.float32)
        # The norm's factor is common to all inputs, so it is applied to the sums.
        scaled = x * norm if NORMED else x
        y = tl.sum(weight.to(tl.float32) * scaled[None, :], axis=1)
        if NORMED:
            y *= 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / d_model + epsilon)
        if RECTIFIED:
            y = activate(y, SQUARE)
        if ADDED:
            y += tl.load(residual_ptr + t * outputs + n, mask=in_n, other=0.0).to(tl.float32)
        tl.store(y_ptr + t * outputs + n, y.to(y_ptr.dtype.element_ty), mask=in_n)


@jit
def _expert_up_kernel(
    x_ptr,
    up_ptr,
    norm_ptr,
    ids_ptr,
    h_ptr,
    d_model,
    expert_size,
    max_k,
    epsilon,
    NORMED: tl.constexpr,
    SQUARE: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (b, i): BLOCK_N neurons of pair i = token * max_k + slot."""
    pair = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    in_d = d < d_model
    if NORMED:
        norm = tl.load(norm_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.load(ids_ptr + pair)
    if expert < 0:
        return
    s = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_s = s < expert_size
    rows = (expert.to(tl.int64) * expert_size + s)[:, None] * d_model + d[None, :]
    up = tl.load(up_ptr + rows, mask=in_s[:, None] & in_d[None, :], other=0.0)
    x = tl.load(x_ptr + (pair // max_k) * d_model + d, mask=in_d, other=0.0).to(tl.float32)
    scaled = x * norm if NORMED else x
    h = tl.sum(up.to(tl.float32) * scaled[None, :], axis=1)
    if NORMED:
        h *= 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / d_model + epsilon)
    h = activate(h, SQUARE).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + pair * expert_size + s, h, mask=in_s)


@jit
def _down_kernel(
    h_ptr,
    down_ptr,
    ids_ptr,
    residual_ptr,
    partial_ptr,
    arrived_ptr,
    y_ptr,
    d_model,
    expert_size,
    max_k,
    pieces_per_slot,
    ROUTED: tl.constexpr,
    TOKENS: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program (j, c, t): piece c of the sum of columns j, of token t, or of all if not ROUTED.

    Not ROUTED, the one "expert" is the whole matrix.
    """
    j = tl.program_id(0)
    piece = tl.program_id(1)
    first_token = tl.program_id(2)
    pieces = tl.num_programs(1)
    d = j * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < d_model
    slot = piece // pieces_per_slot
    s = (piece % pieces_per_slot) * BLOCK_S + tl.arange(0, BLOCK_S)
    real = s < expert_size
    if not ROUTED:
        at = down_ptr + s.to(tl.int64)[:, None] * d_model + d[None, :]
        down = tl.load(at, mask=real[:, None] & in_d[None, :], other=0.0)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    if ROUTED:
        expert = tl.load(ids_ptr + first_token * max_k + slot)
        real = real & (expert >= 0)
        neuron = tl.maximum(expert, 0).to(tl.int64) * expert_size + s
        at = down_ptr + neuron[:, None] * d_model + d[None, :]
    for i in tl.static_range(TOKENS):
        token = first_token + i
        h_at = h_ptr + (token * max_k + slot) * expert_size + s
        h = tl.load(h_at, mask=real, other=0.0).to(tl.float32)
        if ROUTED:
            down = tl.load(at, mask=(h != 0.0)[:, None] & in_d[None, :], other=0.0)
        y = tl.sum(down.to(tl.float32) * h[:, None], axis=0)
        tl.store(partial_ptr + (token * pieces + piece) * d_model + d, y, mask=in_d)
    tl.debug_barrier()  # all of this program's sums are written before it says so
    arrived_ptr += first_token * tl.num_programs(0) + j
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == pieces - 1:
        tl.store(arrived_ptr, 0)
        for i in tl.static_range(TOKENS):
            token = first_token + i
            sums = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
            for start in range(0, pieces, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                sums += tl.load(
                    partial_ptr + (token * pieces + c)[:, None] * d_model + d[None, :],
                    mask=(c < pieces)[:, None] & in_d[None, :],
                    other=0.0,
                )
            total = tl.sum(sums, axis=0)
            total += tl.load(residual_ptr + token * d_model + d, mask=in_d, other=0.0).to(
                tl.float32
            )
            tl.store(y_ptr + token * d_model + d, total.to(y_ptr.dtype.element_ty), mask=in_d)


# --- launchers -----------------------------------------------------------------------------------


def linear_blocks(inputs: int) -> dict[str, int]:
    """Block sizes of `_thin_linear_kernel` and `_expert_up_kernel`: whole rows."""
    block_d = next_power_of_2(inputs)
    rows = max(1, TILE_ELEMENTS // block_d)
    return {
        "BLOCK_N": rows,
        "BLOCK_D": block_d,
        "num_warps": min(16, max(1, rows * block_d // 2048)),
    }


def down_blocks(rows: int) -> dict[str, int]:
    """Block sizes of `_down_kernel` for slots of so many rows: few enough pieces to be added."""
    block_s = min(64 if rows <= 2048 else 128, next_power_of_2(rows))
    warps = 8 if block_s > 64 else 4
    return {"BLOCK_S": block_s, "BLOCK_D": 128, "BLOCK_C": PIECES_AT_ONCE, "num_warps": warps}


def _check(x_TD: Tensor, *weights: Tensor) -> None:
    assert x_TD.is_contiguous()
    assert 1 <= x_TD.shape[0] <= MOST_TOKENS
    for weight in weights:
        assert weight.is_contiguous()
        assert weight.dtype == x_TD.dtype


def thin_linear(
    x_TD: Tensor,
    weight_ND: Tensor,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    add_to: Tensor | None = None,
    dtype: torch.dtype | None = None,
    blocks: dict[str, int] | None = None,
) -> Tensor:
    """act(norm(x) @ weight.T) + add_to, summed in float32: [T, N].

    Args:
        x_TD: contiguous; float32, bfloat16 or float16; T from 1 to MOST_TOKENS.
        weight_ND: contiguous, dtype of x.
        norm: of x, if any.
        activation: one of ACTIVATIONS, or none.
        add_to: [T, N], contiguous, any float type.
        dtype: of the result; that of x unless given.
        blocks: the tile, for measurements.
    """
    _check(x_TD, weight_ND)
    assert activation is None or activation in ACTIVATIONS
    assert add_to is None or add_to.is_contiguous()
    (num_tokens, d_model), outputs = x_TD.shape, weight_ND.shape[0]
    y_TN = torch.empty((num_tokens, outputs), dtype=dtype or x_TD.dtype, device=x_TD.device)
    blocks = blocks or linear_blocks(d_model)
    # What is absent is passed as another tensor, which the kernel then never reads.
    _thin_linear_kernel[(cdiv(outputs, blocks["BLOCK_N"]),)](
        x_TD,
        weight_ND,
        x_TD if norm is None else norm.weight_D,
        x_TD if add_to is None else add_to,
        y_TN,
        outputs,
        d_model,
        0.0 if norm is None else norm.epsilon,
        TOKENS=num_tokens,
        NORMED=norm is not None,
        ADDED=add_to is not None,
        RECTIFIED=activation is not None,
        SQUARE=activation == "relu2",
        **blocks,
        **chain(x_TD.device),
    )
    return y_TN


def expert_up(
    x_TD: Tensor,
    up_FD: Tensor,
    ids_TK: Tensor,
    expert_size: int,
    activation: str,
    norm: Norm | None = None,
    blocks: dict[str, int] | None = None,
) -> Tensor:
    """Activations of each token's experts, [T, K, S] in the dtype of x; unused slots unwritten.

    Args:
        x_TD, up_FD: as for `thin_linear`; expert e owns rows e*S .. (e+1)*S.
        ids_TK: int32, contiguous, the experts of each token, -1 in unused slots.
        expert_size: S.
        activation: one of ACTIVATIONS.
        norm: of x, if any.
        blocks: the tile, for measurements.
    """
    _check(x_TD, up_FD)
    assert activation in ACTIVATIONS
    assert ids_TK.dtype == torch.int32
    assert ids_TK.is_contiguous()
    (num_tokens, max_k), d_model = ids_TK.shape, x_TD.shape[1]
    h_TKS = torch.empty((num_tokens, max_k, expert_size), dtype=x_TD.dtype, device=x_TD.device)
    blocks = blocks or linear_blocks(d_model)
    _expert_up_kernel[(cdiv(expert_size, blocks["BLOCK_N"]), num_tokens * max_k)](
        x_TD,
        up_FD,
        x_TD if norm is None else norm.weight_D,
        ids_TK,
        h_TKS,
        d_model,
        expert_size,
        max_k,
        0.0 if norm is None else norm.epsilon,
        NORMED=norm is not None,
        SQUARE=activation == "relu2",
        **blocks,
        **chain(x_TD.device),
    )
    return h_TKS


def thin_down(
    h_TF: Tensor,
    down_FD: Tensor,
    add_to: Tensor,
    arrivals: Arrivals,
    blocks: dict[str, int] | None = None,
) -> Tensor:
    """h @ down + add_to, summed in float32: [T, D] in the dtype of `add_to`.

    Args:
        h_TF, down_FD: as for `thin_linear`.
        add_to: [T, D], contiguous, any float type.
        arrivals: counters that no kernel of another stream uses at the same time.
        blocks: the tile, for measurements.
    """
    _check(h_TF, down_FD)
    return _down(h_TF[:, None], down_FD, None, add_to, arrivals, blocks)


def expert_down(
    h_TKS: Tensor,
    down_FD: Tensor,
    ids_TK: Tensor,
    add_to: Tensor,
    arrivals: Arrivals,
    blocks: dict[str, int] | None = None,
) -> Tensor:
    """add_to plus the sum of each token's used slots, h @ down_e: [T, D] in the dtype of `add_to`.

    Args:
        h_TKS: of `expert_up`, from the same ids.
        down_FD, ids_TK: as for `expert_up`.
        add_to, arrivals, blocks: as for `thin_down`.
    """
    _check(h_TKS, down_FD)
    return _down(h_TKS, down_FD, ids_TK, add_to, arrivals, blocks)


def _down(
    h_TKS: Tensor,
    down_FD: Tensor,
    ids_TK: Tensor | None,
    add_to: Tensor,
    arrivals: Arrivals,
    blocks: dict[str, int] | None,
) -> Tensor:
    assert add_to.is_contiguous()
    (num_tokens, max_k, size), d_model = h_TKS.shape, down_FD.shape[1]
    blocks = blocks or down_blocks(size)
    columns, per_slot = cdiv(d_model, blocks["BLOCK_D"]), cdiv(size, blocks["BLOCK_S"])
    pieces, together = max_k * per_slot, 1 if ids_TK is not None else num_tokens
    partial_TCD = torch.empty(
        (num_tokens, pieces, d_model), dtype=torch.float32, device=h_TKS.device
    )
    y_TD = torch.empty_like(add_to)
    _down_kernel[(columns, pieces, num_tokens // together)](
        h_TKS,
        down_FD,
        add_to if ids_TK is None else ids_TK,
        add_to,
        partial_TCD,
        arrivals.of("down", num_tokens * columns),
        y_TD,
        d_model,
        size,
        max_k,
        per_slot,
        ROUTED=ids_TK is not None,
        TOKENS=together,
        **blocks,
        **chain(h_TKS.device),
    )
    return y_TD
