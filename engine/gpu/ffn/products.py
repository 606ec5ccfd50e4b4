"""Products over pairs of a token and an expert, sorted by expert: the parts of the sparse FFN.

    gather   z_p = x[token of p] @ w_e.T        first product, and the gradient of the hidden rows
    spread   y_t = sum of h_p @ w_e, p of t     second product, and the gradient of the input
    weights  g_e = sum of h_p (x) x[token of p] gradients of both matrices

With many tokens time is arithmetic, so pairs are taken in tiles of one expert each and multiplied
on the tensor cores. `gather` fetches the rows of x that a tile's pairs name, and writes its result
in the order of the pairs; `spread` writes each pair's result to a slot of the pair's token, and
`combine` then adds a token's slots in ascending order of expert. No tensor is padded, no atomic
operation takes part, so every run gives the same bits, and nothing waits for the device: a launch
has as many programs as the pairs could need at most.

Serving and training take the same kernels, and differ in what suits them:

- *Which tile is a program's?* In serving a launch more costs as much as a product of few tokens, so
  a program finds its tile from the offsets, expert after expert. In training the tokens exceed the
  cache: `list_tiles` writes down an order in which programs in flight work on the same tokens for
  all experts, so that a row of x that one expert fetched from memory, the others find in the cache.
  All products of a layer use that list.
- *Who fetches?* On Hopper, with large prompts, the tensor memory accelerator (TMA) fetches weights:
  one thread asks for a whole tile, and no warp spends instructions on copies. Then the programs of
  `spread` are as many as the multiprocessors and walk over the tiles, so that the next tile's loads
  run beside the last one's stores.
- *How exactly?* Float32 is multiplied exactly in serving, and as three TF32 products in training.

Shapes: T tokens, D model, F neurons, E experts, S neurons per expert, K slots per token, P = T * K
capacity for pairs, N tiles of pairs.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from engine.gpu._triton import INTERPRETED, TensorDescriptor, cdiv, jit, next_power_of_2, tl
from engine.gpu.ffn import product_blocks as sizes
from engine.gpu.ffn.activations import activate_more, activation_flags, gated
from engine.gpu.ffn.product_blocks import TILE_PAIRS, Blocks
from engine.gpu.routing.pairs import SortedPairs

# Bytes to which rows must be aligned for TMA.
ALIGNED = 16


class Pairs(NamedTuple):
    """What the products have to know of `SortedPairs`, and perhaps the order of their tiles.

    Attributes:
        ids_TK, offsets_E1, pair_token_P, pair_slot_P: as in `SortedPairs`.
        tiles_N2: int32 [N, 2], from `list_tiles`, for training; None in serving, where each program
            finds its tile.
    """

    ids_TK: Tensor
    offsets_E1: Tensor
    pair_token_P: Tensor
    pair_slot_P: Tensor
    tiles_N2: Tensor | None = None

    @classmethod
    def of(cls, pairs: SortedPairs) -> Self:
        """For serving."""
        return cls(pairs.ids_TK, pairs.offsets_E1, pairs.pair_token_P, pairs.pair_slot_P)

    @property
    def num_experts(self) -> int:
        return self.offsets_E1.numel() - 1

    @property
    def mean_pairs(self) -> int:
        """Pairs of an expert, if every slot is used."""
        return cdiv(self.ids_TK.numel(), self.num_experts)

    def num_tiles(self, block_p: int) -> int:
        """Tiles that the pairs can need: each expert's last may be partly empty, none is empty."""
        if self.tiles_N2 is not None:
            return self.tiles_N2.shape[0]
        capacity = self.ids_TK.numel()
        return min(cdiv(capacity, block_p) + self.num_experts, capacity)

    def order(self) -> dict[str, Any]:
        """The arguments by which kernels find their tiles."""
        return {
            "tiles_ptr": self.offsets_E1 if self.tiles_N2 is None else self.tiles_N2,
            "offsets_ptr": self.offsets_E1,
            "num_experts": self.num_experts,
            "LISTED": self.tiles_N2 is not None,
            "BLOCK_E": next_power_of_2(self.num_experts),
        }


# --- the order of tiles --------------------------------------------------------------------------


@jit
def _list_tiles_kernel(
    offsets_ptr,
    tiles_ptr,
    num_experts,
    num_tiles,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Program e: the tiles of expert e, and its part of the unused tail.

    All experts' first tiles come first, then all second ones: pairs of an expert are sorted by
    token, so that neighbours in this order share tokens.
    """
    # 1. Count the tiles of every expert.
    expert = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    start = tl.load(offsets_ptr + e, mask=e < num_experts, other=0)
    end = tl.load(offsets_ptr + e + 1, mask=e < num_experts, other=0)
    tiles = (end - start + BLOCK_P - 1) // BLOCK_P
    first = tl.sum(tl.where(e == expert, start, 0), axis=0)
    mine = tl.sum(tl.where(e == expert, tiles, 0), axis=0)

    # 2. Before this expert's nth tile stand the first n tiles of every expert, and the nth ones of
    # experts with a lower index.
    for begin in range(0, mine, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        same_n = (e < expert)[None, :] & (tiles[None, :] > n[:, None])
        at = 2 * tl.sum(tl.minimum(tiles[None, :], n[:, None]) + same_n.to(tl.int32), axis=1)
        tl.store(tiles_ptr + at, tl.zeros_like(n) + expert, mask=n < mine)
        tl.store(tiles_ptr + at + 1, first + n * BLOCK_P, mask=n < mine)

    # 3. Rows that no tile needs belong to expert -1.
    total = tl.sum(tiles, axis=0)
    for begin in range(total + expert * BLOCK_N, num_tiles, num_experts * BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        tl.store(tiles_ptr + 2 * n, tl.full((BLOCK_N,), -1, tl.int32), mask=n < num_tiles)
        tl.store(tiles_ptr + 2 * n + 1, tl.full((BLOCK_N,), 0, tl.int32), mask=n < num_tiles)


@jit
def _tile_ends(offsets_ptr, num_experts, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr):
    """Of every expert: its index, first pair, end of pairs, tiles, and the end of its tiles."""
    e = tl.arange(0, BLOCK_E)
    start = tl.load(offsets_ptr + e, mask=e < num_experts, other=0)
    end = tl.load(offsets_ptr + e + 1, mask=e < num_experts, other=0)
    tiles = (end - start + BLOCK_P - 1) // BLOCK_P
    return e, start, end, tiles, tl.cumsum(tiles, axis=0)


@jit
def _count_tiles(offsets_ptr, num_experts, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr):
    """Tiles of all experts, which stand expert after expert."""
    _, _, _, tiles, _ = _tile_ends(offsets_ptr, num_experts, BLOCK_E, BLOCK_P)
    return tl.sum(tiles, axis=0)


@jit
def _find_tile(
    tile,
    tiles_ptr,
    offsets_ptr,
    num_experts,
    LISTED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The expert of a tile, the tile's first pair and the end of that expert's pairs.

    A tile past the last one has an expert that does not exist: -1 or `num_experts`.
    """
    if LISTED:
        expert = tl.load(tiles_ptr + 2 * tile)
        first = tl.load(tiles_ptr + 2 * tile + 1)
        end_of_pairs = tl.load(offsets_ptr + expert + 1)
    else:
        e, start, end, tiles, tiles_end = _tile_ends(offsets_ptr, num_experts, BLOCK_E, BLOCK_P)
        expert = tl.sum((tiles_end <= tile).to(tl.int32), axis=0)
        here = e == expert
        nth = tile - tl.sum(tl.where(here, tiles_end - tiles, 0), axis=0)
        first = tl.sum(tl.where(here, start, 0), axis=0) + nth * BLOCK_P
        end_of_pairs = tl.sum(tl.where(here, end, 0), axis=0)
    return expert, first, end_of_pairs


# --- the products --------------------------------------------------------------------------------


@jit
def _gather_kernel(
    x_ptr,
    w,
    gate_ptr,
    up_bias_ptr,
    h_ptr,
    out_ptr,
    tiles_ptr,
    offsets_ptr,
    pair_token_ptr,
    num_experts,
    d_model,
    expert_size,
    threshold,
    LISTED: tl.constexpr,
    TMA: tl.constexpr,
    SQUARE: tl.constexpr,
    FAT: tl.constexpr,
    BOTH: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    BACKWARD: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of act(x[token] @ w_e.T), or of (x[token] @ w_e.T) * act' where `BACKWARD`.

    `w` is a descriptor of the weights where `TMA`, else a pointer to them.
    """
    # 1. Find the tile: BLOCK_P pairs of an expert, and BLOCK_S of its neurons.
    tiles_s = tl.cdiv(expert_size, BLOCK_S)
    tile = tl.program_id(0) // tiles_s
    expert, first, end = _find_tile(
        tile, tiles_ptr, offsets_ptr, num_experts, LISTED, BLOCK_E, BLOCK_P
    )
    if (expert < 0) | (expert >= num_experts):
        return
    p = first + tl.arange(0, BLOCK_P)
    in_p = p < end
    s_first = (tl.program_id(0) % tiles_s) * BLOCK_S
    s = s_first + tl.arange(0, BLOCK_S)
    in_s = s < expert_size

    # 2. Find the rows. Those past the expert's pairs read token 0, if anything; nothing of them is
    # stored.
    token = tl.load(pair_token_ptr + p, mask=in_p, other=0).to(tl.int64)
    x_rows = x_ptr + token[:, None] * d_model
    neuron = expert.to(tl.int64) * expert_size + s
    acc = tl.zeros((BLOCK_P, BLOCK_S), tl.float32)
    if GATED:
        gates = tl.zeros((BLOCK_P, BLOCK_S), tl.float32)

    # 3. Multiply, BLOCK_D inputs a step. TMA reads past the expert's neurons too, into the next
    # expert's; these columns are not stored either.
    for d_first in range(0, d_model, BLOCK_D):
        d = d_first + tl.arange(0, BLOCK_D)[None, :]
        if TMA:
            x = tl.load(x_rows + d, mask=in_p[:, None] & (d < d_model), other=0.0)
            up = w.load([expert * expert_size + s_first, d_first])
        else:
            x = tl.load(x_rows + d, mask=d < d_model, other=0.0)
            up_at = w + neuron[:, None] * d_model + d
            up = tl.load(up_at, mask=in_s[:, None] & (d < d_model), other=0.0)
        if WIDEN:
            x, up = x.to(tl.float32), up.to(tl.float32)
        acc = tl.dot(x, tl.trans(up), acc, input_precision=PRECISION)
        if GATED:
            gate_at = gate_ptr + neuron[:, None] * d_model + d
            gate = tl.load(gate_at, mask=in_s[:, None] & (d < d_model), other=0.0)
            if WIDEN:
                gate = gate.to(tl.float32)
            gates = tl.dot(x, tl.trans(gate), gates, input_precision=PRECISION)

    # 4. Activate, or multiply by the activation's slope. Both of ACTIVATIONS tell their slope from
    # their value h: 1 where ReLU is positive, 2 sqrt(h) for its square.
    at = p.to(tl.int64)[:, None] * expert_size + s[None, :]
    inside = in_p[:, None] & in_s[None, :]
    if BIASED:
        bias = tl.load(up_bias_ptr + neuron, mask=in_s, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if BACKWARD:
        h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if SQUARE:
            acc *= 2.0 * tl.sqrt(h)
        else:
            acc = tl.where(h <= 0.0, 0.0, acc)
    elif GATED:
        acc = gated(gates, acc, SQUARE, FAT, BOTH, threshold)
    else:
        acc = activate_more(acc, SQUARE, FAT, threshold)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _multiply_by_tma(
    h,
    w,
    first,
    row,
    d_first,
    expert_size,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """h @ w_e for the pairs from `first` and the columns from `d_first`, through descriptors."""
    acc = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for s_first in range(0, expert_size, BLOCK_S):
        h_tile = h.load([first, s_first])
        w_tile = w.load([row + s_first, d_first])
        if WIDEN:
            h_tile, w_tile = h_tile.to(tl.float32), w_tile.to(tl.float32)
        acc = tl.dot(h_tile, w_tile, acc, input_precision=PRECISION)
    return acc


@jit
def _multiply(
    h_rows,
    w_columns,
    in_p,
    in_d,
    d_model,
    expert_size,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """h @ w_e for the rows and columns that the pointers begin, BLOCK_S neurons a step."""
    acc = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for s_first in range(0, expert_size, BLOCK_S):
        s = s_first + tl.arange(0, BLOCK_S)
        in_s = s < expert_size
        h = tl.load(h_rows + s[None, :], mask=in_p & in_s[None, :], other=0.0)
        w_at = w_columns + s.to(tl.int64)[:, None] * d_model
        w = tl.load(w_at, mask=in_s[:, None] & in_d, other=0.0)
        if WIDEN:
            h, w = h.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(h, w, acc, input_precision=PRECISION)
    return acc


@jit
def _spread_kernel(
    h,
    w,
    slots_ptr,
    tiles_ptr,
    offsets_ptr,
    pair_slot_ptr,
    num_experts,
    d_model,
    expert_size,
    columns,
    LISTED: tl.constexpr,
    WALKS: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Tiles of h @ w_e, each pair's row written to its token's slot in slots [T * K, D].

    A program takes `columns` columns of one tile of pairs: BLOCK_D unless `LISTED`. `WHOLE` says
    that BLOCK_S covers the expert. Where it `WALKS`, h and w are descriptors, to be fetched by TMA,
    and a program takes BLOCK_D columns of one tile after another. BLOCK_S then divides the expert's
    size, because a step past it would multiply the next expert's weights.
    """
    parts = tl.cdiv(d_model, columns)
    if WALKS:
        # Flattening makes one loop of the tiles and of the steps of their sums. So the next
        # tile's loads are on their way when the last one's sum is stored. A tile's last rows may be
        # those of the next expert's pairs; they are not stored.
        work = _count_tiles(offsets_ptr, num_experts, BLOCK_E, BLOCK_P) * parts
        for item in tl.range(tl.program_id(0), work, tl.num_programs(0), flatten=True):
            expert, first, end = _find_tile(
                item // parts, tiles_ptr, offsets_ptr, num_experts, LISTED, BLOCK_E, BLOCK_P
            )
            p = first + tl.arange(0, BLOCK_P)
            slot = tl.load(pair_slot_ptr + p, mask=p < end, other=0).to(tl.int64)
            d_first = (item % parts) * BLOCK_D
            row = expert * expert_size
            acc = _multiply_by_tma(
                h, w, first, row, d_first, expert_size, WIDEN, PRECISION, BLOCK_P, BLOCK_S, BLOCK_D
            )
            d = d_first + tl.arange(0, BLOCK_D)[None, :]
            at = slots_ptr + slot[:, None] * d_model + d
            inside = (p < end)[:, None] & (d < d_model)
            tl.store(at, acc.to(slots_ptr.dtype.element_ty), mask=inside)
    else:
        # 1. Find the tile and its pairs.
        expert, first, end = _find_tile(
            tl.program_id(0) // parts,
            tiles_ptr,
            offsets_ptr,
            num_experts,
            LISTED,
            BLOCK_E,
            BLOCK_P,
        )
        if (expert < 0) | (expert >= num_experts):
            return
        p = first + tl.arange(0, BLOCK_P)
        in_p = (p < end)[:, None]
        h_rows = h + p.to(tl.int64)[:, None] * expert_size
        w_rows = w + expert.to(tl.int64) * expert_size * d_model
        d_begin = (tl.program_id(0) % parts) * columns
        if not LISTED:
            # 2. In serving a program has one block of columns. It looks its slots up when the
            # product is done: until then they would take registers.
            d = d_begin + tl.arange(0, BLOCK_D)[None, :]
            in_d = d < d_model
            acc = _multiply(
                h_rows,
                w_rows + d,
                in_p,
                in_d,
                d_model,
                expert_size,
                WIDEN,
                PRECISION,
                BLOCK_P,
                BLOCK_S,
                BLOCK_D,
            )
            slot = tl.load(pair_slot_ptr + p, mask=p < end, other=0).to(tl.int64)
            at = slots_ptr + slot[:, None] * d_model + d
            tl.store(at, acc.to(slots_ptr.dtype.element_ty), mask=in_p & in_d)
        else:
            # 3. In training it has many columns: slots, and all of h if it fits, are read once.
            slot = tl.load(pair_slot_ptr + p, mask=p < end, other=0).to(tl.int64)
            slot_rows = slots_ptr + slot[:, None] * d_model
            s = tl.arange(0, BLOCK_S)
            in_s = s < expert_size
            if WHOLE:
                h_tile = tl.load(h_rows + s[None, :], mask=in_p & in_s[None, :], other=0.0)
                if WIDEN:
                    h_tile = h_tile.to(tl.float32)
            for d_first in range(d_begin, tl.minimum(d_begin + columns, d_model), BLOCK_D):
                d = d_first + tl.arange(0, BLOCK_D)[None, :]
                in_d = d < d_model
                if WHOLE:
                    w_at = w_rows + s[:, None] * d_model + d
                    w_tile = tl.load(w_at, mask=in_s[:, None] & in_d, other=0.0)
                    if WIDEN:
                        w_tile = w_tile.to(tl.float32)
                    acc = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
                    acc = tl.dot(h_tile, w_tile, acc, input_precision=PRECISION)
                else:
                    acc = _multiply(
                        h_rows,
                        w_rows + d,
                        in_p,
                        in_d,
                        d_model,
                        expert_size,
                        WIDEN,
                        PRECISION,
                        BLOCK_P,
                        BLOCK_S,
                        BLOCK_D,
                    )
                tl.store(slot_rows + d, acc.to(slots_ptr.dtype.element_ty), mask=in_p & in_d)


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


@jit
def _weights_kernel(
    h_ptr,
    x_ptr,
    out_ptr,
    offsets_ptr,
    pair_token_ptr,
    num_experts,
    d_model,
    expert_size,
    splits,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of out [splits, F, D]: h_p (x) x[token of p], summed over a part of e's pairs."""
    # 1. Find the tile: BLOCK_S neurons of an expert, BLOCK_D inputs, and a part of the pairs.
    # Experts vary faster than parts, so that programs in flight share tokens.
    tiles_d = tl.cdiv(d_model, BLOCK_D)
    tiles_s = tl.cdiv(expert_size, BLOCK_S)
    program = tl.program_id(0)
    d = (program % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    s = (program // tiles_d % tiles_s) * BLOCK_S + tl.arange(0, BLOCK_S)
    part_expert = program // (tiles_d * tiles_s)
    expert = part_expert % num_experts
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    length = tl.cdiv(end - start, splits)
    first = start + (part_expert // num_experts) * length
    last = tl.minimum(first + length, end)
    in_d, in_s = (d < d_model)[None, :], (s < expert_size)[None, :]

    # 2. Sum over the pairs. The sum is held transposed, so that the side of 64 rows or more that
    # tensor cores want is never the expert's.
    acc = tl.zeros((BLOCK_D, BLOCK_S), tl.float32)
    for begin in range(first, last, BLOCK_P):
        p = begin + tl.arange(0, BLOCK_P)
        in_p = (p < last)[:, None]
        token = tl.load(pair_token_ptr + p, mask=p < last, other=0).to(tl.int64)
        x = tl.load(x_ptr + token[:, None] * d_model + d[None, :], mask=in_p & in_d, other=0.0)
        h_rows = h_ptr + p.to(tl.int64)[:, None] * expert_size
        h = tl.load(h_rows + s[None, :], mask=in_p & in_s, other=0.0)
        if WIDEN:
            x, h = x.to(tl.float32), h.to(tl.float32)
        acc = tl.dot(tl.trans(x), h, acc, input_precision=PRECISION)

    # 3. Store it as the weights lie.
    at = out_ptr + (part_expert.to(tl.int64) * expert_size + s)[:, None] * d_model + d[None, :]
    inside = (s < expert_size)[:, None] & in_d
    tl.store(at, tl.trans(acc).to(out_ptr.dtype.element_ty), mask=inside)


# --- launchers -----------------------------------------------------------------------------------


def _precision(dtype: torch.dtype, pairs: Pairs) -> str:
    """How `tl.dot` multiplies: three TF32 products carry float32's precision on tensor cores."""
    return "tf32x3" if dtype == torch.float32 and pairs.tiles_N2 is not None else "ieee"


@functools.lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has; 0 where it has no TMA."""
    if INTERPRETED:
        return 2
    properties = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count) if properties.major >= 9 else 0


def supports_tma(x_TD: Tensor, expert_size: int) -> bool:
    """Whether TMA can fetch weights of this type and shape, on this device."""
    return (
        x_TD.dtype in (torch.bfloat16, torch.float16)
        and x_TD.shape[1] * x_TD.element_size() % ALIGNED == 0
        and expert_size % 16 == 0
        and _multiprocessors(x_TD.device) > 0
    )


def num_listed_tiles(capacity: int, num_experts: int) -> int:
    """Tiles that the pairs can need in training: each expert's last may be partly empty."""
    return cdiv(capacity, TILE_PAIRS) + num_experts


def list_tiles(offsets_E1: Tensor, capacity: int) -> Tensor:
    """The tiles of all experts in the order in which training takes them: int32 [N, 2].

    Each has its expert and its first pair; unused rows, which come last, have expert -1.
    """
    num_experts = offsets_E1.numel() - 1
    tiles_N2 = offsets_E1.new_empty((num_listed_tiles(capacity, num_experts), 2))
    _list_tiles_kernel[(num_experts,)](
        offsets_E1, tiles_N2, num_experts, tiles_N2.shape[0], **sizes.list_tiles_blocks(num_experts)
    )
    return tiles_N2


def gather(
    x_TD: Tensor,
    w_FD: Tensor,
    pairs: Pairs,
    activation: str,
    *,
    h_PS: Tensor | None = None,
    gate_FD: Tensor | None = None,
    up_bias_F: Tensor | None = None,
    threshold: float = 0.0,
    tma: bool = False,
    blocks: Blocks | None = None,
) -> Tensor:
    """act(x[token] @ w_e.T) of every pair, [P, S]; given h_PS, (x[token] @ w_e.T) * act' instead.

    Args:
        x_TD: [T, D], contiguous.
        w_FD: [F, D], contiguous, dtype of x; expert e owns rows e*S .. (e+1)*S.
        pairs: of the same tokens and experts.
        activation: one of MORE_ACTIVATIONS; of ACTIVATIONS where h_PS is given.
        h_PS: what this returned in the forward pass; the activation's slope is read off it.
        gate_FD: [F, D], contiguous, dtype of x, in gated models.
        up_bias_F: contiguous, any float type.
        threshold: of "fatrelu".
        tma: fetch weights by TMA; only where `supports_tma`, and without a gate.
        blocks: block sizes, for measurements.

    Rows past the last pair are left as they were allocated.
    """
    d_model, expert_size = x_TD.shape[1], w_FD.shape[0] // pairs.num_experts
    itemsize, mean_pairs = x_TD.element_size(), pairs.mean_pairs
    if blocks is None and pairs.tiles_N2 is not None:
        blocks = sizes.listed_gather_blocks(expert_size, itemsize, backward=h_PS is not None)
    elif blocks is None and tma:
        blocks = sizes.tma_gather_blocks(mean_pairs, expert_size)
    elif blocks is None:
        blocks = sizes.gather_blocks(mean_pairs, expert_size, itemsize, gated=gate_FD is not None)
    assert not (tma and gate_FD is not None)
    w = TensorDescriptor.from_tensor(w_FD, [blocks["BLOCK_S"], blocks["BLOCK_D"]]) if tma else w_FD
    out_PS = x_TD.new_empty((pairs.ids_TK.numel(), expert_size))
    programs = pairs.num_tiles(blocks["BLOCK_P"]) * cdiv(expert_size, blocks["BLOCK_S"])
    # What is absent is passed as another tensor, which the kernel then never reads.
    _gather_kernel[(programs,)](
        x_TD,
        w,
        w_FD if gate_FD is None else gate_FD,
        w_FD if up_bias_F is None else up_bias_F,
        out_PS if h_PS is None else h_PS,
        out_PS,
        pair_token_ptr=pairs.pair_token_P,
        d_model=d_model,
        expert_size=expert_size,
        threshold=threshold,
        TMA=tma,
        **activation_flags(activation),
        GATED=gate_FD is not None,
        BIASED=up_bias_F is not None,
        BACKWARD=h_PS is not None,
        WIDEN=INTERPRETED,
        PRECISION=_precision(x_TD.dtype, pairs),
        **pairs.order(),
        **blocks,
    )
    return out_PS


def spread_to_slots(
    h_PS: Tensor,
    w_FD: Tensor,
    pairs: Pairs,
    *,
    tma: bool = False,
    blocks: Blocks | None = None,
) -> Tensor:
    """h @ w_e of every pair, in its token's slot: [T, K, D]; unused slots are not written.

    Args:
        h_PS: [P, S], contiguous.
        w_FD: [F, D], contiguous, dtype of h.
        pairs: of the same tokens and experts.
        tma: fetch both by TMA; only where `supports_tma`.
        blocks: block sizes, for measurements.
    """
    (num_tokens, max_k), d_model = pairs.ids_TK.shape, w_FD.shape[1]
    expert_size = h_PS.shape[1]
    if blocks is None and pairs.tiles_N2 is not None:
        blocks = sizes.listed_spread_blocks(expert_size, h_PS.element_size())
    elif blocks is None:
        blocks = (
            sizes.tma_spread_blocks(expert_size) if tma else sizes.spread_blocks(pairs.mean_pairs)
        )
    block_p, block_s, block_d = (blocks[f"BLOCK_{n}"] for n in "PSD")
    num_tiles = pairs.num_tiles(block_p)
    listed = pairs.tiles_N2 is not None
    columns = sizes.spread_columns(num_tiles, d_model, block_d) if listed else block_d
    programs = num_tiles * cdiv(d_model, columns)
    h, w = h_PS, w_FD
    if tma:
        assert expert_size % block_s == 0
        h = TensorDescriptor.from_tensor(h_PS, [block_p, block_s])
        w = TensorDescriptor.from_tensor(w_FD, [block_s, block_d])
        programs = min(programs, _multiprocessors(h_PS.device))
    slots_TKD = h_PS.new_empty((num_tokens, max_k, d_model))
    _spread_kernel[(programs,)](
        h,
        w,
        slots_TKD,
        pair_slot_ptr=pairs.pair_slot_P,
        d_model=d_model,
        expert_size=expert_size,
        columns=columns,
        WALKS=tma,
        WIDEN=INTERPRETED,
        PRECISION=_precision(h_PS.dtype, pairs),
        **pairs.order(),
        **blocks,
    )
    return slots_TKD


def combine(
    slots_TKD: Tensor,
    ids_TK: Tensor,
    down_bias_D: Tensor | None = None,
    blocks: Blocks | None = None,
) -> Tensor:
    """The sum of each token's used slots, ascending, in float32: [T, D], dtype of the slots."""
    num_tokens, max_k, d_model = slots_TKD.shape
    y_TD = slots_TKD.new_empty((num_tokens, d_model))
    blocks = blocks or sizes.combine_blocks(d_model)
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


def spread(
    h_PS: Tensor,
    w_FD: Tensor,
    pairs: Pairs,
    down_bias_D: Tensor | None = None,
    *,
    tma: bool = False,
) -> Tensor:
    """The sum of h_p @ w_e over each token's pairs: [T, D], dtype of h.

    Arguments are those of `spread_to_slots` and `combine`. Each pair's result is rounded to the
    dtype once, before the sum in float32.
    """
    slots_TKD = spread_to_slots(h_PS, w_FD, pairs, tma=tma)
    return combine(slots_TKD, pairs.ids_TK, down_bias_D)


def weights(h_PS: Tensor, x_TD: Tensor, pairs: Pairs) -> Tensor:
    """The sum of h_p (x) x[token of p] over each expert's pairs: [F, D], dtype of x.

    Args:
        h_PS: [P, S], contiguous.
        x_TD: [T, D], contiguous, dtype of h.
        pairs: of the same tokens and experts.

    An expert without pairs gets exact zeros.
    """
    d_model, expert_size, num_experts = x_TD.shape[1], h_PS.shape[1], pairs.num_experts
    blocks = sizes.weights_blocks(expert_size, x_TD.element_size())
    programs = num_experts * cdiv(expert_size, blocks["BLOCK_S"]) * cdiv(d_model, blocks["BLOCK_D"])
    splits = sizes.weights_splits(programs, cdiv(h_PS.shape[0], num_experts))
    out_NFD = torch.empty(
        (splits, num_experts * expert_size, d_model),
        dtype=x_TD.dtype if splits == 1 else torch.float32,
        device=x_TD.device,
    )
    _weights_kernel[(programs * splits,)](
        h_PS,
        x_TD,
        out_NFD,
        pairs.offsets_E1,
        pairs.pair_token_P,
        num_experts,
        d_model,
        expert_size,
        splits,
        WIDEN=INTERPRETED,
        PRECISION=_precision(x_TD.dtype, pairs),
        **blocks,
    )
    return out_NFD[0] if splits == 1 else out_NFD.sum(0).to(x_TD.dtype)
