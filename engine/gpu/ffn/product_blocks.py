"""Block sizes of the kernels in `products`, as measurements found them.

`BLOCK_P` counts pairs, `BLOCK_S` neurons of an expert, `BLOCK_D` columns. In serving they depend on
how many pairs an expert has on average. In training pairs are always many; there the expert's width
decides, because experts are often narrow.
"""

from __future__ import annotations

from typing import Any

from engine.gpu._triton import cdiv, next_power_of_2

# Pairs of one listed tile: an expert's share of a training batch fills many such tiles.
TILE_PAIRS = 128

# Programs that keep a GPU of 132 multiprocessors busy to the end of a launch.
ENOUGH_PROGRAMS = 1024

# Fewer pairs than this are not worth another partial sum of a whole gradient.
LEAST_PAIRS_PER_SPLIT = 512

Blocks = dict[str, Any]


def product_blocks(*sizes: int) -> Blocks:
    """Block sizes of a product: pairs, neurons, columns, then warps and stages."""
    names = ("BLOCK_P", "BLOCK_S", "BLOCK_D", "num_warps", "num_stages")
    return dict(zip(names, sizes, strict=True))


def gather_blocks(
    mean_pairs: int, expert_size: int, itemsize: int, *, gated: bool = False
) -> Blocks:
    """Block sizes of `_gather_kernel` in serving; BLOCK_D is the sum's step.

    Few pairs are bound by memory and want many small tiles in flight, many pairs want large ones.
    """
    wide = itemsize // 2  # float32 takes half the step in the same shared memory
    if mean_pairs <= 16:
        return product_blocks(16, 64, 128 // wide, 4, 4)
    if mean_pairs <= 32:
        return product_blocks(32, 64, 128 // wide, 4, 4)
    if gated:  # two sums in registers
        return product_blocks(64, 64 if itemsize > 2 else 128, 64 // wide, 8, 3)
    if itemsize == 2 and expert_size >= 512 and mean_pairs <= 128:
        return product_blocks(64, 256, 64, 8, 3)
    if mean_pairs <= 128 or expert_size < 256 or itemsize > 2:
        return product_blocks(64, 128, 64 // wide, 4, 4)
    return product_blocks(128, 256, 64, 8, 3)


def spread_blocks(mean_pairs: int) -> Blocks:
    """Block sizes of `_spread_kernel` in serving; BLOCK_S is the sum's step, short as the sum."""
    block_p = 16 if mean_pairs <= 16 else 32 if mean_pairs <= 32 else 64
    if 64 < mean_pairs <= 128:
        block_p = 128
    return {**product_blocks(block_p, 32, 128, 4, 4), "WHOLE": False}


def tma_gather_blocks(mean_pairs: int, expert_size: int) -> Blocks:
    """Block sizes of `_gather_kernel` where weights come by TMA."""
    if expert_size < 256:
        sizes = (128, 128, 64, 8, 5) if mean_pairs > 128 else (64, 128, 64, 4, 4)
    else:
        sizes = (128, 256, 64, 8, 4) if mean_pairs > 128 else (64, 256, 64, 8, 5)
    return product_blocks(*sizes)


def tma_spread_blocks(expert_size: int) -> Blocks:
    """Block sizes of `_spread_kernel` by TMA; BLOCK_S is a power of two that divides the expert."""
    block_s = min(128, expert_size & -expert_size)
    return {**product_blocks(128, block_s, 128, 8, 3), "WHOLE": False}


def _whole_or(most: int, expert_size: int) -> int:
    """The expert's width as a block, or `most` of it."""
    return min(most, max(16, next_power_of_2(expert_size)))


def listed_gather_blocks(expert_size: int, itemsize: int, *, backward: bool) -> Blocks:
    """Block sizes of `_gather_kernel` in training; BLOCK_D is the sum's step.

    An expert is often no wider than 32 neurons, so moving rows of width D takes longer than
    multiplying them: a program takes many pairs for as much of the expert's width as fits. The
    backward pass holds a tile of h beside the sum, so that its widest tile is half as wide.
    """
    half = itemsize == 2
    block_s = _whole_or((128 if backward else 256) if half else 64, expert_size)
    warps = 4 if block_s <= 64 and half else 8
    return product_blocks(TILE_PAIRS, block_s, 64 if half else 32, warps, 3)


def listed_spread_blocks(expert_size: int, itemsize: int) -> Blocks:
    """Block sizes of `_spread_kernel` in training; BLOCK_S is the sum's step."""
    half = itemsize == 2
    whole = max(16, next_power_of_2(expert_size))
    fits = whole <= (256 if half else 64)
    block_s = whole if fits else 64 if half else 32
    stages = 2 if fits and whole > 128 else 3
    return {**product_blocks(TILE_PAIRS, block_s, 64, 8, stages), "WHOLE": fits}


def weights_blocks(expert_size: int, itemsize: int) -> Blocks:
    """Block sizes of `_weights_kernel`; BLOCK_P is the sum's step.

    Float32 tiles reach the tensor cores transposed, which copies ahead of use would do in pieces of
    4 bytes: there, loads stay wide and other programs fill the wait.
    """
    half = itemsize == 2
    block_s = _whole_or(128 if half else 64, expert_size)
    warps = 4 if block_s <= 64 and half else 8
    return product_blocks(64 if half else 32, block_s, 128, warps, 3 if half else 1)


def combine_blocks(d_model: int) -> Blocks:
    """Block sizes of `_combine_kernel`: one warp adds whole columns, none exchanged."""
    return {"BLOCK_K": 8, "BLOCK_D": min(256, next_power_of_2(d_model)), "num_warps": 1}


def list_tiles_blocks(num_experts: int) -> Blocks:
    """Block sizes of `_list_tiles_kernel`."""
    block_e = next_power_of_2(num_experts)
    return {
        "BLOCK_E": block_e,
        "BLOCK_N": max(1, 2048 // block_e),
        "BLOCK_P": TILE_PAIRS,
        "num_warps": 4,
    }


def spread_columns(num_tiles: int, d_model: int, block_d: int) -> int:
    """Columns that one program of a listed `spread` takes: all of them if there are tiles enough.

    In this way it reads its rows of h once.
    """
    blocks = cdiv(d_model, block_d)
    parts = min(blocks, cdiv(ENOUGH_PROGRAMS, num_tiles))
    return cdiv(blocks, parts) * block_d


def weights_splits(programs: int, mean_pairs: int) -> int:
    """Parts that each expert's sum over pairs is cut into, for programs enough."""
    return max(1, min(cdiv(ENOUGH_PROGRAMS, programs), mean_pairs // LEAST_PAIRS_PER_SPLIT))
