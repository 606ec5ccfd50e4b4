"""Deadlines: how long a request may take from its arrival to its last token.

`X-Request-Timeout: SECONDS` asks for one, within the server's bound; without it the server's
default holds. What is late is aborted in the engine and answered: with status 504 if nothing was
sent yet, otherwise by an error event that ends the stream.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Final, Protocol, Self

from engine.errors import InvalidRequest, require
from engine.request import TokenEvent
from server.errors import DeadlineExceeded
from server.settings import Settings

TIMEOUT_HEADER: Final = "X-Request-Timeout"


def timeout_of(header: str | None, settings: Settings) -> float:
    """Seconds that a request may take.

    Raises:
        InvalidRequest: the header is no number, or out of range.
    """
    if header is None:
        return min(settings.request_timeout, settings.max_request_timeout)
    most = settings.max_request_timeout
    try:
        seconds = float(header[:40])
    except ValueError:
        seconds = math.nan
    require(
        0 < seconds <= most,
        f"{TIMEOUT_HEADER} must be seconds above 0 and at most {most:g}, got {header[:40]!r}",
        InvalidRequest,
    )
    return seconds


class Events(Protocol):
    """Where events come from."""

    async def __anext__(self) -> TokenEvent: ...
    async def aclose(self) -> None: ...


class TimedEvents:
    """The events of one request until its deadline; then it is aborted and `DeadlineExceeded`.

    Args:
        events: of the request; a wait that is cancelled must abort it.
        deadline: by the event loop's clock.
        seconds: how long the request might take, for the message.
        see: is called with every event.
        late: is called when the deadline has passed.
    """

    def __init__(
        self,
        events: Events,
        deadline: float,
        seconds: float,
        see: Callable[[TokenEvent], None],
        late: Callable[[], None],
    ) -> None:
        self._events = events
        self._deadline, self._seconds = deadline, seconds
        self._see, self._late = see, late

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenEvent:
        try:
            async with asyncio.timeout_at(self._deadline):
                event = await self._events.__anext__()
        except TimeoutError:
            self._late()
            raise late_error(self._seconds) from None
        if event.finish_reason is None and asyncio.get_running_loop().time() > self._deadline:
            await self._events.aclose()  # its reader is the slow one: there is always another event
            self._late()
            raise late_error(self._seconds)
        self._see(event)
        return event

    async def aclose(self) -> None:
        await self._events.aclose()


def late_error(seconds: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"the request took longer than {seconds:g} seconds ({TIMEOUT_HEADER}, or the server's "
        "own limit)"
    )
