"""Attention over the paged cache through Triton kernels; for CUDA.

A `HeadsAttend` takes the heads of a flat batch as the projection leaves them. `StepAttend` serves a
batch that only decodes, in one launch over tensors of one shape, so that `engine.gpu.decode_graphs` can
replay it. `KernelAttend` serves any batch: sequences that decode go through the paged kernel, each
chunk of a prompt through PyTorch's attention over its gathered context.
That batch, too, may lie in tensors of one shape for any lengths (`PromptBatch`), for
`engine.gpu.prompt_graphs`.

Shapes: T tokens, B decoding sequences, M blocks per sequence at most, L tokens of a context, N
heads of all kinds, H query heads, G key-value heads, d head dimension, c = d / 2, P positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.gpu.arrivals import Arrivals
from engine.gpu.attention.attend_step import attend_step
from engine.gpu.attention.paged_kv import MAX_HEAD_DIM, paged_decode, rotate_and_store
from engine.gpu.attention.paged_prefill import paged_prefill
from engine.model.attention import KVCache, PagedAttend, SequenceSpan

# (layer, heads [T, N, d]: queries, keys and values side by side, not rotated) -> [T, H, d]
HeadsAttend = Callable[[int, Tensor], Tensor]


def supports(cache: KVCache) -> bool:
    """Whether the kernels serve this cache: on CUDA, with heads of a width that they take."""
    width = cache.slots.shape[-1]
    return cache.slots.is_cuda and width <= MAX_HEAD_DIM and width % 2 == 0 and not cache.window


@dataclass(frozen=True)
class DecodeBatch:
    """The decoding sequences of a batch.

    Attributes:
        table_BM: int32, the blocks of each sequence, in order.
        contexts_B: int32, tokens in the cache once this step's are written; 0 for a row that
            belongs to nobody.
        longest: no context is longer.
    """

    table_BM: Tensor
    contexts_B: Tensor
    longest: int


class StepAttend:
    """Attention of a batch whose every row is the next token of a sequence.

    Args:
        cache: keys and values.
        tables: the model's cosines and sines, [P, c] each.
        slots_B: int32, the slot of each token; negative for one that is not kept.
        batch: the sequences.
        arrivals: counters that no kernel of another stream uses at the same time.
    """

    def __init__(
        self,
        cache: KVCache,
        tables: tuple[Tensor, Tensor],
        slots_B: Tensor,
        batch: DecodeBatch,
        arrivals: Arrivals,
    ) -> None:
        self.cache = cache
        self._tables = tables
        self._slots_B = slots_B
        self._batch = batch
        self._arrivals = arrivals

    def __call__(self, layer: int, heads_BNd: Tensor) -> Tensor:
        """Attended values [B, H, d] of one layer."""
        batch, (keys, values) = self._batch, self.cache.slots[layer]
        return attend_step(
            heads_BNd,
            *self._tables,
            keys,
            values,
            self._slots_B,
            batch.table_BM,
            batch.contexts_B,
            self.cache.block_size,
            batch.longest,
            self._arrivals,
        )


@dataclass(frozen=True)
class PromptBatch:
    """Any batch, cut into pieces of a sequence each.

    Attributes:
        table_BM: int32, the blocks of each sequence, in order.
        pieces_N4: int32, as `engine.gpu.attention.paged_prefill.cut` makes them.
    """

    table_BM: Tensor
    pieces_N4: Tensor


@dataclass(frozen=True)
class Chunk:
    """A part of a prompt: its rows in the batch, and the slots of its context, itself included."""

    rows: slice
    slots_L: Tensor


class KernelAttend:
    """Attention of one flat batch.

    Args:
        cache: keys and values.
        turns: cosines and sines of each token's position, float32, [T, c] each.
        slots_T: int32 or int64, the slot of each token; negative for one that is not kept.
        decode: the sequences that decode, if any.
        decode_rows: their rows; None: they are the whole batch.
        chunks: parts of prompts.
        prompt: the whole batch, instead of the three before.
    """

    def __init__(
        self,
        cache: KVCache,
        turns: tuple[Tensor, Tensor],
        slots_T: Tensor,
        decode: DecodeBatch | None,
        decode_rows: Tensor | None = None,
        chunks: tuple[Chunk, ...] = (),
        prompt: PromptBatch | None = None,
    ) -> None:
        self.cache = cache
        self._turns = turns
        self._slots_T = slots_T
        self._prompt = prompt
        self._decode = decode
        self._decode_rows = decode_rows
        self._chunks = chunks

    @classmethod
    def of_spans(
        cls, cache: KVCache, spans: list[SequenceSpan], turns: tuple[Tensor, Tensor]
    ) -> KernelAttend:
        """Tables and slots on the cache's device, for any batch."""
        device, size = cache.slots.device, cache.block_size
        most = max(len(s.blocks) for s in spans)
        table_BM = torch.tensor(
            [s.blocks + [0] * (most - len(s.blocks)) for s in spans], dtype=torch.int32
        )
        row_T = torch.tensor([b for b, s in enumerate(spans) for _ in range(s.length)])
        at_T = torch.tensor([c for s in spans for c in range(s.context - s.length, s.context)])
        slots_T = (table_BM[row_T, at_T // size] * size + at_T % size).to(device)
        inside = torch.arange(size)
        chunks = tuple(
            Chunk(
                slice(s.start, s.start + s.length),
                (table_BM[b][:, None] * size + inside).flatten()[: s.context].to(device),
            )
            for b, s in enumerate(spans)
            if s.length > 1
        )
        decoding = [b for b, s in enumerate(spans) if s.length == 1]
        if not decoding:
            return cls(cache, turns, slots_T, None, None, chunks)
        contexts = [spans[b].context for b in decoding]
        contexts_B = torch.tensor(contexts, dtype=torch.int32, device=device)
        if not chunks:
            batch = DecodeBatch(table_BM.to(device), contexts_B, max(contexts))
            return cls(cache, turns, slots_T, batch)
        rows = torch.tensor([spans[b].start for b in decoding], device=device)
        batch = DecodeBatch(table_BM[decoding].to(device), contexts_B, max(contexts))
        return cls(cache, turns, slots_T, batch, rows, chunks)

    def __call__(self, layer: int, heads_TNd: Tensor) -> Tensor:
        """Attended values [T, H, d] of one layer."""
        keys, values = self.cache.slots[layer]
        q_THd = rotate_and_store(heads_TNd, *self._turns, keys, values, self._slots_T)
        if self._prompt is not None:
            table_BM, pieces_N4 = self._prompt.table_BM, self._prompt.pieces_N4
            return paged_prefill(q_THd, keys, values, table_BM, pieces_N4, self.cache.block_size)
        if not self._chunks:
            return self._decoded(q_THd, keys, values)
        out_THd = torch.empty_like(q_THd)
        if self._decode_rows is not None:
            rows = self._decode_rows
            out_THd.index_copy_(0, rows, self._decoded(q_THd[rows], keys, values))
        for chunk in self._chunks:
            k_LGd, v_LGd = keys[chunk.slots_L], values[chunk.slots_L]
            out_THd[chunk.rows] = PagedAttend.chunk(q_THd[chunk.rows], k_LGd, v_LGd)
        return out_THd

    def _decoded(self, q_BHd: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        batch = self._decode
        assert batch is not None
        size = self.cache.block_size
        return paged_decode(
            q_BHd, keys, values, batch.table_BM, batch.contexts_B, size, batch.longest
        )
