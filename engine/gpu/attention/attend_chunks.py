"""Attention of chunks of prompts over the paged cache, in tensors of one shape for any lengths.

The queries of a batch are cut into pieces of one sequence each (`cut`), which the device reads from
a tensor: where a piece lies in the batch, at which position it begins, whose blocks it reads. So a
batch padded to some number of tokens can be replayed from a CUDA graph, whatever chunks, contexts
and decoding sequences it holds. Program (g, n) takes piece n for the query heads that share
key-value head g, and walks over the keys that precede it, causally, adding as it goes (flash
attention, Dao et al. 2022). Keys are taken in blocks that begin at position 0, so a token's result
does not depend on how its prompt was cut, nor on its company. A piece walks over its whole context
alone, so a single query with a long context is better served by `attend_step`.

Shapes: T tokens, H query heads, G key-value heads, d head dimension, N pieces, M blocks per
sequence at most.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from engine.gpu._triton import INTERPRETED, cdiv, jit, next_power_of_2, tl
from engine.gpu.attention.rotate_and_store import MAX_HEAD_DIM

# (first row, rows, position of the first row, row of the table)
Piece = tuple[int, int, int, int]


def cut(spans: Iterable[tuple[int, int, int]], num_tokens: int, block_q: int) -> list[Piece]:
    """Pieces of at most `block_q` queries that cover the spans, those with most keys first.

    Rows behind the last span become pieces without keys, whose attention is zero.

    Args:
        spans: (first row, rows, position of the first row) of each sequence, in the table's order
            and in ascending order of rows.
        num_tokens: T.
        block_q: from `chunk_blocks`.
    """
    pieces: list[Piece] = []
    end = 0
    for row, (first, rows, position) in enumerate(spans):
        pieces += [
            (first + i, min(block_q, rows - i), position + i, row) for i in range(0, rows, block_q)
        ]
        end = first + rows
    pieces += [
        (i, n, -n, 0)
        for i in range(end, num_tokens, block_q)
        for n in [min(block_q, num_tokens - i)]
    ]
    pieces.sort(key=lambda piece: -(piece[1] + piece[2]))
    return pieces


def most_pieces(num_tokens: int, sequences: int, block_q: int) -> int:
    """Pieces into which `num_tokens` of so many sequences and some padding can fall."""
    return min(num_tokens, cdiv(num_tokens, block_q) + sequences)


def attend_chunks_reference(
    q_THd: Tensor,
    keys: Tensor,
    values: Tensor,
    table_BM: Tensor,
    pieces_N4: Tensor,
    block_size: int,
) -> Tensor:
    """What `attend_chunks` computes, query by query, in float32 or the inputs' float64."""
    wide = torch.promote_types(q_THd.dtype, torch.float32)
    out_THd = torch.zeros_like(q_THd, dtype=wide)
    group = q_THd.shape[1] // keys.shape[1]
    for first, rows, position, row in pieces_N4.tolist():
        for i in range(rows):
            n = torch.arange(max(0, position + i + 1), device=q_THd.device)
            slots = table_BM[row].long()[n // block_size] * block_size + n % block_size
            k_HLd, v_HLd = (
                t[slots].to(wide).repeat_interleave(group, 1).transpose(0, 1)
                for t in (keys, values)
            )
            q_Hd1 = q_THd[first + i].to(wide)[:, :, None]
            if n.numel():
                weights_HL = ((k_HLd @ q_Hd1)[..., 0] * q_THd.shape[-1] ** -0.5).softmax(-1)
                out_THd[first + i] = (weights_HL[:, None] @ v_HLd)[:, 0]
    return out_THd.to(q_THd.dtype)


@jit
def _add_keys(
    q,
    acc,
    top,
    total,
    n,
    seen,
    keys_ptr,
    values_ptr,
    blocks_ptr,
    g,
    kv_heads,
    head_dim,
    scale,
    MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add the keys n to the running sums of a piece; query i sees those below seen[i].

    Without `MASKED`, every query sees all of them.
    """
    # 1. Find the keys through the table of blocks, and read them and their values.
    d = tl.arange(0, BLOCK_D)[None, :]
    last = tl.max(seen, axis=0)
    if MASKED:
        block = tl.load(blocks_ptr + n // PAGE, mask=n < last, other=0)
        in_n = (n < last)[:, None] & (d < head_dim)
    else:
        block = tl.load(blocks_ptr + n // PAGE)
        in_n = d < head_dim
    slot = block.to(tl.int64) * PAGE + n % PAGE
    at = ((slot * kv_heads + g) * head_dim)[:, None] + d
    k = tl.load(keys_ptr + at, mask=in_n, other=0.0)
    v = tl.load(values_ptr + at, mask=in_n, other=0.0)
    if WIDEN:
        k, v = k.to(tl.float32), v.to(tl.float32)

    # 2. Score them.
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if MASKED:
        scores = tl.where(n[None, :] < seen[:, None], scores, float("-inf"))

    # 3. Add their weights and weighted values. All weights are relative to the largest score so
    # far, so sums of earlier keys fade when a larger one comes.
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    fade = tl.exp2(top - new_top)
    weight = tl.exp2(scores - new_top[:, None])
    total = total * fade + tl.sum(weight, axis=1)
    acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, new_top, total


@jit
def _attend_chunks_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    table_ptr,
    spans_ptr,
    out_ptr,
    scale,
    most_blocks,
    group,
    head_dim,
    WIDEN: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (g, n): piece n for the `group` query heads of key-value head g.

    Row m of a program is query m // BLOCK_H of the piece, head m % BLOCK_H of the group. `scale`
    turns scores into exponents of two.
    """
    # 1. Read the piece: its rows in the batch, the first one's position, and whose blocks it reads.
    g = tl.program_id(0)
    kv_heads = tl.num_programs(0)
    piece = spans_ptr + tl.program_id(1) * 4
    rows = tl.load(piece + 1)
    if rows == 0:
        return
    first = tl.load(piece).to(tl.int64)
    position = tl.load(piece + 2)
    blocks_ptr = table_ptr + tl.load(piece + 3).to(tl.int64) * most_blocks

    # 2. Read its queries.
    m = tl.arange(0, BLOCK_Q * BLOCK_H)
    i, h = m // BLOCK_H, m % BLOCK_H
    d = tl.arange(0, BLOCK_D)[None, :]
    real = ((i < rows) & (h < group))[:, None] & (d < head_dim)
    at = (((first + i) * kv_heads + g) * group + h)[:, None] * head_dim + d
    q = tl.load(q_ptr + at, mask=real, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)

    # 3. Walk over the keys: first whole blocks of keys that every query sees, without masks; then
    # the rest. Rows behind the piece see
    # what its last one sees, so that they too have something to add.
    seen = position + tl.minimum(i, rows - 1) + 1
    top = tl.full((BLOCK_Q * BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q * BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_Q * BLOCK_H, BLOCK_D), tl.float32)
    whole = tl.maximum(position + 1, 0) // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        acc, top, total = _add_keys(
            q,
            acc,
            top,
            total,
            n,
            seen,
            keys_ptr,
            values_ptr,
            blocks_ptr,
            g,
            kv_heads,
            head_dim,
            scale,
            False,
            WIDEN,
            PAGE,
            BLOCK_D,
        )
    for start in range(whole, position + rows, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        acc, top, total = _add_keys(
            q,
            acc,
            top,
            total,
            n,
            seen,
            keys_ptr,
            values_ptr,
            blocks_ptr,
            g,
            kv_heads,
            head_dim,
            scale,
            True,
            WIDEN,
            PAGE,
            BLOCK_D,
        )

    # 4. Divide by the sum of the weights; a row without keys has none.
    y = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=real)


def chunk_blocks(group: int, head_dim: int, itemsize: int) -> dict[str, int]:
    """Block sizes of `_attend_chunks_kernel` for `group` query heads a key-value head."""
    block_d = max(16, next_power_of_2(head_dim))
    block_h = next_power_of_2(group)
    narrow = block_d <= (128 if itemsize == 2 else 64)
    if itemsize == 2:
        rows, keys, warps, stages = (128, 64, 8, 3) if narrow else (64, 32, 8, 2)
    else:
        rows, keys, warps, stages = (32, 32, 4, 2) if narrow else (16, 16, 4, 2)
    return {
        "BLOCK_Q": max(1, rows // block_h),
        "BLOCK_H": block_h,
        "BLOCK_N": keys,
        "BLOCK_D": block_d,
        "num_warps": warps,
        "num_stages": stages,
    }


def attend_chunks(
    q_THd: Tensor,
    keys: Tensor,
    values: Tensor,
    table_BM: Tensor,
    pieces_N4: Tensor,
    block_size: int,
    blocks: dict[str, int] | None = None,
) -> Tensor:
    """Attention of every query over its own sequence up to itself: [T, H, d].

    Args:
        q_THd: rotated queries, contiguous; d <= MAX_HEAD_DIM.
        keys, values: one layer of the cache, each [slots, G, d], contiguous, dtype of the queries;
            the batch's own are written already.
        table_BM: int32, contiguous; the blocks of each sequence, in order; what lies behind the
            last one that is needed is not read.
        pieces_N4: int32, contiguous, from `cut` for the same BLOCK_Q; pieces of no rows are
            skipped. A row in no piece is not written.
        block_size: slots of a block.
        blocks: from `chunk_blocks`, or others to try.
    """
    q_heads, head_dim = q_THd.shape[1:]
    kv_heads = keys.shape[1]
    assert head_dim <= MAX_HEAD_DIM
    assert q_heads % kv_heads == 0
    assert table_BM.dtype == pieces_N4.dtype == torch.int32
    assert q_THd.is_contiguous()
    group = q_heads // kv_heads
    out_THd = torch.empty_like(q_THd)
    _attend_chunks_kernel[(kv_heads, pieces_N4.shape[0])](
        q_THd,
        keys,
        values,
        table_BM,
        pieces_N4,
        out_THd,
        head_dim**-0.5 * math.log2(math.e),
        table_BM.shape[1],
        group,
        head_dim,
        WIDEN=INTERPRETED,
        PAGE=block_size,
        **(blocks or chunk_blocks(group, head_dim, q_THd.element_size())),
    )
    return out_THd
