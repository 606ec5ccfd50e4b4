"""One decoding step of attention over the paged cache, in one launch.

Takes the heads as the projection leaves them: rotates the query and the new key by position, writes
the new key and value to their slot, and attends over the whole context, the new token included.

Program (g, b, s) takes the query heads that share key-value head g, and split s of the context of
sequence b. The new token never travels through memory: the program that owns the last split puts
it among the keys that it has read. The last program of (g, b) to arrive adds the splits in a fixed
order. Where a context is cut depends on its own length, and on whether the batch has more than
FEW_ROWS rows; not on the company otherwise, nor on the bound on the length.

A batch of few rows leaves memory idle between two kernels, so there a program fetches its first
keys and values while the kernel before still runs.

Nothing here knows a length on the host: a batch of one shape is replayed from a CUDA graph while
its contexts grow.

Shapes: B sequences, H query heads, G key-value heads, N = H + 2 G, d head dimension, c = d / 2,
M blocks per sequence at most, P positions.
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
from engine.gpu.arrivals import Arrivals
from engine.gpu.attention.attend_chunks import attend_chunks_reference
from engine.gpu.attention.rotate_and_store import MAX_HEAD_DIM, rotate_and_store_reference

SHORT_CONTEXT = 512  # the longest context that is cut into short splits
FEW_ROWS = 4  # batches that need short splits to occupy the device


def attend_step_reference(
    heads_BNd: Tensor,
    cos_Pc: Tensor,
    sin_Pc: Tensor,
    keys: Tensor,
    values: Tensor,
    slots_B: Tensor,
    table_BM: Tensor,
    contexts_B: Tensor,
    block_size: int,
) -> Tensor:
    """What `attend_step` computes: each row is a chunk of one query."""
    at = (contexts_B - 1).clamp_min(0).long()
    q_BHd = rotate_and_store_reference(heads_BNd, cos_Pc[at], sin_Pc[at], keys, values, slots_B)
    rows_B = torch.arange(len(contexts_B), device=contexts_B.device, dtype=torch.int32)
    pieces_B4 = torch.stack([rows_B, torch.ones_like(rows_B), contexts_B - 1, rows_B], 1)
    return attend_chunks_reference(q_BHd, keys, values, table_BM, pieces_B4, block_size)


@jit
def _rotated(row_ptr, c_ptr, s_ptr, d, half, mask):
    """The heads at row_ptr, rotated, in float32: element d pairs with the one half a head away."""
    low = d < half
    value = tl.load(row_ptr + d, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(row_ptr + tl.where(low, d + half, d - half), mask=mask, other=0.0)
    angle = tl.where(low, d, d - half)
    cos = tl.load(c_ptr + angle, mask=mask, other=0.0)
    sin = tl.load(s_ptr + angle, mask=mask, other=0.0)
    other = other.to(tl.float32)
    return value * cos + tl.where(low, -other, other) * sin


@jit
def _cached(
    keys_ptr,
    values_ptr,
    table_ptr,
    start,
    end,
    last,
    block_size,
    kv_heads,
    g,
    head_dim,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Keys and values of the tokens from `start` to `end`, but for the `last` of the context."""
    n = start + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)[None, :]
    old = (n < end) & (n < last)
    block = tl.load(table_ptr + n // block_size, mask=old, other=0)
    at = ((block.to(tl.int64) * block_size + n % block_size) * kv_heads + g) * head_dim
    mask = old[:, None] & (d < head_dim)
    k = tl.load(keys_ptr + at[:, None] + d, mask=mask, other=0.0)
    v = tl.load(values_ptr + at[:, None] + d, mask=mask, other=0.0)
    return k, v


@jit
def _attend_step_kernel(
    heads_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    values_ptr,
    slot_ptr,
    table_ptr,
    contexts_ptr,
    out_ptr,
    partial_ptr,
    stats_ptr,
    arrived_ptr,
    scale,
    most_blocks,
    block_size,
    group,
    head_dim,
    SHORT: tl.constexpr,
    LONG: tl.constexpr,
    SHORT_TO: tl.constexpr,
    EARLY: tl.constexpr,
    WIDEN: tl.constexpr,
    CHAINED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Program (g, b, s): split s of sequence b for the `group` query heads of head g."""
    # 1. Find the split: tokens `begin` to `end` of the context, whose last token is the new one.
    g = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    kv_heads = tl.num_programs(0)
    most_splits = tl.num_programs(2)
    h = tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    in_d = d < head_dim
    in_q = (h < group)[:, None] & in_d[None, :]
    context = tl.load(contexts_ptr + b)
    width = tl.where(context <= SHORT_TO, SHORT, LONG)
    num_splits = tl.cdiv(context, width)
    begin = split * width
    row = (b * kv_heads + g) * group + h
    last = context - 1
    end = tl.minimum(begin + width, context)

    # 2. Fetch the first keys and values while the kernel before still runs: what is in the cache
    # already, no kernel of this step writes.
    if EARLY:
        k, v = _cached(
            keys_ptr,
            values_ptr,
            table_ptr + b * most_blocks,
            begin,
            end,
            last,
            block_size,
            kv_heads,
            g,
            head_dim,
            BLOCK_N,
            BLOCK_D,
        )
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    if (begin >= context) & (split > 0):
        return
    if context == 0:
        nothing = tl.zeros((BLOCK_H, BLOCK_D), out_ptr.dtype.element_ty)
        tl.store(out_ptr + row[:, None] * head_dim + d[None, :], nothing, mask=in_q)
        return

    # 3. Rotate the queries and the new key. Whoever owns the last split stores the new token.
    half = head_dim // 2
    cos_ptr += last.to(tl.int64) * half
    sin_ptr += last.to(tl.int64) * half
    mine = heads_ptr + b * (group + 2) * kv_heads * head_dim
    q_rows = mine + (g * group + h)[:, None] * head_dim
    q = _rotated(q_rows, cos_ptr, sin_ptr, d[None, :], half, in_q)
    q = q.to(heads_ptr.dtype.element_ty)
    if WIDEN or BLOCK_H == 1:
        q = q.to(tl.float32)
    key_row = mine + (group * kv_heads + g) * head_dim
    new_k = _rotated(key_row, cos_ptr, sin_ptr, d, half, in_d).to(keys_ptr.dtype.element_ty)
    new_v = tl.load(key_row + kv_heads * head_dim + d, mask=in_d, other=0.0)
    slot = tl.load(slot_ptr + b).to(tl.int64)
    kept = in_d & (end == context) & (slot >= 0)
    tl.store(keys_ptr + (slot * kv_heads + g) * head_dim + d, new_k, mask=kept)
    tl.store(values_ptr + (slot * kv_heads + g) * head_dim + d, new_v, mask=kept)

    # 4. Walk over the split's keys, BLOCK_N at a time, with the new one put in its place.
    top = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        newest = (n == last)[:, None]
        if not EARLY:
            k, v = _cached(
                keys_ptr,
                values_ptr,
                table_ptr + b * most_blocks,
                start,
                end,
                last,
                block_size,
                kv_heads,
                g,
                head_dim,
                BLOCK_N,
                BLOCK_D,
            )
        k_now = tl.where(newest, new_k[None, :], k)
        v_now = tl.where(newest, new_v[None, :], v)
        if EARLY:  # the next keys are on their way while these are computed
            k, v = _cached(
                keys_ptr,
                values_ptr,
                table_ptr + b * most_blocks,
                start + BLOCK_N,
                end,
                last,
                block_size,
                kv_heads,
                g,
                head_dim,
                BLOCK_N,
                BLOCK_D,
            )
        # Score the keys; one head alone has no use for the tensor cores.
        if BLOCK_H == 1:
            scores = tl.sum(q * k_now.to(tl.float32), axis=1)[None, :] * scale
        else:
            if WIDEN:
                k_now, v_now = k_now.to(tl.float32), v_now.to(tl.float32)
            scores = tl.dot(q, tl.trans(k_now), input_precision="ieee") * scale
        scores = tl.where((n < end)[None, :], scores, float("-inf"))
        # Add their weights and weighted values. All weights are relative to the largest score so
        # far, so the sums of earlier keys fade when a larger one comes.
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        fade = tl.exp(top - new_top)
        weight = tl.exp(scores - new_top[:, None])
        total = total * fade + tl.sum(weight, axis=1)
        if BLOCK_H == 1:
            added = tl.sum(tl.trans(weight) * v_now.to(tl.float32), axis=0)[None, :]
        else:
            added = tl.dot(weight.to(v_now.dtype), v_now, input_precision="ieee")
        acc = acc * fade[:, None] + added
        top = new_top

    # 5. A single split is the result; otherwise leave a part of it.
    if num_splits == 1:
        y = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row[:, None] * head_dim + d[None, :], y, mask=in_q)
        return
    part = row * most_splits + split
    tl.store(partial_ptr + part[:, None] * head_dim + d[None, :], acc, mask=in_q)
    tl.store(stats_ptr + part * 2, top, mask=h < group)
    tl.store(stats_ptr + part * 2 + 1, total, mask=h < group)

    # 6. The last program adds all parts, in the order of the splits: a program's part is written
    # before it counts itself. Weights fade to a common largest score, as above.
    tl.debug_barrier()
    arrived_ptr += b * kv_heads + g
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == num_splits - 1:
        tl.store(arrived_ptr, 0)
        top = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_H,), tl.float32)
        acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
        for start in range(0, num_splits, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            there = (s < num_splits)[:, None] & (h < group)[None, :]
            part_SH = row[None, :] * most_splits + s[:, None]
            tops = tl.load(stats_ptr + part_SH * 2, mask=there, other=float("-inf"))
            totals = tl.load(stats_ptr + part_SH * 2 + 1, mask=there, other=0.0)
            parts = tl.load(
                partial_ptr + part_SH[:, :, None] * head_dim + d[None, None, :],
                mask=there[:, :, None] & in_d[None, None, :],
                other=0.0,
            )
            new_top = tl.maximum(top, tl.max(tops, axis=0))
            # Rows of no head keep -inf: their exponent is taken of 0 instead.
            base = tl.where(h < group, new_top, 0.0)
            fade = tl.exp(top - base)
            weight = tl.exp(tops - base[None, :])
            total = total * fade + tl.sum(weight * totals, axis=0)
            acc = acc * fade[:, None] + tl.sum(weight[:, :, None] * parts, axis=0)
            top = new_top
        y = acc / tl.where(h < group, total, 1.0)[:, None]
        y = y.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row[:, None] * head_dim + d[None, :], y, mask=in_q)


def split_lengths(batch: int, group: int) -> tuple[int, int]:
    """Tokens of one split of a context up to SHORT_CONTEXT, and of a longer one.

    Short ones keep the heads of few requests busy, long ones are cheaper to add up.
    """
    if group > 1:
        return (64 if batch <= FEW_ROWS else 256), 512
    return (16, 128) if batch <= FEW_ROWS else (64, 256)


def most_splits(longest: int, short: int, long: int) -> int:
    """Splits of any context up to so many tokens."""
    most = max(1, cdiv(min(longest, SHORT_CONTEXT), short))
    return max(most, cdiv(longest, long)) if longest > SHORT_CONTEXT else most


def step_blocks(batch: int, group: int, head_dim: int, itemsize: int) -> dict[str, int]:
    """Block sizes of `_attend_step_kernel` for `group` query heads a key-value head."""
    block_d = max(16, next_power_of_2(head_dim))
    head_bytes = block_d * itemsize
    short, long = split_lengths(batch, group)
    found = {"SHORT": short, "LONG": long, "SHORT_TO": SHORT_CONTEXT, "BLOCK_D": block_d}
    found["EARLY"] = batch <= FEW_ROWS and group == 1
    # Few warps: each exchange between them costs more than the arithmetic of a few keys.
    if group == 1:
        tokens = max(16, min(short, 32, 16384 // head_bytes))
        shape = {"BLOCK_H": 1, "BLOCK_N": tokens, "BLOCK_S": 16 if block_d <= 64 else 8}
        warps = 1 if short == 16 and head_bytes <= 128 else 4 if block_d > 128 else 2
        return {**found, **shape, "num_warps": warps, "num_stages": 2}
    warps = 16 if head_bytes > 512 else max(2, block_d // 32) if itemsize == 2 else 8
    room = 16384 if itemsize == 2 else 8192
    tokens, heads = max(16, min(64, room // head_bytes)), max(16, next_power_of_2(group))
    shape = {"BLOCK_H": heads, "BLOCK_N": tokens, "BLOCK_S": 1}
    # The widest float32 heads fit into registers only without stages.
    return {**found, **shape, "num_warps": warps, "num_stages": 1 if warps == 16 else 3}


def attend_step(
    heads_BNd: Tensor,
    cos_Pc: Tensor,
    sin_Pc: Tensor,
    keys: Tensor,
    values: Tensor,
    slots_B: Tensor,
    table_BM: Tensor,
    contexts_B: Tensor,
    block_size: int,
    longest: int,
    arrivals: Arrivals,
    blocks: dict[str, int] | None = None,
) -> Tensor:
    """Attended values of one new token a sequence, [B, H, d]; its key and value go to the cache.

    Args:
        heads_BNd: H query heads, then G key heads, then G value heads, not rotated; contiguous.
        cos_Pc, sin_Pc: float32, the model's tables; a token's position is its context - 1.
        keys, values: one layer of the cache, each [slots, G, d], contiguous, dtype of the heads.
        slots_B: int32, the slot of each new token; a negative one is not written.
        table_BM: int32, the blocks of each sequence.
        contexts_B: int32, tokens of each sequence, the new one included; 0 for a row that belongs
            to nobody, whose result is zero.
        block_size: slots of a block.
        longest: no context is longer.
        arrivals: counters that no kernel of another stream uses at the same time.
        blocks: block sizes, for measurements.
    """
    batch, num_heads, head_dim = heads_BNd.shape
    kv_heads = keys.shape[1]
    q_heads = num_heads - 2 * kv_heads
    group = q_heads // kv_heads
    assert head_dim % 2 == 0
    assert head_dim <= MAX_HEAD_DIM
    for tensor in (heads_BNd, cos_Pc, sin_Pc, keys, values, table_BM):
        assert tensor.is_contiguous()
    blocks = blocks or step_blocks(batch, group, head_dim, heads_BNd.element_size())
    splits = most_splits(longest, blocks["SHORT"], blocks["LONG"])
    device = heads_BNd.device
    out_BHd = heads_BNd.new_empty((batch, q_heads, head_dim))
    partial = torch.empty((batch, q_heads, splits, head_dim), dtype=torch.float32, device=device)
    stats = torch.empty((batch, q_heads, splits, 2), dtype=torch.float32, device=device)
    _attend_step_kernel[(kv_heads, batch, splits)](
        heads_BNd,
        cos_Pc,
        sin_Pc,
        keys,
        values,
        slots_B,
        table_BM,
        contexts_B,
        out_BHd,
        partial,
        stats,
        arrivals.of("attend", batch * kv_heads),
        head_dim**-0.5,
        table_BM.shape[1],
        block_size,
        group,
        head_dim,
        WIDEN=INTERPRETED,
        **blocks,
        **chain(device),
    )
    return out_BHd
