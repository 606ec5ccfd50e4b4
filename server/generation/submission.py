"""A request that the engine has accepted: what routes read, and must close."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from engine.engine import Engine
from engine.request import Request
from server.http.deadlines import TimedEvents

# A text, token ids, or what makes ids of the engine that will serve them.
Prompt = str | list[int] | Callable[[Engine], list[int]]


@dataclass
class Submission:
    """An accepted request, its engine and events, and how long the steps before the engine took."""

    request: Request
    engine: Engine
    events: TimedEvents
    started: float
    validation_seconds: float
    _release: Callable[[], None]
    _closed: bool = field(default=False, init=False)

    async def close(self) -> None:
        """Abort what has not finished and give up the place; may be called again."""
        if self._closed:
            return
        self._closed = True
        try:
            await self.events.aclose()
        finally:
            self._release()


async def close_all(submissions: Iterable[Submission]) -> None:
    """Close every one, whatever closing another raises."""
    await asyncio.gather(*(each.close() for each in submissions))
