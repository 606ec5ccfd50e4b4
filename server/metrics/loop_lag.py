"""Measures how late the event loop is, which delays every answer."""

from __future__ import annotations

import asyncio
from typing import Final

from engine.histogram import Histogram

INTERVAL: Final = 0.1  # seconds
BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class LoopLag:
    """Sleeps INTERVAL seconds again and again, and records how much later it wakes."""

    def __init__(self) -> None:
        self.histogram = Histogram(BUCKETS)

    async def watch(self) -> None:
        """Measure for ever."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + INTERVAL
            await asyncio.sleep(INTERVAL)
            self.histogram.observe(max(0.0, loop.time() - due))
