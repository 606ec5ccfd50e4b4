# Triton types a kernel's arguments by itself, at each launch.
# mypy: disable-error-code="no-untyped-def"
"""The grouped products that training is made of, over token-expert pairs sorted by expert.

    gather   z_p = x[token of p] @ w_e.T        first product, and the gradient of the hidden rows
    spread   y_t = sum of h_p @ w_e, p of t     second product, and the gradient of the input
    weights  g_e = sum of h_p (x) x[token of p] gradients of both matrices

An expert is often no wider than 32 neurons, so moving rows of width D takes longer than multiplying
them. A program of `gather` or `spread` therefore takes many pairs for as much of the expert's width
as fits, and tiles are ordered so that programs in flight work on the same tokens for all experts:
a row of x that one expert fetched from memory, the others find in the cache. `tiles` writes that
order down once for all products. No atomic operation takes part, so every run gives the same bits.

Shapes: T tokens, D model, F neurons, E experts, S neurons per expert, K slots per token, P = T * K
capacity for pairs, N tiles of pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from engine.gpu._triton import INTERPRETED, cdiv, jit, next_power_of_2, tl
from engine.gpu.ffn.expert_ffn import activate
from engine.gpu.ffn.grouped_ffn import combine

# Pairs of one tile, for every product: an expert's share of a training batch fills many such tiles.
TILE_PAIRS = 128

# Programs that keep a GPU of 132 multiprocessors busy to the end of a launch.
ENOUGH_PROGRAMS = 1024

# Fewer pairs than this are not worth another partial sum of a whole gradient.
LEAST_PAIRS_PER_SPLIT = 512


class Pairs(NamedTuple):
    """What a product has to know of a `routing.Routing`, and the order of its tiles.

    Attributes:
        ids_TK, offsets_E1, pair_token_P: as in `Routing`.
        tiles_N2: int32 [N, 2], from `tiles`.
    """

    ids_TK: Tensor
    offsets_E1: Tensor
    pair_token_P: Tensor
    tiles_N2: Tensor

    @property
    def num_experts(self) -> int:
        return self.offsets_E1.numel() - 1

    @property
    def num_tiles(self) -> int:
        return self.tiles_N2.shape[0]


# --- kernels -------------------------------------------------------------------------------------


@jit
def _tiles_kernel(
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
    expert = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    start = tl.load(offsets_ptr + e, mask=e < num_experts, other=0)
    end = tl.load(offsets_ptr + e + 1, mask=e < num_experts, other=0)
    tiles = (end - start + BLOCK_P - 1) // BLOCK_P
    first = tl.sum(tl.where(e == expert, start, 0), axis=0)
    mine = tl.sum(tl.where(e == expert, tiles, 0), axis=0)
    for begin in range(0, mine, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        same_n = (e < expert)[None, :] & (tiles[None, :] > n[:, None])
        at = 2 * tl.sum(tl.minimum(tiles[None, :], n[:, None]) + same_n.to(tl.int32), axis=1)
        tl.store(tiles_ptr + at, tl.zeros_like(n) + expert, mask=n < mine)
        tl.store(tiles_ptr + at + 1, first + n * BLOCK_P, mask=n < mine)
    total = tl.sum(tiles, axis=0)
    for begin in range(total + expert * BLOCK_N, num_tiles, num_experts * BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        tl.store(tiles_ptr + 2 * n, tl.full((BLOCK_N,), -1, tl.int32), mask=n < num_tiles)
        tl.store(tiles_ptr + 2 * n + 1, tl.full((BLOCK_N,), 0, tl.int32), mask=n < num_tiles)


@jit
def _gather_kernel(
    x_ptr,
    w_ptr,
    h_ptr,
    out_ptr,
    tiles_ptr,
    offsets_ptr,
    pair_token_ptr,
    d_model,
    expert_size,
    SQUARE: tl.constexpr,
    BACKWARD: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of act(x[token] @ w_e.T), or of (x[token] @ w_e.T) * act' where `BACKWARD`.

    Both activations tell their slope from their value h: 1 where relu is positive, 2 sqrt(h) for
    its square.
    """
    tiles_s = tl.cdiv(expert_size, BLOCK_S)
    tile = tl.program_id(0) // tiles_s
    expert = tl.load(tiles_ptr + 2 * tile)
    if expert < 0:
        return
    p = tl.load(tiles_ptr + 2 * tile + 1) + tl.arange(0, BLOCK_P)
    in_p = p < tl.load(offsets_ptr + expert + 1)
    s = (tl.program_id(0) % tiles_s) * BLOCK_S + tl.arange(0, BLOCK_S)
    in_s = s < expert_size
    # Rows past the expert's pairs read token 0; nothing of them is stored.
    token = tl.load(pair_token_ptr + p, mask=in_p, other=0).to(tl.int64)
    x_rows = x_ptr + token[:, None] * d_model
    w_rows = w_ptr + (expert.to(tl.int64) * expert_size + s)[:, None] * d_model
    acc = tl.zeros((BLOCK_P, BLOCK_S), tl.float32)
    for begin in range(0, d_model, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)[None, :]
        x = tl.load(x_rows + d, mask=d < d_model, other=0.0)
        w = tl.load(w_rows + d, mask=in_s[:, None] & (d < d_model), other=0.0)
        if WIDEN:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    at = p.to(tl.int64)[:, None] * expert_size + s[None, :]
    inside = in_p[:, None] & in_s[None, :]
    if BACKWARD:
        h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if SQUARE:
            acc *= 2.0 * tl.sqrt(h)
        else:
            acc = tl.where(h <= 0.0, 0.0, acc)
    else:
        acc = activate(acc, SQUARE)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _spread_kernel(
    h_ptr,
    w_ptr,
    slots_ptr,
    tiles_ptr,
    offsets_ptr,
    pair_token_ptr,
    ids_ptr,
    d_model,
    expert_size,
    max_k,
    columns,
    WHOLE: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`columns` columns of one tile of h @ w_e, each pair's row written to its token's slot.

    `WHOLE` says that BLOCK_S covers the expert: then h is read once for all columns.
    """
    parts = tl.cdiv(d_model, columns)
    tile = tl.program_id(0) // parts
    expert = tl.load(tiles_ptr + 2 * tile)
    if expert < 0:
        return
    p = tl.load(tiles_ptr + 2 * tile + 1) + tl.arange(0, BLOCK_P)
    in_p = (p < tl.load(offsets_ptr + expert + 1))[:, None]
    token = tl.load(pair_token_ptr + p[:, None], mask=in_p, other=0).to(tl.int64)
    slot = tl.zeros((BLOCK_P, 1), tl.int64)
    for begin in range(0, max_k, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)[None, :]
        ids = tl.load(ids_ptr + token * max_k + k, mask=in_p & (k < max_k), other=-1)
        slot += tl.sum(((ids >= 0) & (ids < expert)).to(tl.int64), axis=1)[:, None]
    slot_rows = slots_ptr + (token * max_k + slot) * d_model

    s = tl.arange(0, BLOCK_S)
    h_rows = h_ptr + p.to(tl.int64)[:, None] * expert_size
    w_rows = w_ptr + expert.to(tl.int64) * expert_size * d_model
    if WHOLE:
        h = tl.load(h_rows + s[None, :], mask=in_p & (s < expert_size)[None, :], other=0.0)
        if WIDEN:
            h = h.to(tl.float32)
    d_first = (tl.program_id(0) % parts) * columns
    for d_begin in range(d_first, tl.minimum(d_first + columns, d_model), BLOCK_D):
        d = d_begin + tl.arange(0, BLOCK_D)[None, :]
        acc = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
        if WHOLE:
            inside = (s < expert_size)[:, None] & (d < d_model)
            w = tl.load(w_rows + s[:, None] * d_model + d, mask=inside, other=0.0)
            if WIDEN:
                w = w.to(tl.float32)
            acc = tl.dot(h, w, acc, input_precision=PRECISION)
        else:
            for s_begin in range(0, expert_size, BLOCK_S):
                at = s_begin + s
                in_s = at < expert_size
                part = tl.load(h_rows + at[None, :], mask=in_p & in_s[None, :], other=0.0)
                inside = in_s[:, None] & (d < d_model)
                w = tl.load(w_rows + at.to(tl.int64)[:, None] * d_model + d, mask=inside, other=0.0)
                if WIDEN:
                    part, w = part.to(tl.float32), w.to(tl.float32)
                acc = tl.dot(part, w, acc, input_precision=PRECISION)
        tl.store(slot_rows + d, acc.to(slots_ptr.dtype.element_ty), mask=in_p & (d < d_model))


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
    tiles_d = tl.cdiv(d_model, BLOCK_D)
    tiles_s = tl.cdiv(expert_size, BLOCK_S)
    program = tl.program_id(0)
    d = (program % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    s = (program // tiles_d % tiles_s) * BLOCK_S + tl.arange(0, BLOCK_S)
    # Experts vary faster than parts, so that programs in flight share tokens.
    part_expert = program // (tiles_d * tiles_s)
    expert = part_expert % num_experts
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    length = tl.cdiv(end - start, splits)
    first = start + (part_expert // num_experts) * length
    last = tl.minimum(first + length, end)
    in_d, in_s = (d < d_model)[None, :], (s < expert_size)[None, :]
    # Transposed, so that the side of 64 rows or more that tensor cores want is never the expert's.
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
    at = out_ptr + (part_expert.to(tl.int64) * expert_size + s)[:, None] * d_model + d[None, :]
    inside = (s < expert_size)[:, None] & in_d
    tl.store(at, tl.trans(acc).to(out_ptr.dtype.element_ty), mask=inside)


# --- sizes ---------------------------------------------------------------------------------------


def _block_s(expert_size: int, most: int) -> int:
    """The expert's width as a block: the whole of it where it fits."""
    return min(most, max(16, next_power_of_2(expert_size)))


def tiles_blocks(num_experts: int) -> dict[str, int]:
    """Block sizes of `_tiles_kernel`."""
    block_e = next_power_of_2(num_experts)
    return {
        "BLOCK_E": block_e,
        "BLOCK_N": max(1, 2048 // block_e),
        "BLOCK_P": TILE_PAIRS,
        "num_warps": 4,
    }


def gather_blocks(expert_size: int, itemsize: int, *, backward: bool) -> dict[str, int]:
    """Block sizes of `_gather_kernel`; BLOCK_D is the sum's step.

    The backward pass holds a tile of h beside the sum, so that its widest tile is half as wide.
    """
    half = itemsize == 2
    block_s = _block_s(expert_size, (128 if backward else 256) if half else 64)
    return {
        "BLOCK_P": TILE_PAIRS,
        "BLOCK_S": block_s,
        "BLOCK_D": 64 if half else 32,
        "num_warps": 4 if block_s <= 64 and half else 8,
        "num_stages": 3,
    }


def spread_blocks(expert_size: int, itemsize: int) -> dict[str, int]:
    """Block sizes of `_spread_kernel`; BLOCK_S is the sum's step."""
    half = itemsize == 2
    whole = max(16, next_power_of_2(expert_size))
    fits = whole <= (256 if half else 64)
    return {
        "WHOLE": fits,
        "BLOCK_P": TILE_PAIRS,
        "BLOCK_S": whole if fits else 64 if half else 32,
        "BLOCK_D": 64,
        "BLOCK_K": 8,
        "num_warps": 8,
        "num_stages": 2 if fits and whole > 128 else 3,
    }


def weights_blocks(expert_size: int, itemsize: int) -> dict[str, int]:
    """Block sizes of `_weights_kernel`; BLOCK_P is the sum's step.

    Float32 tiles reach the tensor cores transposed, which copies ahead of use would do in pieces of
    4 bytes: there, loads stay wide and other programs fill the wait.
    """
    half = itemsize == 2
    block_s = _block_s(expert_size, 128 if half else 64)
    return {
        "BLOCK_P": 64 if half else 32,
        "BLOCK_S": block_s,
        "BLOCK_D": 128,
        "num_warps": 4 if block_s <= 64 and half else 8,
        "num_stages": 3 if half else 1,
    }


def spread_columns(num_tiles: int, d_model: int, block_d: int) -> int:
    """Columns that one program of `spread` takes: all of them if there are tiles enough."""
    blocks = cdiv(d_model, block_d)
    parts = min(blocks, cdiv(ENOUGH_PROGRAMS, num_tiles))
    return cdiv(blocks, parts) * block_d


def weights_splits(programs: int, mean_pairs: int) -> int:
    """Parts that each expert's sum over pairs is cut into, for programs enough."""
    return max(1, min(cdiv(ENOUGH_PROGRAMS, programs), mean_pairs // LEAST_PAIRS_PER_SPLIT))


def _precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: three TF32 products carry float32's precision on tensor cores."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


# --- launchers -----------------------------------------------------------------------------------


def num_tiles(capacity: int, num_experts: int) -> int:
    """Tiles that the pairs can need: each expert's last may be partly empty."""
    return cdiv(capacity, TILE_PAIRS) + num_experts


def tiles(offsets_E1: Tensor, capacity: int) -> Tensor:
    """The tiles of all experts in the order in which the products take them: int32 [N, 2].

    Each has its expert and its first pair; unused rows, which come last, have expert -1.
    """
    num_experts = offsets_E1.numel() - 1
    tiles_N2 = offsets_E1.new_empty((num_tiles(capacity, num_experts), 2))
    _tiles_kernel[(num_experts,)](
        offsets_E1, tiles_N2, num_experts, tiles_N2.shape[0], **tiles_blocks(num_experts)
    )
    return tiles_N2


def gather(
    x_TD: Tensor, w_FD: Tensor, pairs: Pairs, activation: str, h_PS: Tensor | None = None
) -> Tensor:
    """act(x[token] @ w_e.T) of every pair, [P, S]; given h_PS, (x[token] @ w_e.T) * act' instead.

    Args:
        x_TD: [T, D], contiguous.
        w_FD: [F, D], contiguous, dtype of x; expert e owns rows e*S .. (e+1)*S.
        pairs: of the same tokens and experts.
        activation: one of ACTIVATIONS.
        h_PS: what this returned in the forward pass; the activation's slope is read off it.

    Rows past the last pair are left as they were allocated.
    """
    d_model, expert_size = x_TD.shape[1], w_FD.shape[0] // pairs.num_experts
    backward = h_PS is not None
    blocks = gather_blocks(expert_size, x_TD.element_size(), backward=backward)
    out_PS = x_TD.new_empty((pairs.ids_TK.numel(), expert_size))
    _gather_kernel[(pairs.num_tiles * cdiv(expert_size, blocks["BLOCK_S"]),)](
        x_TD,
        w_FD,
        out_PS if h_PS is None else h_PS,
        out_PS,
        pairs.tiles_N2,
        pairs.offsets_E1,
        pairs.pair_token_P,
        d_model,
        expert_size,
        SQUARE=activation == "relu2",
        BACKWARD=backward,
        WIDEN=INTERPRETED,
        PRECISION=_precision(x_TD.dtype),
        **blocks,
    )
    return out_PS


def spread(h_PS: Tensor, w_FD: Tensor, pairs: Pairs) -> Tensor:
    """The sum of h_p @ w_e over each token's pairs: [T, D], dtype of h.

    Args:
        h_PS: [P, S], contiguous.
        w_FD: [F, D], contiguous, dtype of h.
        pairs: of the same tokens and experts.

    Each pair's result is rounded to the dtype once, before the sum in float32.
    """
    (num_tokens, max_k), d_model = pairs.ids_TK.shape, w_FD.shape[1]
    expert_size = h_PS.shape[1]
    blocks = spread_blocks(expert_size, h_PS.element_size())
    columns = spread_columns(pairs.num_tiles, d_model, blocks["BLOCK_D"])
    slots_TKD = h_PS.new_empty((num_tokens, max_k, d_model))
    _spread_kernel[(pairs.num_tiles * cdiv(d_model, columns),)](
        h_PS,
        w_FD,
        slots_TKD,
        pairs.tiles_N2,
        pairs.offsets_E1,
        pairs.pair_token_P,
        pairs.ids_TK,
        d_model,
        expert_size,
        max_k,
        columns,
        WIDEN=INTERPRETED,
        PRECISION=_precision(h_PS.dtype),
        **blocks,
    )
    return combine(slots_TKD, pairs.ids_TK)


def weights(h_PS: Tensor, x_TD: Tensor, pairs: Pairs) -> Tensor:
    """The sum of h_p (x) x[token of p] over each expert's pairs: [F, D], dtype of x.

    Args:
        h_PS: [P, S], contiguous.
        x_TD: [T, D], contiguous, dtype of h.
        pairs: of the same tokens and experts.

    An expert without pairs gets exact zeros.
    """
    d_model, expert_size, num_experts = x_TD.shape[1], h_PS.shape[1], pairs.num_experts
    blocks = weights_blocks(expert_size, x_TD.element_size())
    programs = num_experts * cdiv(expert_size, blocks["BLOCK_S"]) * cdiv(d_model, blocks["BLOCK_D"])
    splits = weights_splits(programs, cdiv(h_PS.shape[0], num_experts))
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
        PRECISION=_precision(x_TD.dtype),
        **blocks,
    )
    return out_NFD[0] if splits == 1 else out_NFD.sum(0).to(x_TD.dtype)
