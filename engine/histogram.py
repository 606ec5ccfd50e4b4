"""Histograms of plain numbers, and the bounds of their buckets. Times are in seconds."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

# The bounds that dashboards of other servers expect, with finer ones below for small models.
FIRST_TOKEN_BUCKETS: Final = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160),
)
INTER_TOKEN_BUCKETS: Final = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    *(0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
REQUEST_BUCKETS: Final = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8),
    *(1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480),
)
TOKEN_BUCKETS: Final = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
BATCH_BUCKETS: Final = tuple(1 << e for e in range(14))
RATIO_BUCKETS: Final = (0.02, 0.05, *(i / 10 for i in range(1, 11)))


class Histogram:
    """Counts of observations per bucket; bucket i holds values up to and including `bounds[i]`.

    Attributes:
        bounds: upper bounds, ascending.
        counts: observations per bucket, one more than bounds: the last holds what exceeds them.
        sum: the sum of all observations.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        assert list(bounds) == sorted(set(bounds)), "bucket bounds must ascend"
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def __add__(self, other: Histogram) -> Histogram:
        assert self.bounds == other.bounds
        total = Histogram(self.bounds)
        total.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        total.sum = self.sum + other.sum
        return total
