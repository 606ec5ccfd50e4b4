"""Rotation of queries and keys by position, and the writing of a batch to the paged cache.

The cache of one layer is keys and values, each [slots, G, d]; token i of a sequence lies in slot
`table[i // block_size] * block_size + i % block_size`. `rotate_and_store` takes the heads as the
projection leaves them (queries, keys and values side by side), rotates queries and keys, and writes
keys and values to their slots, in one launch. `attend_chunks` then reads them. A decoding step does
all of it at once (`attend_step`).

Shapes: T tokens, H query heads, G key-value heads, N = H + 2 G heads, d head dimension, c = d / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.gpu._triton import cdiv, jit, next_power_of_2, tl

# The widest heads that the attention kernels take.
MAX_HEAD_DIM = 256


def rotate_and_store_reference(
    heads_TNd: Tensor,
    cos_Tc: Tensor,
    sin_Tc: Tensor,
    keys: Tensor,
    values: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """What `rotate_and_store` computes."""
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
    # 1. Read both halves of the heads, and the cosines and sines of the token's position.
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

    # 2. Rotate each pair (c, c + d / 2), but leave the values as they are.
    plain = n >= q_heads + kv_heads
    out_first = tl.where(plain, first, first * cos - second * sin).to(q_ptr.dtype.element_ty)
    out_second = tl.where(plain, second, second * cos + first * sin).to(q_ptr.dtype.element_ty)

    # 3. Store queries side by side, and keys and values in the token's slot, if it has one.
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


def rotate_blocks(heads: int, head_dim: int) -> dict[str, int]:
    """Block sizes of `_rotate_store_kernel`."""
    return {
        "BLOCK_N": min(8, next_power_of_2(heads)),
        "BLOCK_C": next_power_of_2(head_dim // 2),
        "num_warps": 2,
    }


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
