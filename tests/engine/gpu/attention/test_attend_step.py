"""Attention's decoding step against its reference: contexts around every cut, scattered blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.gpu.arrivals import Arrivals
from engine.gpu.attention.attend_step import (
    FEW_ROWS,
    SHORT_CONTEXT,
    attend_step,
    attend_step_reference,
    most_splits,
    split_lengths,
)
from engine.model.rotary import rope_table

pytestmark = pytest.mark.usefixtures("poisoned")

RelativeError = Callable[[Tensor, Tensor], float]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
NOBODY = 0


class Case:
    """Random heads and a cache whose blocks are scattered; slots without a token hold NaN."""

    def __init__(
        self,
        contexts: list[int],
        heads: tuple[int, int, int],
        size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        q_heads, kv_heads, width = heads
        self.size, batch = size, len(contexts)
        most = max(-(-c // size) for c in contexts) + 1
        table = torch.randperm(most * batch).view(batch, most)
        self.table_BM = table.int().to(device)
        self.contexts_B = torch.tensor(contexts, dtype=torch.int32, device=device)
        self.heads_BNd = torch.randn(batch, q_heads + 2 * kv_heads, width).to(device, dtype)
        self.cos, self.sin = (t.to(device) for t in rope_table(max(contexts) + 1, width, 1e4))
        shape = (2, most * batch * size, kv_heads, width)
        self.cache = torch.full(shape, torch.nan).to(device, dtype)
        slots = []
        for b, context in enumerate(contexts):
            n = torch.arange(max(context, 1))
            found = (table[b][n // size] * size + n % size).to(device)
            if context > 1:
                known = torch.randn(2, context - 1, kv_heads, width).to(device, dtype)
                self.cache[:, found[:-1]] = known
            slots.append(int(found[-1]) if context else -1)
        self.slots_B = torch.tensor(slots, dtype=torch.int32, device=device)

    def run(
        self, longest: int, arrivals: Arrivals, rows: slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        cache = self.cache.clone()
        out = attend_step(
            self.heads_BNd[rows].contiguous(),
            self.cos,
            self.sin,
            *cache.unbind(0),
            self.slots_B[rows],
            self.table_BM[rows].contiguous(),
            self.contexts_B[rows],
            self.size,
            longest,
            arrivals,
        )
        return out, cache

    def expected(self) -> tuple[Tensor, Tensor]:
        cache = self.cache.clone()
        out = attend_step_reference(
            self.heads_BNd,
            self.cos,
            self.sin,
            *cache.unbind(0),
            self.slots_B,
            self.table_BM,
            self.contexts_B,
            self.size,
        )
        return out, cache


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("contexts", "heads", "size"),
    [
        ([1, 33, NOBODY, 64, 65, 300], (3, 3, 20), 5),
        ([16, 17, NOBODY, 129], (3, 3, 20), 5),
        ([70, 5], (6, 2, 64), 16),
        ([40], (5, 1, 12), 7),
        ([SHORT_CONTEXT, SHORT_CONTEXT + 1, 2], (2, 1, 16), 16),
    ],
)
def test_step_equals_its_reference(
    contexts: list[int],
    heads: tuple[int, int, int],
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    relative_error: RelativeError,
) -> None:
    case, arrivals = Case(contexts, heads, size, dtype, device), Arrivals(device)
    actual, cache = case.run(max(contexts), arrivals)
    expected, expected_cache = case.expected()
    assert relative_error(actual, expected) < TOLERANCE[dtype]
    written = ~expected_cache.isnan()
    assert torch.equal(cache.isnan(), expected_cache.isnan())
    assert relative_error(cache[written], expected_cache[written]) < TOLERANCE[dtype]
    assert not arrivals.of("attend", 1).any(), "counters are left at zero"


def test_company_and_bounds_change_no_bit(device: torch.device) -> None:
    contexts = [200, 1, 65, 90]
    assert len(contexts) == FEW_ROWS
    case = Case(contexts, (4, 2, 16), 16, torch.bfloat16, device)
    arrivals = Arrivals(device)
    together, _ = case.run(2048, arrivals)
    for b, context in enumerate(contexts):
        alone, _ = case.run(context, arrivals, slice(b, b + 1))
        assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize(("batch", "group"), [(1, 1), (9, 1), (1, 4)])
def test_splits_bound_every_context(batch: int, group: int) -> None:
    short, long = split_lengths(batch, group)
    for longest in (1, short, short + 1, SHORT_CONTEXT, SHORT_CONTEXT + 1, 10_000):
        needed = max(
            -(-c // (short if c <= SHORT_CONTEXT else long)) for c in range(1, longest + 1)
        )
        assert most_splits(longest, short, long) == needed
