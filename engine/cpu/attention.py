"""Attention of one flat batch on the CPU's kernels: an `Attend` over `native.PagedCache`.

Decoding rows and chunks of prompts go through one kernel, and a row's result does not depend on how
its prompt was cut into chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.cpu import native
from engine.cpu.layers import CachedSequences
from engine.model.attention import SequenceSpan


class NativeAttend:
    """Writes the batch's keys and values to their slots, then attends.

    Args:
        cache: keys and values of all layers.
        block_size: tokens of one of the scheduler's blocks; a multiple of native.KV_BLOCK.
        spans: where each sequence's rows and blocks are.
    """

    def __init__(
        self, cache: native.PagedCache, block_size: int, spans: list[SequenceSpan]
    ) -> None:
        self._cache = cache
        each = block_size // native.KV_BLOCK
        most = max(len(span.blocks) for span in spans)
        padded = [span.blocks + [0] * (most - len(span.blocks)) for span in spans]
        blocks_BM = torch.tensor(padded, dtype=torch.int32)
        parts = torch.arange(each, dtype=torch.int32)
        self._table_BM = (blocks_BM[:, :, None] * each + parts).flatten(1).contiguous()
        self._slot_T = torch.tensor(
            [
                span.blocks[position // block_size] * block_size + position % block_size
                for span in spans
                for position in range(span.context - span.length, span.context)
            ]
        )
        self._first_B, self._rows_B, self._context_B = (
            torch.tensor(numbers, dtype=torch.int32)
            for numbers in zip(*((s.start, s.length, s.context) for s in spans), strict=True)
        )

    @property
    def sequences(self) -> CachedSequences:
        """The batch, for kernels that run whole layers."""
        return CachedSequences(
            self._cache,
            self._slot_T,
            self._table_BM,
            self._first_B,
            self._rows_B,
            self._context_B,
        )

    def __call__(self, layer: int, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        self._cache.store(layer, self._slot_T, k_TGd, v_TGd)
        return self._cache.attend(
            layer, q_THd, self._table_BM, self._first_B, self._rows_B, self._context_B
        )
