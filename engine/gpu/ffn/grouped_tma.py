# Triton types a kernel's arguments by itself, at each launch.
# mypy: disable-error-code="no-untyped-def"
"""The two products of `grouped_ffn` for large prompts on Hopper: weights come by TMA.

The same function as `grouped_ffn.up_product` and `grouped_ffn.down_product`. What differs is how
tiles are fed. Weights, and the activations that the second product reads, are fetched by the tensor
memory accelerator: one thread asks for a whole tile, so no warp spends its instructions on copies.
Rows past an expert's pairs are not read. Programs may be as many as the multiprocessors and walk
over the tiles (`per_sm`), the next tile's loads then running beside the last one's stores.
`_up_kernel` also writes down where each pair's result goes, which `_down_kernel` would otherwise
work out anew for each of its tiles.

Neither gates nor biases: `grouped_ffn` computes those. Older devices have no TMA.

Shapes: T tokens, D model, F neurons, E experts, S neurons per expert, K slots per token, P = T * K
capacity for pairs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from engine.gpu._triton import INTERPRETED, TensorDescriptor, cdiv, jit, next_power_of_2, tl
from engine.gpu.ffn.expert_ffn import activate
from engine.gpu.routing.routing import Routing

# Bytes to which rows must be aligned for TMA.
ALIGNED = 16

# Slots of a token that `_up_kernel` holds at once.
MAX_K = 32

# Mean pairs an expert from which `grouped_ffn` takes these products.
LEAST_PAIRS = 64


@jit
def _tile_ends(offsets_ptr, num_experts, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr):
    """Of each expert: its first pair, the end of its pairs, its tiles and the last tile's end."""
    e = tl.arange(0, BLOCK_E)
    start = tl.load(offsets_ptr + e, mask=e < num_experts, other=0)
    end = tl.load(offsets_ptr + e + 1, mask=e < num_experts, other=0)
    tiles = (end - start + BLOCK_P - 1) // BLOCK_P
    return e, start, end, tiles, tl.cumsum(tiles, axis=0)


@jit
def _count_tiles(offsets_ptr, num_experts, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr):
    """Tiles of all experts."""
    _, _, _, tiles, _ = _tile_ends(offsets_ptr, num_experts, BLOCK_E, BLOCK_P)
    return tl.sum(tiles, axis=0)


@jit
def _tile_of(tile, offsets_ptr, num_experts, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr):
    """The expert of a tile, the tile's first pair and the end of that expert's pairs."""
    e, start, end, tiles, ends = _tile_ends(offsets_ptr, num_experts, BLOCK_E, BLOCK_P)
    expert = tl.sum((ends <= tile).to(tl.int32), axis=0)
    here = e == expert
    nth = tile - tl.sum(tl.where(here, ends - tiles, 0), axis=0)
    first = tl.sum(tl.where(here, start, 0), axis=0) + nth * BLOCK_P
    return expert, first, tl.sum(tl.where(here, end, 0), axis=0)


@jit
def _up_kernel(
    x_ptr,
    up_desc,
    offsets_ptr,
    pair_token_ptr,
    ids_ptr,
    h_ptr,
    slot_ptr,
    num_experts,
    d_model,
    expert_size,
    max_k,
    SQUARE: tl.constexpr,
    WIDEN: tl.constexpr,
    FLATTEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Tiles of h [P, S] = act(x[token] @ up_e.T), and each pair's row of slots [T * K]."""
    tiles_s = tl.cdiv(expert_size, BLOCK_S)
    items = _count_tiles(offsets_ptr, num_experts, BLOCK_E, BLOCK_P) * tiles_s
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), flatten=FLATTEN):
        expert, first, end = _tile_of(item // tiles_s, offsets_ptr, num_experts, BLOCK_E, BLOCK_P)
        p = first + tl.arange(0, BLOCK_P)
        s_first = (item % tiles_s) * BLOCK_S
        in_p = (p < end)[:, None]
        token = tl.load(pair_token_ptr + p, mask=p < end, other=0).to(tl.int64)
        x_rows = x_ptr + token[:, None] * d_model
        row = expert * expert_size + s_first
        acc = tl.zeros((BLOCK_P, BLOCK_S), tl.float32)
        for start in range(0, d_model, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)[None, :]
            x = tl.load(x_rows + d, mask=in_p & (d < d_model), other=0.0)
            up = up_desc.load([row, start])
            if WIDEN:
                x, up = x.to(tl.float32), up.to(tl.float32)
            acc = tl.dot(x, tl.trans(up), acc, input_precision="ieee")
        s = s_first + tl.arange(0, BLOCK_S)[None, :]
        h = activate(acc, SQUARE).to(h_ptr.dtype.element_ty)
        at = h_ptr + p.to(tl.int64)[:, None] * expert_size + s
        tl.store(at, h, mask=in_p & (s < expert_size))
        # Masked rather than in a branch, which would keep the loops from being made one.
        once = in_p & (s_first == 0)
        k = tl.arange(0, BLOCK_K)[None, :]
        ids = tl.load(ids_ptr + token[:, None] * max_k + k, mask=once & (k < max_k), other=-1)
        slot = tl.sum(((ids >= 0) & (ids < expert)).to(tl.int32), axis=1)
        tl.store(slot_ptr + p, token.to(tl.int32) * max_k + slot, mask=(p < end) & (s_first == 0))


@jit
def _down_kernel(
    h_desc,
    down_desc,
    offsets_ptr,
    slot_ptr,
    slots_ptr,
    num_experts,
    d_model,
    expert_size,
    WIDEN: tl.constexpr,
    FLATTEN: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Tiles of h @ down_e, each pair's row written to its token's slot in slots [T * K, D].

    BLOCK_S divides the expert's size: a step past it would multiply the next expert's weights. A
    tile's last rows may be those of the next expert's pairs; they are not stored.
    """
    tiles_d = tl.cdiv(d_model, BLOCK_D)
    items = _count_tiles(offsets_ptr, num_experts, BLOCK_E, BLOCK_P) * tiles_d
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), flatten=FLATTEN):
        expert, first, end = _tile_of(item // tiles_d, offsets_ptr, num_experts, BLOCK_E, BLOCK_P)
        p = first + tl.arange(0, BLOCK_P)
        slot = tl.load(slot_ptr + p, mask=p < end, other=0).to(tl.int64)
        d_first = (item % tiles_d) * BLOCK_D
        row = expert * expert_size
        acc = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
        for start in range(0, expert_size, BLOCK_S):
            h = h_desc.load([first, start])
            down = down_desc.load([row + start, d_first])
            if WIDEN:
                h, down = h.to(tl.float32), down.to(tl.float32)
            acc = tl.dot(h, down, acc, input_precision="ieee")
        d = d_first + tl.arange(0, BLOCK_D)[None, :]
        at = slots_ptr + slot[:, None] * d_model + d
        tl.store(at, acc.to(slots_ptr.dtype.element_ty), mask=(p < end)[:, None] & (d < d_model))


# --- launchers -----------------------------------------------------------------------------------


def tile(*sizes: int, per_sm: int = 0) -> dict[str, int]:
    """Block sizes of a product: pairs, neurons, columns, then warps and stages.

    per_sm: programs a multiprocessor that walk over the tiles, their loops made one; 0: one program
    a tile.
    """
    names = ("BLOCK_P", "BLOCK_S", "BLOCK_D", "num_warps", "num_stages")
    return {**dict(zip(names, sizes, strict=True)), "per_sm": per_sm}


def supports(x_TD: Tensor, expert_size: int, max_k: int) -> bool:
    """Whether these kernels take this type and shape, here."""
    return (
        x_TD.dtype in (torch.bfloat16, torch.float16)
        and x_TD.shape[1] * x_TD.element_size() % ALIGNED == 0
        and expert_size % 16 == 0
        and max_k <= MAX_K
        and (INTERPRETED or _multiprocessors(x_TD.device) > 0)
    )


def serves(x_TD: Tensor, expert_size: int, max_k: int, num_experts: int) -> bool:
    """Whether these products are the ones to take for so many pairs."""
    pairs = cdiv(x_TD.shape[0] * max_k, num_experts)
    return pairs >= LEAST_PAIRS and supports(x_TD, expert_size, max_k)


def up_blocks(mean_pairs: int, expert_size: int) -> dict[str, int]:
    """Block sizes of `_up_kernel` for this many pairs an expert."""
    if expert_size < 256:
        return tile(128, 128, 64, 8, 5) if mean_pairs > 128 else tile(64, 128, 64, 4, 4)
    return tile(128, 256, 64, 8, 4) if mean_pairs > 128 else tile(64, 256, 64, 8, 5)


def down_blocks(expert_size: int) -> dict[str, int]:
    """Block sizes of `_down_kernel`; BLOCK_S is a power of two that divides the expert."""
    return tile(128, min(128, expert_size & -expert_size), 128, 8, 3, per_sm=1)


@functools.lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    """How many the device has; 0 where it has no TMA."""
    properties = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count) if properties.major >= 9 else 0


def _launch(kernel: Any, tiles: int, arguments: tuple[Any, ...], blocks: dict[str, Any]) -> None:
    """`tiles` programs, or as many as walk over them."""
    per_sm = blocks.pop("per_sm")
    if per_sm:
        here = 2 if INTERPRETED else _multiprocessors(arguments[-1])
        tiles = min(tiles, per_sm * here)
    kernel[(tiles,)](*arguments[:-1], WIDEN=INTERPRETED, FLATTEN=per_sm > 0, **blocks)


def _described(tensor: Tensor, rows: int, columns: int) -> Any:
    """A descriptor of a matrix, to fetch `rows` x `columns` of it."""
    return TensorDescriptor.from_tensor(tensor, [rows, columns])


def most_tiles(capacity: int, num_experts: int, block_p: int) -> int:
    """Tiles that the pairs can need: each expert's last may be partly empty, none is all empty."""
    return min(cdiv(capacity, block_p) + num_experts, capacity)


def up_product(
    x_TD: Tensor,
    up_FD: Tensor,
    routing: Routing,
    activation: str,
    blocks: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The activations of every pair, [P, S], and its row of [T * K] slots, int32 [P].

    Rows past the last pair are not written.

    Args:
        x_TD: [T, D], contiguous, of a type and shape that `supports` grants.
        up_FD: [F, D], contiguous, dtype of x.
        routing: of the same tokens.
        activation: one of ACTIVATIONS.
        blocks: from `up_blocks`, or others to try.
    """
    (num_tokens, max_k), num_experts = routing.ids_TK.shape, routing.counts_E.numel()
    d_model, expert_size = x_TD.shape[1], up_FD.shape[0] // num_experts
    capacity = num_tokens * max_k
    blocks = blocks or up_blocks(cdiv(capacity, num_experts), expert_size)
    h_PS = x_TD.new_empty((capacity, expert_size))
    slot_P = torch.empty(capacity, dtype=torch.int32, device=x_TD.device)
    tiles = most_tiles(capacity, num_experts, blocks["BLOCK_P"])
    arguments = (
        x_TD,
        _described(up_FD, blocks["BLOCK_S"], blocks["BLOCK_D"]),
        routing.offsets_E1,
        routing.pair_token_P,
        routing.ids_TK,
        h_PS,
        slot_P,
        num_experts,
        d_model,
        expert_size,
        max_k,
        x_TD.device,
    )
    switches = {"SQUARE": activation == "relu2", "BLOCK_E": next_power_of_2(num_experts)}
    tiles *= cdiv(expert_size, blocks["BLOCK_S"])
    _launch(_up_kernel, tiles, arguments, {**blocks, **switches, "BLOCK_K": next_power_of_2(max_k)})
    return h_PS, slot_P


def down_product(
    h_PS: Tensor,
    slot_P: Tensor,
    down_FD: Tensor,
    routing: Routing,
    blocks: dict[str, int] | None = None,
) -> Tensor:
    """h @ down_e of every pair, in its token's slot: [T, K, D]; unused slots are not written.

    Args:
        h_PS, slot_P: from `up_product`.
        down_FD: [F, D], contiguous, dtype of h.
        routing: as before.
        blocks: from `down_blocks`, or others to try; BLOCK_S divides S.
    """
    (num_tokens, max_k), num_experts = routing.ids_TK.shape, routing.counts_E.numel()
    (capacity, expert_size), d_model = h_PS.shape, down_FD.shape[1]
    blocks = blocks or down_blocks(expert_size)
    assert expert_size % blocks["BLOCK_S"] == 0
    slots_TKD = h_PS.new_empty((num_tokens, max_k, d_model))
    tiles = most_tiles(capacity, num_experts, blocks["BLOCK_P"]) * cdiv(d_model, blocks["BLOCK_D"])
    arguments = (
        _described(h_PS, blocks["BLOCK_P"], blocks["BLOCK_S"]),
        _described(down_FD, blocks["BLOCK_S"], blocks["BLOCK_D"]),
        routing.offsets_E1,
        slot_P,
        slots_TKD,
        num_experts,
        d_model,
        expert_size,
        h_PS.device,
    )
    _launch(_down_kernel, tiles, arguments, {**blocks, "BLOCK_E": next_power_of_2(num_experts)})
    return slots_TKD
