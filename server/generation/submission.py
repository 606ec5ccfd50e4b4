"""A request that the engine has accepted, as the routes hold it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from engine.serving.engine import Engine
from engine.serving.request import Request
from server.http.deadlines import TimedEvents

# A text, token ids, or a function that makes token ids, given the engine that will serve them.
Prompt = str | list[int] | Callable[[Engine], list[int]]


@dataclass
class Submission:
    """An accepted request. Who holds it reads its events, and must close it.

    Attributes:
        request: the request.
        engine: the engine that works on it.
        events: its token events until its deadline.
        started: `time.perf_counter()` when it came.
        validation_seconds: how long it took to tokenise and check it.
    """

    request: Request
    engine: Engine
    events: TimedEvents
    started: float
    validation_seconds: float
    _release: Callable[[], None]
    _closed: bool = field(default=False, init=False)

    async def close(self) -> None:
        """Abort the request unless it has finished, and free its place; once is enough."""
        if self._closed:
            return
        self._closed = True
        try:
            await self.events.aclose()
        finally:
            self._release()


async def close_all(submissions: Iterable[Submission]) -> None:
    """Close every submission, even if closing another one raises."""
    await asyncio.gather(*(each.close() for each in submissions))
