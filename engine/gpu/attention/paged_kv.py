# Triton types a kernel's arguments by itself, at each launch.
# mypy: disable-error-code="no-untyped-def"
"""Keys and values in a paged cache: writing a batch's tokens to it, and decoding over it.

The cache of one layer is keys and values, each [slots, G, d]; token i of a sequence lies in slot
`table[i // block_size] * block_size + i % block_size`. Nothing here knows a length on the host: a
batch of one shape may be replayed from a CUDA graph while its contexts grow.

`rotate_and_store` takes the heads as the projection leaves them (queries, keys and values side by
side), rotates queries and keys by position, and writes keys and values to their slots: one launch.

`paged_decode` attends one query a sequence over that sequence's context. Program (g, b, s) takes
the query heads that share key-value head g and split s of the context of sequence b, SPLIT tokens
each; a second launch adds the splits in a fixed order, unless there is only one. Where a context is
cut depends on its own length alone, so the result is the same, bit for bit, in any run, in any
company and with any bound on the length.

Shapes: T tokens, B sequences, H query heads, G key-value heads, N = H + 2 G heads, d head
dimension, c = d / 2, M blocks per sequence at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.gpu._triton import INTERPRETED, cdiv, jit, next_power_of_2, tl

# Tokens of one split of a context; the second launch adds this many splits at a time.
SPLIT = 256
SPLITS_AT_ONCE = 8

MAX_HEAD_DIM = 256


# --- references ----------------------------------------------------------------------------------


def rotate_and_store_reference(
    heads_TNd: Tensor,
    cos_Tc: Tensor,
    sin_Tc: Tensor,
    keys: Tensor,
    values: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """As `rotate_and_store`."""
    kv_heads = keys.shape[1]
    q_THd, k_TGd = heads_TNd[:, : -2 * kv_heads], heads_TNd[:, -2 * kv_heads : -kv_heads]
    v_TGd = heads_TNd[:, -kv_heads:]
    real = (slots_T >= 0).nonzero().flatten()
    keys[slots_T[real].long()] = _rotate(k_TGd, cos_Tc, sin_Tc)[real]
    values[slots_T[real].long()] = v_TGd[real]
    return _rotate(q_THd, cos_Tc, sin_Tc)


def _rotate(x_THd: Tensor, cos_Tc: Tensor, sin_Tc: Tensor) -> Tensor:
    first, second = x_THd.float().chunk(2, dim=-1)
    cos, sin = cos_Tc[:, None], sin_Tc[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_THd.dtype)


def paged_decode_reference(
    q_BHd: Tensor,
    keys: Tensor,
    values: Tensor,
    table_BM: Tensor,
    contexts_B: Tensor,
    block_size: int,
) -> Tensor:
    """As `paged_decode`, sequence by sequence, in float32 or the inputs' float64."""
    wide = torch.promote_types(q_BHd.dtype, torch.float32)
    out_BHd = torch.zeros_like(q_BHd, dtype=wide)
    group = q_BHd.shape[1] // keys.shape[1]
    for b, context in enumerate(contexts_B.tolist()):
        n = torch.arange(context, device=q_BHd.device)
        slots = table_BM[b].long()[n // block_size] * block_size + n % block_size
        k_HLd, v_HLd = (
            t[slots].to(wide).repeat_interleave(group, 1).transpose(0, 1) for t in (keys, values)
        )
        if context:
            scores_HL = (k_HLd @ q_BHd[b].to(wide)[:, :, None])[..., 0] * q_BHd.shape[-1] ** -0.5
            out_BHd[b] = (scores_HL.softmax(-1)[:, None] @ v_HLd)[:, 0]
    return out_BHd.to(q_BHd.dtype)


# --- kernels -------------------------------------------------------------------------------------


@jit
def _rotate_store_kernel(
    heads_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    values_ptr,
    slot_ptr,
    q_ptr,
    q_heads,
    kv_heads,
    half,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Program (t, j): BLOCK_N heads of token t."""
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    num_heads = q_heads + 2 * kv_heads
    real = (n < num_heads) & (c < half)
    at = heads_ptr + (t * num_heads + n) * (2 * half) + c
    first = tl.load(at, mask=real, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=real, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + t * half + c, mask=c < half, other=0.0)
    sin = tl.load(sin_ptr + t * half + c, mask=c < half, other=0.0)
    plain = n >= q_heads + kv_heads
    out_first = tl.where(plain, first, first * cos - second * sin).to(q_ptr.dtype.element_ty)
    out_second = tl.where(plain, second, second * cos + first * sin).to(q_ptr.dtype.element_ty)

    is_q = real & (n < q_heads)
    q_at = q_ptr + (t * q_heads + n) * (2 * half) + c
    tl.store(q_at, out_first, mask=is_q)
    tl.store(q_at + half, out_second, mask=is_q)
    slot = tl.load(slot_ptr + t).to(tl.int64)
    is_k = real & (n >= q_heads) & (n < q_heads + kv_heads) & (slot >= 0)
    k_at = keys_ptr + (slot * kv_heads + n - q_heads) * (2 * half) + c
    tl.store(k_at, out_first, mask=is_k)
    tl.store(k_at + half, out_second, mask=is_k)
    is_v = real & plain & (slot >= 0)
    v_at = values_ptr + (slot * kv_heads + n - q_heads - kv_heads) * (2 * half) + c
    tl.store(v_at, out_first, mask=is_v)
    tl.store(v_at + half, out_second, mask=is_v)


@jit
def _decode_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    table_ptr,
    contexts_ptr,
    out_ptr,
    partial_ptr,
    stats_ptr,
    scale,
    most_blocks,
    block_size,
    group,
    head_dim,
    SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
    ONLY: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (g, b, s): split s of sequence b for the `group` query heads of head g.

    ONLY: there is one split, so the result is final.
    """
    g = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    kv_heads = tl.num_programs(0)
    context = tl.load(contexts_ptr + b)
    begin = split * SPLIT
    if (begin >= context) & (split > 0):
        return
    end = tl.minimum(begin + SPLIT, context)
    h = tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)[None, :]
    in_q = (h < group)[:, None] & (d < head_dim)
    row = (b * kv_heads + g) * group + h
    q = tl.load(q_ptr + row[:, None] * head_dim + d, mask=in_q, other=0.0)
    if WIDEN or BLOCK_H == 1:
        q = q.to(tl.float32)
    top = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        block = tl.load(table_ptr + b * most_blocks + n // block_size, mask=n < end, other=0)
        slot = block.to(tl.int64) * block_size + n % block_size
        at = ((slot * kv_heads + g) * head_dim)[:, None] + d
        in_n = (n < end)[:, None] & (d < head_dim)
        k = tl.load(keys_ptr + at, mask=in_n, other=0.0)
        v = tl.load(values_ptr + at, mask=in_n, other=0.0)
        if BLOCK_H == 1:  # one head a program: no tile for the tensor cores
            scores = tl.sum(q * k.to(tl.float32), axis=1)[None, :] * scale
        else:
            if WIDEN:
                k, v = k.to(tl.float32), v.to(tl.float32)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where((n < end)[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        fade = tl.exp(top - new_top)
        weight = tl.exp(scores - new_top[:, None])
        total = total * fade + tl.sum(weight, axis=1)
        if BLOCK_H == 1:
            added = tl.sum(tl.trans(weight) * v.to(tl.float32), axis=0)[None, :]
        else:
            added = tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        acc = acc * fade[:, None] + added
        top = new_top
    if ONLY:
        y = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(out_ptr + row[:, None] * head_dim + d, y.to(out_ptr.dtype.element_ty), mask=in_q)
    else:
        part = row * tl.num_programs(2) + split
        tl.store(partial_ptr + part[:, None] * head_dim + d, acc, mask=in_q)
        tl.store(stats_ptr + part * 2, top, mask=h < group)
        tl.store(stats_ptr + part * 2 + 1, total, mask=h < group)


@jit
def _merge_kernel(
    partial_ptr,
    stats_ptr,
    contexts_ptr,
    out_ptr,
    q_heads,
    head_dim,
    most_splits,
    SPLIT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program i: the splits of row i = b * H + h, added in order."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    num_splits = tl.cdiv(tl.load(contexts_ptr + row // q_heads), SPLIT)
    top = float("-inf")
    total = 0.0
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, num_splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        part = row * most_splits + s
        tops = tl.load(stats_ptr + part * 2, mask=s < num_splits, other=float("-inf"))
        totals = tl.load(stats_ptr + part * 2 + 1, mask=s < num_splits, other=0.0)
        partial = tl.load(
            partial_ptr + part[:, None] * head_dim + d[None, :],
            mask=(s < num_splits)[:, None] & (d < head_dim)[None, :],
            other=0.0,
        )
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        fade = tl.exp(top - new_top)
        weight = tl.exp(tops - new_top)
        total = total * fade + tl.sum(weight * totals, axis=0)
        acc = acc * fade + tl.sum(weight[:, None] * partial, axis=0)
        top = new_top
    y = acc / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + row * head_dim + d, y.to(out_ptr.dtype.element_ty), mask=d < head_dim)


# --- launchers -----------------------------------------------------------------------------------


def rotate_blocks(heads: int, head_dim: int) -> dict[str, int]:
    """Block sizes of `_rotate_store_kernel`."""
    return {
        "BLOCK_N": min(8, next_power_of_2(heads)),
        "BLOCK_C": next_power_of_2(head_dim // 2),
        "num_warps": 2,
    }


def decode_blocks(group: int, head_dim: int, itemsize: int) -> dict[str, int]:
    """Block sizes of `_decode_kernel` for `group` query heads a key-value head."""
    block_d = max(16, next_power_of_2(head_dim))
    return {
        "BLOCK_H": 1 if group == 1 else max(16, next_power_of_2(group)),
        "BLOCK_N": max(16, min(64, 8192 // (block_d * itemsize))),
        "BLOCK_D": block_d,
        "num_warps": 4,
        "num_stages": 2 if group == 1 else 3,
    }


def merge_blocks(head_dim: int) -> dict[str, int]:
    """Block sizes of `_merge_kernel`."""
    block_d = max(16, next_power_of_2(head_dim))
    return {"BLOCK_S": SPLITS_AT_ONCE, "BLOCK_D": block_d, "num_warps": 1 if block_d <= 64 else 2}


def rotate_and_store(
    heads_TNd: Tensor,
    cos_Tc: Tensor,
    sin_Tc: Tensor,
    keys: Tensor,
    values: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """Rotate queries and keys, write keys and values to the cache, return the queries [T, H, d].

    Args:
        heads_TNd: H query heads, then G key heads, then G value heads; contiguous; T >= 1.
        cos_Tc, sin_Tc: float32, of each token's position.
        keys, values: one layer of the cache, each [slots, G, d], contiguous, dtype of the heads.
        slots_T: int32 or int64; the slot of each token; a negative one is not written.
    """
    num_tokens, num_heads, head_dim = heads_TNd.shape
    kv_heads = keys.shape[1]
    q_heads = num_heads - 2 * kv_heads
    assert heads_TNd.is_contiguous()
    assert keys.is_contiguous()
    assert values.is_contiguous()
    assert cos_Tc.dtype == sin_Tc.dtype == torch.float32
    q_THd = torch.empty(
        (num_tokens, q_heads, head_dim), dtype=heads_TNd.dtype, device=heads_TNd.device
    )
    blocks = rotate_blocks(num_heads, head_dim)
    _rotate_store_kernel[(num_tokens, cdiv(num_heads, blocks["BLOCK_N"]))](
        heads_TNd,
        cos_Tc.contiguous(),
        sin_Tc.contiguous(),
        keys,
        values,
        slots_T,
        q_THd,
        q_heads,
        kv_heads,
        head_dim // 2,
        **blocks,
    )
    return q_THd


def paged_decode(
    q_BHd: Tensor,
    keys: Tensor,
    values: Tensor,
    table_BM: Tensor,
    contexts_B: Tensor,
    block_size: int,
    longest: int,
) -> Tensor:
    """Attention of one query a sequence over that sequence's own context: [B, H, d].

    Args:
        q_BHd: rotated queries, contiguous; B >= 1, d <= MAX_HEAD_DIM.
        keys, values: one layer of the cache, each [slots, G, d], contiguous, dtype of the queries.
        table_BM: int32, contiguous; the blocks of each sequence, in order; what lies behind the
            context's last block is not read.
        contexts_B: int32; tokens in the cache, the query's own included; 0 gives zeros.
        block_size: slots of a block.
        longest: no context is longer; it sizes the grid and changes no result.
    """
    num_seqs, q_heads, head_dim = q_BHd.shape
    kv_heads = keys.shape[1]
    assert head_dim <= MAX_HEAD_DIM
    assert q_heads % kv_heads == 0
    assert table_BM.dtype == contexts_B.dtype == torch.int32
    assert table_BM.is_contiguous()
    q_BHd = q_BHd.contiguous()
    splits = max(1, cdiv(longest, SPLIT))
    out_BHd = torch.empty_like(q_BHd)
    # With one split nothing is merged, and these are not touched.
    parts = num_seqs * q_heads * splits if splits > 1 else 0
    partial, stats = (
        torch.empty((parts, n), dtype=torch.float32, device=q_BHd.device) for n in (head_dim, 2)
    )
    _decode_kernel[(kv_heads, num_seqs, splits)](
        q_BHd,
        keys,
        values,
        table_BM,
        contexts_B,
        out_BHd,
        partial,
        stats,
        head_dim**-0.5,
        table_BM.shape[1],
        block_size,
        q_heads // kv_heads,
        head_dim,
        SPLIT=SPLIT,
        WIDEN=INTERPRETED,
        ONLY=splits == 1,
        **decode_blocks(q_heads // kv_heads, head_dim, keys.element_size()),
    )
    if splits > 1:
        _merge_kernel[(num_seqs * q_heads,)](
            partial,
            stats,
            contexts_B,
            out_BHd,
            q_heads,
            head_dim,
            splits,
            SPLIT=SPLIT,
            **merge_blocks(head_dim),
        )
    return out_BHd
