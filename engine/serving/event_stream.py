"""Token events on their way from the engine's thread to the coroutines that read them.

An `EventStream` has the events of one request; an `Outbox` brings what the engine's thread has to
say to the streams of one event loop. Each hand-over wakes the loop, the readers and, behind them, a
socket each, and takes the interpreter's lock away from the engine; so an outbox collects what comes
within a few milliseconds and hands it over at once. A request's first and last event never wait.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from engine.serving.request import Request, TokenEvent

logger = logging.getLogger(__name__)


class EventStream:
    """The events of one request, in order, up to and including its terminal event.

    Iterate over it for one event at a time, or call `take` for all that are there. Closing the
    stream early aborts the request, as does cancelling a task that waits for its next event. Use it
    as an asynchronous context manager, or call `aclose`. All of it belongs to the thread of the
    loop that made it.
    """

    def __init__(self, request: Request, abort: Callable[[str], None]) -> None:
        self.request = request
        self.loop = asyncio.get_running_loop()
        self._abort = abort
        self._events: deque[TokenEvent] = deque()
        self._some = asyncio.Event()  # set while there are events
        self._complete = False  # the terminal event has been put
        self._exhausted = False  # the terminal event has been read, or the reader has gone

    def put(self, events: Sequence[TokenEvent]) -> None:
        """Append events; nothing may follow a terminal one."""
        assert not self._complete, "an event after the terminal one"
        self._complete = events[-1].finish_reason is not None
        self._events.extend(events)
        self._some.set()

    async def take(self) -> list[TokenEvent]:
        """The events that nobody has read yet, at least one; none once the stream has ended."""
        if self._exhausted:
            return []
        await self._wait()
        events = list(self._events)
        self._events.clear()
        self._read(events[-1])
        return events

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenEvent:
        if self._exhausted:
            raise StopAsyncIteration
        await self._wait()
        event = self._events.popleft()
        self._read(event)
        return event

    async def _wait(self) -> None:
        try:
            await self._some.wait()
        except asyncio.CancelledError:
            await self.aclose()
            raise

    def _read(self, last: TokenEvent) -> None:
        self._exhausted = last.finish_reason is not None
        if not self._events:
            self._some.clear()

    async def aclose(self) -> None:
        """Read no further; aborts the request unless it has ended."""
        unread, self._exhausted = not self._exhausted, True
        if unread and not self._complete:
            self._abort(self.request.request_id)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()


class Outbox:
    """Hands events over to the streams of one loop, those of `interval` seconds together.

    Events that come after a pause are handed over at once, and so are all events of a stream whose
    first or last event is among them. Without an interval every event is handed over at once.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, interval: float) -> None:
        self._loop = loop
        self._interval = interval
        self._lock = threading.Lock()
        self._held: dict[EventStream, list[TokenEvent]] = {}
        self._planned = False  # a hand-over of all that is held is on its way
        self._handed_over = 0.0  # when that last happened, by the loop's clock

    def send(self, posts: Sequence[tuple[EventStream, TokenEvent]]) -> None:
        """Hand events over soon, in this order. From any thread."""
        urgent: list[EventStream] = []
        with self._lock:
            for stream, event in posts:
                self._held.setdefault(stream, []).append(event)
                if event.index == 0 or event.finish_reason is not None:
                    urgent.append(stream)
            plan, self._planned = not self._planned, True
        try:
            if urgent:
                self._loop.call_soon_threadsafe(self._hand_over, urgent)
            if plan:
                self._loop.call_soon_threadsafe(self._plan)
        except RuntimeError:  # the loop is closed: nobody is left to read
            logger.warning("%d events found their event loop closed", len(posts))

    def _plan(self) -> None:
        """Hand everything over, `interval` after the last time. On the loop's thread."""
        due = self._handed_over + self._interval
        if due <= self._loop.time():
            self._hand_over_all()
        else:
            self._loop.call_at(due, self._hand_over_all)

    def _hand_over_all(self) -> None:
        self._handed_over = self._loop.time()
        with self._lock:
            held, self._held, self._planned = self._held, {}, False
        for stream, events in held.items():
            stream.put(events)

    def _hand_over(self, streams: Sequence[EventStream]) -> None:
        """Hand over what is held for some streams. On the loop's thread."""
        with self._lock:
            found = [(stream, self._held.pop(stream, None)) for stream in streams]
        for stream, events in found:
            if events:
                stream.put(events)
