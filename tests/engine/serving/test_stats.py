"""What a step that only decodes counts as."""

from __future__ import annotations

import pytest

from engine.serving.stats import DECODE_BATCHES, DECODE_KINDS, Stats, decode_kind


@pytest.mark.parametrize(
    ("activated", "kind"),
    [([16], "dense"), ([4], "sparse"), ([16, 16], "dense"), ([16, 4], "mixed"), ([0, 4], "sparse")],
)
def test_kinds(activated: list[int], kind: str) -> None:
    assert decode_kind(activated, 16) == kind


@pytest.mark.parametrize(
    ("requests", "batch"),
    [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (64, 64), (65, 128), (4096, 4096)],
)
def test_batches_are_named_by_their_upper_bound(requests: int, batch: int) -> None:
    stats = Stats(num_layers=2, num_experts=8, kv_blocks=1)
    stats.record_decode([4] * requests, 10, 0.5)
    sparse, at = DECODE_KINDS.index("sparse"), DECODE_BATCHES.index(batch)
    numbers = stats.snapshot()
    assert numbers.decode_steps[sparse][at] == 1
    assert sum(map(sum, numbers.decode_steps)) == 1


def test_what_a_past_engine_counted_is_added() -> None:
    first, second = (Stats(num_layers=n, num_experts=8, kv_blocks=1) for n in (2, 3))
    first.record_decode([16], 16, 0.5)
    second.record_decode([24], 24, 0.25)
    second.absorb(first.snapshot())
    numbers, dense = second.snapshot(), DECODE_KINDS.index("dense")
    assert numbers.decode_steps[dense][0] == 2
    assert numbers.decode_step_seconds[dense][0] == 0.75
    assert numbers.decode_loaded[dense][0] == numbers.decode_loadable[dense][0] == 16 + 24
