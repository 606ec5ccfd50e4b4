"""Paged attention against plain scaled-dot-product attention over each whole sequence."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.model.attention import KVCache, PagedAttend, SequenceSpan, causal_attend, rotate
from engine.model.rotary import rope_table

HEADS, KV_HEADS, WIDTH = 4, 2, 8


class Sequence:
    """Random queries, keys and values of one sequence, and its place in the cache."""

    def __init__(self, length: int, seed: int, kv_heads: int = KV_HEADS) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.q = torch.randn(length, HEADS, WIDTH, generator=generator)
        self.k = torch.randn(length, kv_heads, WIDTH, generator=generator)
        self.v = torch.randn(length, kv_heads, WIDTH, generator=generator)
        self.blocks: list[int] = []
        self.computed = 0
        self.out: list[Tensor] = []

    def plain(self) -> Tensor:
        """Causal attention over the sequence, with keys and values repeated per query head."""
        repeat = HEADS // self.k.shape[1]
        k = self.k.repeat_interleave(repeat, 1).transpose(0, 1)
        v = self.v.repeat_interleave(repeat, 1).transpose(0, 1)
        out = F.scaled_dot_product_attention(self.q.transpose(0, 1), k, v, is_causal=True)
        return out.transpose(0, 1)


def advance(cache: KVCache, layer: int, parts: list[tuple[Sequence, int]]) -> None:
    """Attend to the next tokens of each sequence in one flat batch."""
    spans, start = [], 0
    for sequence, count in parts:
        spans.append(SequenceSpan(start, count, sequence.computed + count, sequence.blocks))
        start += count

    def flat(name: str) -> Tensor:
        rows = [getattr(s, name)[s.computed : s.computed + count] for s, count in parts]
        return torch.cat(rows)

    out = PagedAttend(cache, spans)(layer, flat("q"), flat("k"), flat("v"))
    for (sequence, count), span in zip(parts, spans, strict=True):
        sequence.out.append(out[span.start : span.start + count])
        sequence.computed += count


def new_cache(blocks: int, block_size: int, kv_heads: int = KV_HEADS) -> KVCache:
    cache = KVCache(2, blocks, block_size, kv_heads, WIDTH, torch.float32, "cpu")
    cache.slots.fill_(1e4)  # what was never written must never be read
    return cache


@settings(max_examples=40)
@given(
    st.integers(1, 5),
    st.lists(st.integers(1, 17), min_size=1, max_size=4),
    st.integers(0, 1 << 32),
)
def test_any_schedule_equals_plain_attention(
    block_size: int, lengths: list[int], seed: int
) -> None:
    """Chunks and single tokens of several sequences, in any mixture, over scattered blocks."""
    chance = random.Random(seed)
    sequences = [Sequence(length, number) for number, length in enumerate(lengths)]
    free = chance.sample(range(100), 100)
    cache = new_cache(100, block_size)
    while unfinished := [s for s in sequences if s.computed < s.q.shape[0]]:
        parts = []
        for sequence in unfinished:
            count = chance.randint(0, min(6, sequence.q.shape[0] - sequence.computed))
            if count:
                while len(sequence.blocks) * block_size < sequence.computed + count:
                    sequence.blocks.append(free.pop())
                parts.append((sequence, count))
        if parts:
            advance(cache, 1, parts)
    for sequence in sequences:
        torch.testing.assert_close(torch.cat(sequence.out), sequence.plain())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads(kv_heads: int) -> None:
    cache = new_cache(10, 4, kv_heads)
    sequence = Sequence(9, 3, kv_heads)
    sequence.blocks = [7, 2, 5]
    for count in (4, 1, 3, 1):
        advance(cache, 0, [(sequence, count)])
    torch.testing.assert_close(torch.cat(sequence.out), sequence.plain())


def test_layers_do_not_mix() -> None:
    cache = new_cache(4, 4)
    sequence = Sequence(4, 0)
    sequence.blocks = [1]
    advance(cache, 0, [(sequence, 4)])
    assert bool((cache.slots[1] == 1e4).all())
    assert bool((cache.slots[0, :, 4:8] != 1e4).all())
    assert bool((cache.slots[0, :, :4] == 1e4).all())


def test_causal_attend_separates_sequences() -> None:
    sequences = [Sequence(6, seed) for seed in range(3)]
    q, k, v = (torch.cat([getattr(s, name) for s in sequences]) for name in "qkv")
    expected = torch.cat([s.plain() for s in sequences])
    torch.testing.assert_close(causal_attend(3, 6)(0, q, k, v), expected)


def test_rotation_depends_on_distance_alone() -> None:
    cos, sin = rope_table(64, WIDTH, 10_000.0)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, WIDTH, generator=generator)
    k = torch.randn(1, 1, WIDTH, generator=generator)

    def score(query_at: int, key_at: int) -> float:
        rotated_q = rotate(q, cos[[query_at]], sin[[query_at]])
        rotated_k = rotate(k, cos[[key_at]], sin[[key_at]])
        return float((rotated_q * rotated_k).sum())

    assert score(40, 33) == pytest.approx(score(9, 2), abs=1e-5)
    assert abs(score(40, 33) - score(9, 3)) > 1e-3
    assert torch.equal(rotate(q, cos[[0]], sin[[0]]), q)


def test_bytes_per_block() -> None:
    cache = new_cache(10, 4)
    each = KVCache.bytes_per_block(2, 4, KV_HEADS, WIDTH, torch.float32)
    assert each * 10 == cache.slots.numel() * cache.slots.element_size()
