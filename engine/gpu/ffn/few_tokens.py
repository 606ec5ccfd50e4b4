"""The sparse FFN for few tokens: y = sum over a token's experts of h_e @ down_e.

The activations h are those of `activations`; down_bias is added once per token, whatever its
experts. A norm of x and a residual sum may come along, so that one token needs no launches for
them.

With few tokens time is the bytes of the chosen rows over the memory's bandwidth. So both launches
read each pair's rows once, every program a block of them in one burst of wide loads, and leave the
tensor cores alone. Tokens that share an expert read it again, through the cache: past a few pairs
other ways win, and benchmarks/gpu measures where.

`first_product` gives a program a few of an expert's neurons. `second_product` gives it some of an
expert's neurons and of the columns; it does not read rows whose neuron is silent. The programs of a
column leave partial sums, and the last to arrive adds them in a fixed order.

How a pair is cut depends on the expert's size alone, and unused slots add exact zeros. So a token's
output is the same, bit for bit, in any run and in any company.

Shapes: T tokens, D model, F neurons, S neurons per expert, K slots per token, C pieces of a sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.gpu._triton import (
    cdiv,
    chain,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    next_power_of_2,
    tl,
)
from engine.gpu.add_norm import Norm, normed_reference
from engine.gpu.arrivals import Arrivals
from engine.gpu.ffn.activations import activate_more, activation_flags, gated
from engine.model.activations import hidden_reference

# Weights that a program holds: in bfloat16, 16 KB on the way to each of several programs a core.
BLOCK_ELEMENTS = 8192

# Pieces of a sum that the last program adds side by side; fixes the order of the sum.
PIECES_AT_ONCE = 64


def ffn_reference(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    ids_TK: Tensor,
    expert_size: int,
    activation: str,
    *,
    gate_FD: Tensor | None = None,
    up_bias_F: Tensor | None = None,
    down_bias_D: Tensor | None = None,
    threshold: float = 0.0,
) -> Tensor:
    """What `ffn` computes, a token and an expert at a time, in float32 or the inputs' float64."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    y_TD = torch.zeros_like(x_TD, dtype=wide)
    if down_bias_D is not None:
        y_TD += down_bias_D.to(wide)
    for token, ids in enumerate(ids_TK.tolist()):
        for expert in ids:
            if expert >= 0:
                rows = slice(expert * expert_size, (expert + 1) * expert_size)
                gate = None if gate_FD is None else gate_FD[rows]
                bias = None if up_bias_F is None else up_bias_F[rows]
                x_1D = x_TD[token : token + 1].to(wide)
                h_1S = hidden_reference(x_1D, up_FD[rows], activation, gate, bias, threshold)
                y_TD[token] += (h_1S @ down_FD[rows].to(wide))[0]
    return y_TD.to(x_TD.dtype)


def first_product_reference(
    x_TD: Tensor,
    up_FD: Tensor,
    ids_TK: Tensor,
    expert_size: int,
    activation: str,
    *,
    norm: Norm | None = None,
    gate_FD: Tensor | None = None,
    up_bias_F: Tensor | None = None,
    threshold: float = 0.0,
) -> Tensor:
    """What `first_product` computes; unused slots hold zeros."""
    x = normed_reference(x_TD, norm)
    h_TF = hidden_reference(x, up_FD, activation, gate_FD, up_bias_F, threshold)
    h_TES = h_TF.view(x.shape[0], -1, expert_size)
    h_TKS = h_TES[torch.arange(x.shape[0], device=x.device)[:, None], ids_TK.clamp_min(0).long()]
    return h_TKS.masked_fill(ids_TK[:, :, None] < 0, 0.0).to(x_TD.dtype)


def second_product_reference(
    h_TKS: Tensor,
    down_FD: Tensor,
    ids_TK: Tensor,
    *,
    add_to: Tensor | None = None,
    down_bias_D: Tensor | None = None,
) -> Tensor:
    """What `second_product` computes."""
    wide = torch.promote_types(h_TKS.dtype, torch.float32)
    tokens, size = ids_TK.shape[0], h_TKS.shape[2]
    y_TD = torch.zeros((tokens, down_FD.shape[1]), dtype=wide, device=h_TKS.device)
    for extra in (add_to, down_bias_D):
        if extra is not None:
            y_TD += extra.to(wide)
    for token, ids in enumerate(ids_TK.tolist()):
        for slot, expert in enumerate(ids):
            if expert >= 0:
                rows_SD = down_FD[expert * size : (expert + 1) * size].to(wide)
                y_TD[token] += h_TKS[token, slot].to(wide) @ rows_SD
    return y_TD.to(h_TKS.dtype)


@jit
def _first_kernel(
    x_ptr,
    norm_ptr,
    up_ptr,
    gate_ptr,
    up_bias_ptr,
    ids_ptr,
    h_ptr,
    d_model,
    expert_size,
    max_k,
    epsilon,
    threshold,
    NORMED: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    SQUARE: tl.constexpr,
    FAT: tl.constexpr,
    BOTH: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (b, i): BLOCK_N neurons of pair i = token * max_k + slot."""
    # 1. Fetch what no kernel writes, while the kernel before still runs.
    pair = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    in_d = d < d_model
    if NORMED:
        norm = tl.load(norm_ptr + d, mask=in_d, other=0.0).to(tl.float32)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()

    # 2. Fetch the neurons' rows, all at once.
    expert = tl.load(ids_ptr + pair)
    if expert < 0:
        return
    s = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_s = s < expert_size
    neuron = expert.to(tl.int64) * expert_size + s
    rows = neuron[:, None] * d_model + d[None, :]
    in_rows = in_s[:, None] & in_d[None, :]
    up = tl.load(up_ptr + rows, mask=in_rows, other=0.0)
    if GATED:
        gate = tl.load(gate_ptr + rows, mask=in_rows, other=0.0)

    # 3. Multiply. The norm's factor is common to all inputs, so it is applied to the sums.
    x = tl.load(x_ptr + (pair // max_k) * d_model + d, mask=in_d, other=0.0).to(tl.float32)
    scaled = x * norm if NORMED else x
    factor = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / d_model + epsilon) if NORMED else 1.0
    h = tl.sum(up.to(tl.float32) * scaled[None, :], axis=1) * factor
    if BIASED:
        h += tl.load(up_bias_ptr + neuron, mask=in_s, other=0.0).to(tl.float32)
    if GATED:
        gates = tl.sum(gate.to(tl.float32) * scaled[None, :], axis=1) * factor
        h = gated(gates, h, SQUARE, FAT, BOTH, threshold)
    else:
        h = activate_more(h, SQUARE, FAT, threshold)
    tl.store(h_ptr + pair * expert_size + s, h.to(h_ptr.dtype.element_ty), mask=in_s)


@jit
def _second_kernel(
    h_ptr,
    down_ptr,
    ids_ptr,
    residual_ptr,
    down_bias_ptr,
    partial_ptr,
    arrived_ptr,
    y_ptr,
    d_model,
    expert_size,
    max_k,
    pieces_per_slot,
    ADDED: tl.constexpr,
    BIASED: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program (j, c, t): piece c of the sum of columns j of token t."""
    # 1. Fetch the activations of this piece: some neurons of one slot.
    j = tl.program_id(0)
    piece = tl.program_id(1)
    token = tl.program_id(2).to(tl.int64)
    pieces = tl.num_programs(1)
    d = j * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = d < d_model
    slot = piece // pieces_per_slot
    s = (piece % pieces_per_slot) * BLOCK_S + tl.arange(0, BLOCK_S)
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    expert = tl.load(ids_ptr + token * max_k + slot)
    h_at = h_ptr + (token * max_k + slot) * expert_size + s
    h = tl.load(h_at, mask=s < expert_size, other=0.0).to(tl.float32)
    h = tl.where(expert >= 0, h, 0.0)  # an unused slot holds anything

    # 2. Fetch the rows of the neurons that are not silent, multiply, and write the piece.
    neuron = tl.maximum(expert, 0).to(tl.int64) * expert_size + s
    down = tl.load(
        down_ptr + neuron[:, None] * d_model + d[None, :],
        mask=(h != 0.0)[:, None] & in_d[None, :],
        other=0.0,
    )
    y = tl.sum(down.to(tl.float32) * h[:, None], axis=0)
    partial_ptr += token * pieces * d_model
    tl.store(partial_ptr + piece.to(tl.int64) * d_model + d, y, mask=in_d)

    # 3. The columns' last program adds all pieces: a program's sums are written before it counts
    # itself.
    tl.debug_barrier()
    arrived_ptr += token * tl.num_programs(0) + j
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == pieces - 1:
        tl.store(arrived_ptr, 0)
        sums = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
        for start in range(0, pieces, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            sums += tl.load(
                partial_ptr + c.to(tl.int64)[:, None] * d_model + d[None, :],
                mask=(c < pieces)[:, None] & in_d[None, :],
                other=0.0,
            )
        total = tl.sum(sums, axis=0)
        if ADDED:
            total += tl.load(residual_ptr + token * d_model + d, mask=in_d, other=0.0).to(
                tl.float32
            )
        if BIASED:
            total += tl.load(down_bias_ptr + d, mask=in_d, other=0.0).to(tl.float32)
        tl.store(y_ptr + token * d_model + d, total.to(y_ptr.dtype.element_ty), mask=in_d)


def row_blocks(inputs: int) -> dict[str, int]:
    """Block sizes of a product with whole rows, 64 elements a thread."""
    block_d = next_power_of_2(inputs)
    rows = max(1, BLOCK_ELEMENTS // block_d)
    warps = min(16, max(1, rows * block_d // 2048))
    return {"BLOCK_N": rows, "BLOCK_D": block_d, "num_warps": warps}


def second_blocks(expert_size: int) -> dict[str, int]:
    """Block sizes of `_second_kernel`: few warps, for they exchange sums."""
    if expert_size >= 512:
        return {"BLOCK_S": 128, "BLOCK_D": 32, "BLOCK_C": PIECES_AT_ONCE, "num_warps": 2}
    rows = min(64, next_power_of_2(expert_size))
    return {"BLOCK_S": rows, "BLOCK_D": 32, "BLOCK_C": PIECES_AT_ONCE, "num_warps": 1}


def first_product(
    x_TD: Tensor,
    up_FD: Tensor,
    ids_TK: Tensor,
    expert_size: int,
    activation: str,
    *,
    norm: Norm | None = None,
    gate_FD: Tensor | None = None,
    up_bias_F: Tensor | None = None,
    threshold: float = 0.0,
    blocks: dict[str, int] | None = None,
) -> Tensor:
    """Activations of each token's experts, [T, K, S] in the dtype of x; unused slots unwritten.

    Args:
        x_TD: contiguous; float32, bfloat16 or float16; T >= 1.
        up_FD: [F, D], contiguous, dtype of x; expert e owns rows e*S .. (e+1)*S.
        ids_TK: int32, contiguous, the experts of each token, -1 in unused slots.
        expert_size: S.
        activation: one of MORE_ACTIVATIONS.
        norm: of x, if any.
        gate_FD: as `up_FD`, in gated models.
        up_bias_F: contiguous, any float type.
        threshold: of "fatrelu".
        blocks: block sizes, for measurements.
    """
    assert ids_TK.dtype == torch.int32
    for tensor in (x_TD, up_FD, ids_TK) if gate_FD is None else (x_TD, up_FD, ids_TK, gate_FD):
        assert tensor.is_contiguous()
    (num_tokens, max_k), d_model = ids_TK.shape, x_TD.shape[1]
    h_TKS = torch.empty((num_tokens, max_k, expert_size), dtype=x_TD.dtype, device=x_TD.device)
    blocks = blocks or row_blocks(d_model)
    # What is absent is passed as another tensor, which the kernel then never reads.
    _first_kernel[(cdiv(expert_size, blocks["BLOCK_N"]), num_tokens * max_k)](
        x_TD,
        x_TD if norm is None else norm.weight_D,
        up_FD,
        up_FD if gate_FD is None else gate_FD,
        up_FD if up_bias_F is None else up_bias_F,
        ids_TK,
        h_TKS,
        d_model,
        expert_size,
        max_k,
        0.0 if norm is None else norm.epsilon,
        threshold,
        NORMED=norm is not None,
        GATED=gate_FD is not None,
        BIASED=up_bias_F is not None,
        **activation_flags(activation),
        **blocks,
        **chain(x_TD.device),
    )
    return h_TKS


def second_product(
    h_TKS: Tensor,
    down_FD: Tensor,
    ids_TK: Tensor,
    arrivals: Arrivals,
    *,
    add_to: Tensor | None = None,
    down_bias_D: Tensor | None = None,
    blocks: dict[str, int] | None = None,
) -> Tensor:
    """The sum of each token's used slots, h @ down_e: [T, D] in the dtype of h.

    Args:
        h_TKS: of `first_product`, from the same ids.
        down_FD, ids_TK: as for `first_product`.
        arrivals: counters that no kernel of another stream uses at the same time.
        add_to: [T, D], contiguous, any float type: is added.
        down_bias_D: contiguous, any float type: is added.
        blocks: block sizes, for measurements.
    """
    assert h_TKS.is_contiguous()
    assert down_FD.is_contiguous()
    assert down_FD.dtype == h_TKS.dtype
    assert add_to is None or add_to.is_contiguous()
    (num_tokens, max_k, size), d_model = h_TKS.shape, down_FD.shape[1]
    blocks = blocks or second_blocks(size)
    columns, per_slot = cdiv(d_model, blocks["BLOCK_D"]), cdiv(size, blocks["BLOCK_S"])
    pieces = max_k * per_slot
    partial_TCD = torch.empty(
        (num_tokens, pieces, d_model), dtype=torch.float32, device=h_TKS.device
    )
    y_TD = torch.empty((num_tokens, d_model), dtype=h_TKS.dtype, device=h_TKS.device)
    _second_kernel[(columns, pieces, num_tokens)](
        h_TKS,
        down_FD,
        ids_TK,
        h_TKS if add_to is None else add_to,
        h_TKS if down_bias_D is None else down_bias_D,
        partial_TCD,
        arrivals.of("down", num_tokens * columns),
        y_TD,
        d_model,
        size,
        max_k,
        per_slot,
        ADDED=add_to is not None,
        BIASED=down_bias_D is not None,
        **blocks,
        **chain(h_TKS.device),
    )
    return y_TD


def ffn(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    ids_TK: Tensor,
    expert_size: int,
    activation: str,
    arrivals: Arrivals,
    *,
    gate_FD: Tensor | None = None,
    up_bias_F: Tensor | None = None,
    down_bias_D: Tensor | None = None,
    threshold: float = 0.0,
) -> Tensor:
    """y [T, D] of the chosen experts, summed in float32, in the dtype of x.

    Between the products, activations are rounded to the dtype of x. Arguments are those of
    `first_product` and `second_product`.
    """
    x_TD, ids_TK = x_TD.contiguous(), ids_TK.contiguous()
    h_TKS = first_product(
        x_TD,
        up_FD,
        ids_TK,
        expert_size,
        activation,
        gate_FD=gate_FD,
        up_bias_F=up_bias_F,
        threshold=threshold,
    )
    return second_product(h_TKS, down_FD, ids_TK, arrivals, down_bias_D=down_bias_D)
