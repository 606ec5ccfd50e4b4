# Triton types a kernel's arguments by itself, at each launch.
# mypy: disable-error-code="no-untyped-def"
"""The sparse FFN for many tokens: two grouped products over token-expert pairs sorted by expert.

With many tokens time is arithmetic, so pairs are taken in tiles of one expert each and multiplied
on the tensor cores. `_up_kernel` gathers the tiles' rows of x and writes act(x @ up_e.T) in the
order of the pairs; `_down_kernel` multiplies by down_e and writes each pair's result to its token's
slot; `_combine_kernel` adds a token's slots in ascending order of expert. `grouped_tma` has both
products for large prompts on newer devices. No tensor is padded, no atomic operation takes part,
and nothing waits for the device: the grid has as many tiles as the pairs could need at most, and
each program finds its expert from the offsets or returns.

Shapes: T tokens, D model, F neurons, E experts, S neurons per expert, K slots per token, P = T * K
capacity for pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.gpu._triton import INTERPRETED, cdiv, jit, next_power_of_2, tl
from engine.gpu.ffn import grouped_tma
from engine.gpu.ffn.expert_ffn import activate_more, activation_flags, gated
from engine.gpu.routing.routing import Routing
from engine.model.activations import ACTIVATIONS, hidden_reference


def grouped_ffn_reference(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    routing: Routing,
    activation: str,
    *,
    gate_FD: Tensor | None = None,
    up_bias_F: Tensor | None = None,
    down_bias_D: Tensor | None = None,
    threshold: float = 0.0,
) -> Tensor:
    """As `grouped_ffn`, expert by expert, in float32 or the inputs' float64."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    num_experts = routing.counts_E.numel()
    size = up_FD.shape[0] // num_experts
    y_TD = torch.zeros_like(x_TD, dtype=wide)
    if down_bias_D is not None:
        y_TD += down_bias_D.to(wide)
    offsets = routing.offsets_E1.tolist()
    for expert in range(num_experts):
        rows = slice(expert * size, (expert + 1) * size)
        gate = None if gate_FD is None else gate_FD[rows]
        bias = None if up_bias_F is None else up_bias_F[rows]
        tokens = routing.pair_token_P[offsets[expert] : offsets[expert + 1]].long()
        x_nD = x_TD[tokens].to(wide)
        h_nS = hidden_reference(x_nD, up_FD[rows], activation, gate, bias, threshold)
        y_TD[tokens] += h_nS @ down_FD[rows].to(wide)
    return y_TD.to(x_TD.dtype)


@jit
def _find_tile(tile, offsets_ptr, num_experts, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr):
    """The expert of a tile, the tile's first pair and the end of that expert's pairs.

    A tile past the last one has expert >= num_experts.
    """
    e = tl.arange(0, BLOCK_E)
    start = tl.load(offsets_ptr + e, mask=e < num_experts, other=0)
    end = tl.load(offsets_ptr + e + 1, mask=e < num_experts, other=0)
    tiles = (end - start + BLOCK_P - 1) // BLOCK_P
    tiles_end = tl.cumsum(tiles, axis=0)
    expert = tl.sum((tiles_end <= tile).to(tl.int32), axis=0)
    here = e == expert
    nth = tile - tl.sum(tl.where(here, tiles_end - tiles, 0), axis=0)
    first = tl.sum(tl.where(here, start, 0), axis=0) + nth * BLOCK_P
    return expert, first, tl.sum(tl.where(here, end, 0), axis=0)


@jit
def _up_kernel(
    x_ptr,
    up_ptr,
    gate_ptr,
    up_bias_ptr,
    offsets_ptr,
    pair_token_ptr,
    h_ptr,
    num_experts,
    d_model,
    expert_size,
    threshold,
    SQUARE: tl.constexpr,
    FAT: tl.constexpr,
    BOTH: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of h [P, S] = act(x[token] @ up_e.T), or gated and biased."""
    tiles_s = tl.cdiv(expert_size, BLOCK_S)
    tile = tl.program_id(0) // tiles_s
    expert, first, end = _find_tile(tile, offsets_ptr, num_experts, BLOCK_E, BLOCK_P)
    if expert >= num_experts:
        return
    p = first + tl.arange(0, BLOCK_P)
    s = (tl.program_id(0) % tiles_s) * BLOCK_S + tl.arange(0, BLOCK_S)
    # Rows past the expert's pairs read token 0; nothing of them is stored.
    token = tl.load(pair_token_ptr + p, mask=p < end, other=0).to(tl.int64)
    x_rows = x_ptr + token[:, None] * d_model
    neuron = expert.to(tl.int64) * expert_size + s
    up_rows = up_ptr + neuron[:, None] * d_model
    gate_rows = gate_ptr + neuron[:, None] * d_model
    acc = tl.zeros((BLOCK_P, BLOCK_S), tl.float32)
    if GATED:
        gates = tl.zeros((BLOCK_P, BLOCK_S), tl.float32)
    for start in range(0, d_model, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        x = tl.load(x_rows + d, mask=d < d_model, other=0.0)
        up = tl.load(up_rows + d, mask=(s < expert_size)[:, None] & (d < d_model), other=0.0)
        if WIDEN:
            x, up = x.to(tl.float32), up.to(tl.float32)
        acc = tl.dot(x, tl.trans(up), acc, input_precision="ieee")
        if GATED:
            gate = tl.load(
                gate_rows + d, mask=(s < expert_size)[:, None] & (d < d_model), other=0.0
            )
            if WIDEN:
                gate = gate.to(tl.float32)
            gates = tl.dot(x, tl.trans(gate), gates, input_precision="ieee")
    if BIASED:
        bias = tl.load(up_bias_ptr + neuron, mask=s < expert_size, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if GATED:
        acc = gated(gates, acc, SQUARE, FAT, BOTH, threshold)
    else:
        acc = activate_more(acc, SQUARE, FAT, threshold)
    h = acc.to(h_ptr.dtype.element_ty)
    at = h_ptr + p.to(tl.int64)[:, None] * expert_size + s[None, :]
    tl.store(at, h, mask=(p < end)[:, None] & (s < expert_size)[None, :])


@jit
def _down_kernel(
    h_ptr,
    down_ptr,
    offsets_ptr,
    pair_token_ptr,
    ids_ptr,
    slots_ptr,
    num_experts,
    d_model,
    expert_size,
    max_k,
    WIDEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of h @ down_e, each pair's row written to its token's slot in slots [T, K, D]."""
    tiles_d = tl.cdiv(d_model, BLOCK_D)
    tile = tl.program_id(0) // tiles_d
    expert, first, end = _find_tile(tile, offsets_ptr, num_experts, BLOCK_E, BLOCK_P)
    if expert >= num_experts:
        return
    p = first + tl.arange(0, BLOCK_P)
    d = (tl.program_id(0) % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_p, in_d = (p < end)[:, None], (d < d_model)[None, :]
    h_rows = h_ptr + p.to(tl.int64)[:, None] * expert_size
    down_tile = down_ptr + expert.to(tl.int64) * expert_size * d_model + d[None, :]
    acc = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for start in range(0, expert_size, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        in_s = s < expert_size
        h = tl.load(h_rows + s[None, :], mask=in_p & in_s[None, :], other=0.0)
        down = tl.load(
            down_tile + s.to(tl.int64)[:, None] * d_model, mask=in_s[:, None] & in_d, other=0.0
        )
        if WIDEN:
            h, down = h.to(tl.float32), down.to(tl.float32)
        acc = tl.dot(h, down, acc, input_precision="ieee")

    token = tl.load(pair_token_ptr + p, mask=p < end, other=0).to(tl.int64)
    slot = tl.zeros((BLOCK_P,), tl.int32)
    for start in range(0, max_k, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        ids = tl.load(ids_ptr + token[:, None] * max_k + k, mask=in_p & (k < max_k), other=-1)
        slot += tl.sum(((ids >= 0) & (ids < expert)).to(tl.int32), axis=1)
    at = slots_ptr + (token * max_k + slot)[:, None] * d_model + d[None, :]
    tl.store(at, acc.to(slots_ptr.dtype.element_ty), mask=in_p & in_d)


@jit
def _combine_kernel(
    slots_ptr,
    ids_ptr,
    down_bias_ptr,
    y_ptr,
    d_model,
    max_k,
    BIASED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (t, j): columns j of token t, the sum of its used slots."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    y = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for start in range(0, max_k, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        used = tl.load(ids_ptr + token * max_k + k, mask=k < max_k, other=-1) >= 0
        at = slots_ptr + (token * max_k + k)[:, None] * d_model + d[None, :]
        y += tl.load(at, mask=used[:, None] & (d < d_model)[None, :], other=0.0).to(tl.float32)
    total = tl.sum(y, axis=0)
    if BIASED:
        total += tl.load(down_bias_ptr + d, mask=d < d_model, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * d_model + d, total.to(y_ptr.dtype.element_ty), mask=d < d_model)


def tile(*sizes: int) -> dict[str, int]:
    """Block sizes of a product: pairs, neurons, columns, then warps and stages."""
    names = ("BLOCK_P", "BLOCK_S", "BLOCK_D", "num_warps", "num_stages")
    return dict(zip(names, sizes, strict=True))


def up_blocks(
    mean_pairs: int, expert_size: int, itemsize: int, *, gated: bool = False
) -> dict[str, int]:
    """Block sizes of `_up_kernel` for this many pairs an expert; BLOCK_D is the sum's step.

    Few pairs are bound by memory and want many small tiles in flight, many pairs want large ones.
    """
    wide = itemsize // 2  # float32 takes half the step in the same shared memory
    if mean_pairs <= 16:
        return tile(16, 64, 128 // wide, 4, 4)
    if mean_pairs <= 32:
        return tile(32, 64, 128 // wide, 4, 4)
    if gated:  # two sums in registers
        return tile(64, 64 if itemsize > 2 else 128, 64 // wide, 8, 3)
    if itemsize == 2 and expert_size >= 512 and mean_pairs <= 128:
        return tile(64, 256, 64, 8, 3)
    if mean_pairs <= 128 or expert_size < 256 or itemsize > 2:
        return tile(64, 128, 64 // wide, 4, 4)
    return tile(128, 256, 64, 8, 3)


def down_blocks(mean_pairs: int) -> dict[str, int]:
    """Block sizes of `_down_kernel`; BLOCK_S is the sum's step, short as the sum itself is."""
    block_p = 16 if mean_pairs <= 16 else 32 if mean_pairs <= 32 else 64
    if 64 < mean_pairs <= 128:
        block_p = 128
    return {**tile(block_p, 32, 128, 4, 4), "BLOCK_K": 8}


def combine_blocks(d_model: int) -> dict[str, int]:
    """Block sizes of `_combine_kernel`: one warp adds whole columns, none exchanged."""
    return {"BLOCK_K": 8, "BLOCK_D": min(256, next_power_of_2(d_model)), "num_warps": 1}


def _most_tiles(capacity: int, num_experts: int, block_p: int) -> int:
    """Tiles that the pairs can need: each expert's last may be partly empty, none is all empty."""
    return min(cdiv(capacity, block_p) + num_experts, capacity)


def up_product(
    x_TD: Tensor,
    up_FD: Tensor,
    routing: Routing,
    activation: str,
    gate_FD: Tensor | None = None,
    up_bias_F: Tensor | None = None,
    threshold: float = 0.0,
    blocks: dict[str, int] | None = None,
) -> Tensor:
    """The activations of every pair: [P, S]; rows past the last pair are not written."""
    d_model, max_k, num_experts = x_TD.shape[1], routing.ids_TK.shape[1], routing.counts_E.numel()
    expert_size, capacity = up_FD.shape[0] // num_experts, x_TD.shape[0] * max_k
    pairs = cdiv(capacity, num_experts)
    blocks = blocks or up_blocks(pairs, expert_size, x_TD.element_size(), gated=gate_FD is not None)
    tiles = _most_tiles(capacity, num_experts, blocks["BLOCK_P"])
    h_PS = x_TD.new_empty((capacity, expert_size))
    # What is absent is passed as another tensor, which the kernel then never reads.
    _up_kernel[(tiles * cdiv(expert_size, blocks["BLOCK_S"]),)](
        x_TD,
        up_FD,
        up_FD if gate_FD is None else gate_FD,
        up_FD if up_bias_F is None else up_bias_F,
        routing.offsets_E1,
        routing.pair_token_P,
        h_PS,
        num_experts,
        d_model,
        expert_size,
        threshold,
        **activation_flags(activation),
        GATED=gate_FD is not None,
        BIASED=up_bias_F is not None,
        WIDEN=INTERPRETED,
        BLOCK_E=next_power_of_2(num_experts),
        **blocks,
    )
    return h_PS


def down_product(
    h_PS: Tensor, down_FD: Tensor, routing: Routing, blocks: dict[str, int] | None = None
) -> Tensor:
    """h @ down_e of every pair, in its token's slot: [T, K, D]; unused slots are not written."""
    (num_tokens, max_k), num_experts = routing.ids_TK.shape, routing.counts_E.numel()
    (capacity, expert_size), d_model = h_PS.shape, down_FD.shape[1]
    blocks = blocks or down_blocks(cdiv(capacity, num_experts))
    tiles = _most_tiles(capacity, num_experts, blocks["BLOCK_P"])
    slots_TKD = h_PS.new_empty((num_tokens, max_k, d_model))
    _down_kernel[(tiles * cdiv(d_model, blocks["BLOCK_D"]),)](
        h_PS,
        down_FD,
        routing.offsets_E1,
        routing.pair_token_P,
        routing.ids_TK,
        slots_TKD,
        num_experts,
        d_model,
        expert_size,
        max_k,
        WIDEN=INTERPRETED,
        BLOCK_E=next_power_of_2(num_experts),
        **blocks,
    )
    return slots_TKD


def combine(
    slots_TKD: Tensor,
    ids_TK: Tensor,
    down_bias_D: Tensor | None = None,
    blocks: dict[str, int] | None = None,
) -> Tensor:
    """The sum of each token's used slots, ascending, in float32: [T, D], dtype of the slots."""
    num_tokens, max_k, d_model = slots_TKD.shape
    y_TD = slots_TKD.new_empty((num_tokens, d_model))
    blocks = blocks or combine_blocks(d_model)
    _combine_kernel[(num_tokens, cdiv(d_model, blocks["BLOCK_D"]))](
        slots_TKD,
        ids_TK,
        y_TD if down_bias_D is None else down_bias_D,
        y_TD,
        d_model,
        max_k,
        BIASED=down_bias_D is not None,
        **blocks,
    )
    return y_TD


def grouped_ffn(
    x_TD: Tensor,
    up_FD: Tensor,
    down_FD: Tensor,
    routing: Routing,
    activation: str,
    *,
    gate_FD: Tensor | None = None,
    up_bias_F: Tensor | None = None,
    down_bias_D: Tensor | None = None,
    threshold: float = 0.0,
) -> Tensor:
    """y [T, D] of the chosen experts, accumulated in float32, in the dtype of x; no gradients.

    Between the products, activations and each pair's result are rounded to the dtype of x. Scratch
    memory is T * K * (S + D) elements, so a batch whose tokens use every expert is better served by
    the dense FFN, which is the same function.

    Args:
        x_TD: [T, D], float32, bfloat16 or float16; T >= 1.
        up_FD, down_FD: [F, D], contiguous, dtype of x; expert e owns rows e*S .. (e+1)*S.
        routing: from `routing.route`, of the same tokens.
        activation: one of MORE_ACTIVATIONS.
        gate_FD: as `up_FD`, in gated models; see `expert_ffn` for the formula.
        up_bias_F, down_bias_D: contiguous, any float type.
        threshold: of "fatrelu".
    """
    assert up_FD.is_contiguous()
    assert down_FD.is_contiguous()
    assert gate_FD is None or gate_FD.is_contiguous()
    x_TD = x_TD.contiguous()
    num_experts, max_k = routing.counts_E.numel(), routing.ids_TK.shape[1]
    plain = gate_FD is None and up_bias_F is None and activation in ACTIVATIONS
    if plain and grouped_tma.serves(x_TD, up_FD.shape[0] // num_experts, max_k, num_experts):
        h_PS, slot_P = grouped_tma.up_product(x_TD, up_FD, routing, activation)
        slots_TKD = grouped_tma.down_product(h_PS, slot_P, down_FD, routing)
        return combine(slots_TKD, routing.ids_TK, down_bias_D)
    h_PS = up_product(x_TD, up_FD, routing, activation, gate_FD, up_bias_F, threshold)
    return combine(down_product(h_PS, down_FD, routing), routing.ids_TK, down_bias_D)
