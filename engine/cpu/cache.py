"""Keys and values in a paged cache, and attention over it, on the CPU's kernels.

Shapes: T tokens, B sequences, L layers, M blocks per sequence at most, H query heads, G key-value
heads, d head dimension.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from engine.cpu.native import FLOAT, LONG, call, pointer

KV_BLOCK: Final = 16  # tokens of one block of keys and values


class PagedCache:
    """Keys and values of L layers in blocks of KV_BLOCK tokens; keys are packed for their product.

    Attributes:
        window: how many last tokens a token sees, itself included; 0 means all.
        keys: [L, blocks, G, d * KV_BLOCK]: inputs by tokens, in bfloat16 in pairs of inputs.
        values: [L, blocks, G, KV_BLOCK * d].
    """

    def __init__(
        self,
        layers: int,
        slots: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        window: int = 0,
    ) -> None:
        blocks = slots // KV_BLOCK
        self.window = window
        self.heads, self.head_dim, self.dtype = heads, head_dim, dtype
        shape = (layers, blocks, heads, head_dim * KV_BLOCK)
        self.keys = torch.zeros(shape, dtype=dtype)
        self.values = torch.zeros(shape, dtype=dtype)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def store(self, layer: int, slot_T: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> None:
        """Put keys and values [T, G, d] into slots, int64 [T]; heads lie together in each row."""
        T, G, d = k_TGd.shape
        call(
            "store_kv", self.dtype, pointer(k_TGd), pointer(v_TGd), pointer(slot_T),
            pointer(self.keys[layer]), pointer(self.values[layer]), LONG(T), LONG(G), LONG(d),
            LONG(k_TGd.stride(0)), LONG(v_TGd.stride(0)),
        )  # fmt: skip

    def attend(
        self,
        layer: int,
        q_THd: Tensor,
        table_BM: Tensor,
        first_B: Tensor,
        rows_B: Tensor,
        context_B: Tensor,
    ) -> Tensor:
        """Causal attention of every row over its own sequence: [T, H, d].

        Args:
            q_THd: queries; heads lie together in each row.
            table_BM: int32, the KV_BLOCK-blocks of each sequence.
            first_B, rows_B: int32, each sequence's first row in the batch, and how many.
            context_B: int32, tokens of each sequence in the cache, its rows of this batch included.
        """
        T, H, d = q_THd.shape
        out_THd = torch.empty(T, H, d, dtype=self.dtype)
        B, M = table_BM.shape
        call(
            "attend", self.dtype, pointer(q_THd), pointer(self.keys[layer]),
            pointer(self.values[layer]), pointer(table_BM), pointer(first_B), pointer(rows_B),
            pointer(context_B), pointer(out_THd), LONG(B), LONG(H), LONG(self.heads), LONG(d),
            LONG(q_THd.stride(0)), LONG(M), LONG(self.window), FLOAT(d**-0.5),
        )  # fmt: skip
        return out_THd
