"""The paged cache's kernels against their references, at sizes that fit no block."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.gpu.attention import paged_kv
from engine.gpu.attention.paged_kv import (
    paged_decode,
    paged_decode_reference,
    rotate_and_store,
    rotate_and_store_reference,
)
from engine.model.attention import rotate
from engine.model.rotary import rope_table

pytestmark = pytest.mark.usefixtures("poisoned")

RelativeError = Callable[[Tensor, Tensor], float]

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


class Case:
    """Random queries and a cache whose blocks are scattered; unowned slots hold NaN."""

    def __init__(
        self,
        contexts: list[int],
        heads: tuple[int, int, int],
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        q_heads, kv_heads, width = heads
        self.block_size = block_size
        most = max(-(-c // block_size) for c in contexts) + 2
        order = torch.randperm(most * len(contexts))
        self.table_BM = order.view(len(contexts), most).int().to(device)
        self.contexts_B = torch.tensor(contexts, dtype=torch.int32, device=device)
        self.q_BHd = torch.randn(len(contexts), q_heads, width).to(device, dtype)
        shape = (2, most * len(contexts) * block_size, kv_heads, width)
        self.keys, self.values = torch.full(shape, torch.nan).to(device, dtype).unbind(0)
        for b, context in enumerate(contexts):
            n = torch.arange(context)
            slots = order.view(len(contexts), most)[b][n // block_size] * block_size
            for cache in (self.keys, self.values):
                fresh = torch.randn(context, kv_heads, width).to(device, dtype)
                cache[(slots + n % block_size).to(device)] = fresh

    def run(self, longest: int, rows: slice = slice(None)) -> Tensor:
        table, contexts = self.table_BM[rows], self.contexts_B[rows]
        size = self.block_size
        return paged_decode(
            self.q_BHd[rows], self.keys, self.values, table, contexts, size, longest
        )

    def expected(self) -> Tensor:
        wide = (t.double() for t in (self.q_BHd, self.keys, self.values))
        return paged_decode_reference(*wide, self.table_BM, self.contexts_B, self.block_size)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("contexts", "heads", "block_size"),
    [
        ([1, 33, 300], (3, 3, 20), 5),
        ([70, 5], (6, 2, 64), 16),
        ([40], (5, 1, 12), 7),
        ([520, 256, 257], (4, 2, 16), 16),
    ],
)
def test_decode_equals_the_reference(
    contexts: list[int],
    heads: tuple[int, int, int],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    relative_error: RelativeError,
) -> None:
    case = Case(contexts, heads, block_size, dtype, device)
    out = case.run(max(contexts))
    assert out.dtype == dtype
    assert relative_error(out, case.expected()) < TOLERANCE[dtype]


@pytest.mark.parametrize("heads", [(2, 2, 16), (4, 2, 16)])
def test_neither_company_nor_the_bound_changes_a_bit(
    heads: tuple[int, int, int], device: torch.device
) -> None:
    case = Case([300, 12, 256], heads, 8, torch.bfloat16, device)
    together = case.run(300)
    assert torch.equal(together, case.run(9 * paged_kv.SPLIT))
    for b, context in enumerate([300, 12, 256]):
        assert torch.equal(case.run(context, slice(b, b + 1)), together[b : b + 1])


@pytest.mark.parametrize("longest", [8, 600])
def test_an_empty_context_gives_zeros_and_reads_nothing(longest: int, device: torch.device) -> None:
    case = Case([6, 1], (2, 2, 16), 4, torch.float32, device)
    case.contexts_B[1] = 0
    case.table_BM[1] = 1 << 30
    out = case.run(longest)
    assert bool((out[1] == 0).all())
    assert bool(out[0].isfinite().all())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("q_heads", "kv_heads", "width"), [(3, 3, 20), (6, 2, 64), (9, 1, 2)])
def test_rotate_and_store_equals_the_reference(
    q_heads: int, kv_heads: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    tokens = 5
    heads_TNd = torch.randn(tokens, q_heads + 2 * kv_heads, width).to(device, dtype)
    cos, sin = (t.to(device) for t in rope_table(50, width, 10_000.0))
    positions = torch.tensor([3, 0, 49, 7, 8], device=device)
    slots_T = torch.tensor([4, -1, 0, 11, 7], dtype=torch.int32, device=device)
    results = []
    for function in (rotate_and_store, rotate_and_store_reference):
        keys, values = torch.zeros(2, 12, kv_heads, width).to(device, dtype).unbind(0)
        q = function(heads_TNd, cos[positions], sin[positions], keys, values, slots_T)
        results.append((q, keys, values))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    q, keys, values = results[0]
    rotated = rotate(heads_TNd, cos[positions], sin[positions])
    torch.testing.assert_close(q, rotated[:, :q_heads])
    torch.testing.assert_close(keys[11], rotated[3, q_heads : q_heads + kv_heads])
    assert torch.equal(values[7], heads_TNd[4, q_heads + kv_heads :])
    unwritten = [s for s in range(12) if s not in slots_T.tolist()]
    assert bool((keys[unwritten] == 0).all())
