"""Attention of prompts over the paged cache against its reference, at sizes that fit no block."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.gpu.attention.attend_chunks import (
    attend_chunks,
    attend_chunks_reference,
    chunk_blocks,
    cut,
    most_pieces,
)

pytestmark = pytest.mark.usefixtures("poisoned")

RelativeError = Callable[[Tensor, Tensor], float]

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}

# (computed before, queries) of each sequence
Lengths = list[tuple[int, int]]


def spans_of(lengths: Lengths) -> list[tuple[int, int, int]]:
    starts = [sum(n for _, n in lengths[:b]) for b in range(len(lengths))]
    return [(start, n, before) for start, (before, n) in zip(starts, lengths, strict=True)]


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=6),
    st.integers(0, 50),
    st.sampled_from([1, 4, 16]),
)
def test_pieces_cover_every_row_once_and_are_no_more_than_foreseen(
    lengths: Lengths, padding: int, block_q: int
) -> None:
    spans = spans_of(lengths)
    tokens = sum(n for _, n in lengths) + padding
    pieces = cut(spans, tokens, block_q)
    assert len(pieces) <= most_pieces(tokens, len(spans), block_q)
    rows = [(first + i, position + i, row) for first, n, position, row in pieces for i in range(n)]
    expected = [(s + i, p + i, b) for b, (s, n, p) in enumerate(spans) for i in range(n)]
    assert sorted(rows)[: tokens - padding] == expected
    assert [row for row, _, _ in sorted(rows)] == list(range(tokens))
    assert all(position < 0 for row, position, _ in rows if row >= tokens - padding)
    assert max(n for _, n, _, _ in pieces) <= block_q


class Case:
    """Random queries and a cache whose blocks are scattered; unowned slots hold NaN."""

    def __init__(
        self,
        lengths: Lengths,
        heads: tuple[int, int, int],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        q_heads, kv_heads, width = heads
        self.lengths, self.block_size, self.device = lengths, block_size, device
        self.block_q = chunk_blocks(q_heads // kv_heads, width, dtype.itemsize)["BLOCK_Q"]
        most = max(-(-(before + n) // block_size) for before, n in lengths) + 2
        order = torch.randperm(most * len(lengths)).view(len(lengths), most)
        self.table_BM = order.int().to(device)
        tokens = sum(n for _, n in lengths)
        self.q_THd = torch.randn(tokens, q_heads, width).to(device, dtype)
        shape = (2, order.numel() * block_size, kv_heads, width)
        self.keys, self.values = torch.full(shape, torch.nan).to(device, dtype).unbind(0)
        for b, (before, count) in enumerate(lengths):
            n = torch.arange(before + count)
            slots = (order[b][n // block_size] * block_size + n % block_size).to(device)
            for cache in (self.keys, self.values):
                cache[slots] = torch.randn(len(n), kv_heads, width).to(device, dtype)

    def pieces(self, lengths: Lengths, padding: int = 0) -> Tensor:
        tokens = sum(n for _, n in lengths) + padding
        pieces = cut(spans_of(lengths), tokens, self.block_q)
        # A graph's tensor has room for more.
        return torch.tensor([*pieces, (0, 0, 0, 0)], dtype=torch.int32, device=self.device)

    def run(self, q_THd: Tensor, table_BM: Tensor, pieces_N4: Tensor) -> Tensor:
        return attend_chunks(q_THd, self.keys, self.values, table_BM, pieces_N4, self.block_size)


LENGTHS: list[tuple[Lengths, int]] = [
    ([(0, 5), (40, 1), (100, 70)], 5),
    ([(0, 1)], 16),
    ([(39, 1), (0, 140), (5, 3)], 7),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [(4, 2, 20), (3, 1, 64), (2, 2, 12), (2, 1, 130)], ids=str)
@pytest.mark.parametrize(("lengths", "block_size"), LENGTHS)
def test_equals_the_reference(
    lengths: Lengths,
    block_size: int,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    relative_error: RelativeError,
) -> None:
    case = Case(lengths, heads, block_size, dtype, device)
    pieces_N4 = case.pieces(lengths)
    out_THd = case.run(case.q_THd, case.table_BM, pieces_N4)
    wide = (t.double() for t in (case.q_THd, case.keys, case.values))
    expected = attend_chunks_reference(*wide, case.table_BM, pieces_N4, block_size)
    assert out_THd.dtype == dtype
    assert relative_error(out_THd, expected) < TOLERANCE[dtype]


def test_the_reference_is_plain_attention(device: torch.device) -> None:
    case = Case([(0, 9)], (2, 2, 16), 4, torch.float64, device)
    slots = case.table_BM[0].long().repeat_interleave(4)[:9] * 4 + torch.arange(9).to(device) % 4
    q, k, v = (t.transpose(0, 1) for t in (case.q_THd, case.keys[slots], case.values[slots]))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    pieces_N4 = case.pieces(case.lengths)
    found = attend_chunks_reference(case.q_THd, case.keys, case.values, case.table_BM, pieces_N4, 4)
    torch.testing.assert_close(found, expected.transpose(0, 1))


@pytest.mark.parametrize("heads", [(2, 2, 16), (4, 2, 16)], ids=str)
def test_neither_company_nor_cuts_change_a_bit(
    heads: tuple[int, int, int], device: torch.device
) -> None:
    case = Case([(0, 150), (30, 20)], heads, 8, torch.bfloat16, device)
    together = case.run(case.q_THd, case.table_BM, case.pieces(case.lengths))
    alone = case.run(case.q_THd[150:], case.table_BM[1:], case.pieces([(30, 20)]))
    assert torch.equal(alone, together[150:])
    for begin, end in ((0, 1), (1, 70), (70, 150)):
        part = case.run(case.q_THd[begin:end], case.table_BM, case.pieces([(begin, end - begin)]))
        assert torch.equal(part, together[begin:end])


def test_padding_gives_zeros_and_reads_nothing(device: torch.device) -> None:
    case = Case([(0, 6)], (2, 2, 16), 4, torch.float32, device)
    padded = torch.cat([case.q_THd, torch.full((150, 2, 16), torch.nan, device=device)])
    out_THd = case.run(padded, case.table_BM, case.pieces([(0, 6)], padding=150))
    assert bool((out_THd[6:] == 0).all())
    assert torch.equal(out_THd[:6], case.run(case.q_THd, case.table_BM, case.pieces([(0, 6)])))
