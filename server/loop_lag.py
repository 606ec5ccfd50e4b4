"""How late the event loop is: what every answer waits for beside the engine."""

from __future__ import annotations

import asyncio
from typing import Final

from engine.serving.histogram import Histogram

INTERVAL: Final = 0.1  # seconds
BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class LoopLag:
    """Asks to be woken every INTERVAL seconds, and notes how much later it was."""

    def __init__(self) -> None:
        self.histogram = Histogram(BUCKETS)

    async def watch(self) -> None:
        """Measure for ever."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + INTERVAL
            await asyncio.sleep(INTERVAL)
            self.histogram.observe(max(0.0, loop.time() - due))
