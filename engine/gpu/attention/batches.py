"""Attention of the engine's batches over the paged cache, by Triton kernels; for CUDA.

A `HeadsAttend` takes the heads of a flat batch as the projection leaves them. There are two kernels
below it, and each is the only one for its job:

- `StepAttend` serves rows that are the next token of a sequence each, in one launch
  (`attend_step`). It cuts long contexts into splits.
- `ChunkAttend` serves chunks of prompts (`attend_chunks`), after `rotate_and_store` has written
  them. Decoding rows may be among them, as chunks of one token; their contexts are not split.

Both take tensors of one shape for any lengths, so that `engine.gpu.decode_graphs` and
`engine.gpu.prompt_graphs` can replay them. `attend_spans` makes what serves a batch that is
launched: chunks by the one kernel, decoding rows beside them by the other.

Shapes: T tokens, B decoding sequences, M blocks per sequence at most, N heads of all kinds, H query
heads, G key-value heads, d head dimension, c = d / 2, P positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.gpu.arrivals import Arrivals
from engine.gpu.attention.attend_chunks import attend_chunks, chunk_blocks, cut
from engine.gpu.attention.attend_step import attend_step
from engine.gpu.attention.rotate_and_store import MAX_HEAD_DIM, rotate_and_store
from engine.model.attention import KVCache, SequenceSpan

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
class ChunkBatch:
    """Chunks of sequences, cut into pieces.

    Attributes:
        table_BM: int32, the blocks of each sequence, in order.
        pieces_N4: int32, as `engine.gpu.attention.attend_chunks.cut` makes them.
    """

    table_BM: Tensor
    pieces_N4: Tensor


class ChunkAttend:
    """Attention of a batch of chunks.

    Args:
        cache: keys and values.
        turns: cosines and sines of each token's position, float32, [T, c] each.
        slots_T: int32 or int64, the slot of each token; negative for one that is not kept.
        batch: the chunks.
    """

    def __init__(
        self, cache: KVCache, turns: tuple[Tensor, Tensor], slots_T: Tensor, batch: ChunkBatch
    ) -> None:
        self.cache = cache
        self._turns = turns
        self._slots_T = slots_T
        self._batch = batch

    def __call__(self, layer: int, heads_TNd: Tensor) -> Tensor:
        """Attended values [T, H, d] of one layer; a row in no piece holds anything."""
        batch, (keys, values) = self._batch, self.cache.slots[layer]
        q_THd = rotate_and_store(heads_TNd, *self._turns, keys, values, self._slots_T)
        return attend_chunks(
            q_THd, keys, values, batch.table_BM, batch.pieces_N4, self.cache.block_size
        )


class MixedAttend:
    """Attention of chunks with decoding rows beside them.

    Args:
        chunks: of all rows; decoding ones are in no piece and have no slot.
        steps: of the decoding rows alone.
        rows_B: int64, which rows these are.
    """

    def __init__(self, chunks: ChunkAttend, steps: StepAttend, rows_B: Tensor) -> None:
        self._chunks = chunks
        self._steps = steps
        self._rows_B = rows_B

    def __call__(self, layer: int, heads_TNd: Tensor) -> Tensor:
        """Attended values [T, H, d] of one layer."""
        out_THd = self._chunks(layer, heads_TNd)
        return out_THd.index_copy_(0, self._rows_B, self._steps(layer, heads_TNd[self._rows_B]))


def attend_spans(
    cache: KVCache, spans: Sequence[SequenceSpan], tables: tuple[Tensor, Tensor], group: int
) -> HeadsAttend:
    """The attention of any batch.

    Args:
        cache: keys and values.
        spans: of the batch, in the order of its rows.
        tables: the model's cosines and sines, [P, c] each.
        group: query heads that share a key-value head.
    """
    device, size = cache.slots.device, cache.block_size
    most = max(len(span.blocks) for span in spans)
    table_BM = torch.tensor(
        [span.blocks + [0] * (most - len(span.blocks)) for span in spans], dtype=torch.int32
    )
    row_T = torch.tensor([b for b, span in enumerate(spans) for _ in range(span.length)])
    at_T = torch.tensor([n for s in spans for n in range(s.context - s.length, s.context)])
    slots_T = table_BM[row_T, at_T // size] * size + at_T % size
    decoding = [b for b, span in enumerate(spans) if span.length == 1]
    chunked = [b for b, span in enumerate(spans) if span.length > 1]
    rows_B = torch.tensor([spans[b].start for b in decoding], dtype=torch.long)

    def steps() -> StepAttend:
        contexts = [spans[b].context for b in decoding]
        contexts_B = torch.tensor(contexts, dtype=torch.int32, device=device)
        batch = DecodeBatch(table_BM[decoding].to(device), contexts_B, max(contexts))
        return StepAttend(cache, tables, slots_T[rows_B].int().to(device), batch, Arrivals(device))

    def chunks() -> ChunkAttend:
        width, itemsize = cache.slots.shape[-1], cache.slots.element_size()
        block_q = chunk_blocks(group, width, itemsize)["BLOCK_Q"]
        lengths = [(s.start, s.length, s.context - s.length) for s in (spans[b] for b in chunked)]
        pieces = cut(lengths, 0, block_q)
        pieces_N4 = torch.tensor(pieces, dtype=torch.int32, device=device)
        batch = ChunkBatch(table_BM[chunked].to(device), pieces_N4)
        kept_T = slots_T.index_fill(0, rows_B, -1).to(device)
        cos, sin = (table[at_T.to(device)] for table in tables)
        return ChunkAttend(cache, (cos, sin), kept_T, batch)

    if not chunked:
        return steps()
    if not decoding:
        return chunks()
    return MixedAttend(chunks(), steps(), rows_B.to(device))
