"""Attention: rotation, and one signature for every way to look keys and values up.

`Attend` is what a decoder layer calls: given this layer's queries, keys and values of a flat batch
of T tokens, return the attended values. Training and the naive `generate` use `causal_attend` over
whole sequences; the engine uses `PagedAttend` over its block-structured cache. Both end in the
same scaled-dot-product attention.

Shapes: T tokens, H query heads, G key-value heads, d head dimension, B sequences, L length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# (layer, q [T, H, d], k [T, G, d], v [T, G, d]) -> [T, H, d]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def rotate(x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    """Rotate the halves of each head by its token's position; [T, H, d] in the input's dtype."""
    first, second = x_THd.float().chunk(2, dim=-1)
    cos, sin = cos_Td[:, None], sin_Td[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_THd.dtype)


def causal_attend(batch: int, length: int, window: int = 0) -> Attend:
    """Attention inside each of `batch` sequences of `length` tokens laid out one after another.

    Args:
        batch: sequences in the flat batch.
        length: tokens of each sequence.
        window: how many last tokens a token sees, itself included; 0 means all.
    """
    hides = 0 < window < length

    def attend(_layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        q, k, v = (
            t.view(batch, length, *t.shape[1:]).transpose(1, 2) for t in (q_THd, k_TGd, v_TGd)
        )
        gqa = q_THd.shape[1] != k_TGd.shape[1]
        if not hides:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        else:
            mask = window_mask(length, length, window, q.device)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
        return out.transpose(1, 2).reshape(q_THd.shape)

    return attend


def window_mask(n: int, length: int, window: int, device: torch.device) -> Tensor:
    """Which of `length` tokens the last n see, bool [n, length]; a `window` of 0 hides none."""
    mask = torch.ones((n, length), dtype=torch.bool, device=device).tril(length - n)
    return mask.triu(length - n - window + 1) if window else mask


@dataclass(frozen=True)
class SequenceSpan:
    """One sequence's part of a flat batch.

    Attributes:
        start: its first row in the batch.
        length: its rows: 1 when decoding, more for a chunk of a prompt.
        context: tokens in the cache once this step's are written (the chunk included).
        blocks: the cache blocks that hold them, in order.
    """

    start: int
    length: int
    context: int
    blocks: list[int]


class KVCache:
    """Keys and values of all layers, [layers, 2, slots, G, d]; a block is `block_size` slots.

    A token sees the last `window` tokens, itself included, or all where that is 0.
    """

    def __init__(
        self,
        layers: int,
        num_blocks: int,
        block_size: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        window: int = 0,
    ) -> None:
        self.block_size = block_size
        self.window = window
        shape = (layers, 2, num_blocks * block_size, heads, head_dim)
        self.slots = torch.zeros(shape, dtype=dtype, device=device)

    @staticmethod
    def bytes_per_block(
        layers: int, block_size: int, heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        return layers * 2 * block_size * heads * head_dim * dtype.itemsize


class PagedAttend:
    """Attention of one flat batch over the paged cache; an `Attend`.

    Writes the batch's keys and values to their slots, then attends: all decoding sequences in one
    padded call, each prompt chunk in one of its own.
    """

    def __init__(self, cache: KVCache, spans: Sequence[SequenceSpan]) -> None:
        self.cache = cache
        device, size = cache.slots.device, cache.block_size
        most = max(len(s.blocks) for s in spans)
        table = torch.tensor([s.blocks + [0] * (most - len(s.blocks)) for s in spans])
        slots_BL = (table[:, :, None] * size + torch.arange(size)).flatten(1)
        rows = [b for b, s in enumerate(spans) for _ in range(s.length)]
        columns = [c for s in spans for c in range(s.context - s.length, s.context)]
        self._slots_T = slots_BL[rows, columns].to(device)
        self._chunks = [
            (s, slots_BL[b, : s.context].to(device)) for b, s in enumerate(spans) if s.length > 1
        ]
        decoding = [b for b, s in enumerate(spans) if s.length == 1]
        self._decode_rows = torch.tensor([spans[b].start for b in decoding], device=device)
        if decoding:
            contexts = torch.tensor([spans[b].context for b in decoding])
            longest = int(contexts.max())
            mask_BL = torch.arange(longest) < contexts[:, None]
            if cache.window:
                mask_BL &= torch.arange(longest) >= contexts[:, None] - cache.window
            # Padding points at the sequence's own slots or block 0: masked, but always in bounds.
            self._decode_slots = slots_BL[decoding, :longest].to(device)
            self._decode_mask = mask_BL[:, None, None].to(device)

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        keys, values = self.cache.slots[layer]
        keys.index_copy_(0, self._slots_T, k_TGd)
        values.index_copy_(0, self._slots_T, v_TGd)
        out_THd = torch.empty_like(q_THd)
        if self._decode_rows.numel():
            out_THd[self._decode_rows] = self._decode(q_THd[self._decode_rows], keys, values)
        for span, slots in self._chunks:
            rows = slice(span.start, span.start + span.length)
            out_THd[rows] = self.chunk(q_THd[rows], keys[slots], values[slots], self.cache.window)
        return out_THd

    def _decode(self, q_BHd: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """One query a sequence over its own context, padded to the longest."""
        k_BGLd = keys[self._decode_slots].transpose(1, 2)
        v_BGLd = values[self._decode_slots].transpose(1, 2)
        out = F.scaled_dot_product_attention(
            q_BHd[:, :, None],
            k_BGLd,
            v_BGLd,
            attn_mask=self._decode_mask,
            enable_gqa=q_BHd.shape[1] != k_BGLd.shape[1],
        )
        return out[:, :, 0]

    @staticmethod
    def chunk(q_nHd: Tensor, k_LGd: Tensor, v_LGd: Tensor, window: int = 0) -> Tensor:
        """A chunk of n queries at the end of a context of L tokens, causal among themselves."""
        n, length = q_nHd.shape[0], k_LGd.shape[0]
        q, k, v = (t.transpose(0, 1)[None] for t in (q_nHd, k_LGd, v_LGd))
        gqa = q_nHd.shape[1] != k_LGd.shape[1]
        hides = 0 < window < length
        if n == length and not hides:  # a prompt's first chunk; without a mask PyTorch is fastest
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        else:
            mask = window_mask(n, length, window if hides else 0, q.device)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
        return out[0].transpose(0, 1)
