"""Deadlines: how long a request may take from its arrival to its last token.

`X-Request-Timeout: SECONDS` asks for one, within the server's bound; without it the server's
default holds. What is late is aborted in the engine and answered: with status 504 if nothing was
sent yet, otherwise by an error event that ends the stream.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from engine.errors import InvalidRequest, require
from engine.serving.request import TokenEvent
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

    async def take(self) -> list[TokenEvent]: ...
    async def aclose(self) -> None: ...


class TimedEvents:
    """The events of one request until its deadline; then it is aborted and `DeadlineExceeded`.

    Args:
        events: of the request; a wait that is cancelled must abort it.
        deadline: by the event loop's clock.
        seconds: how long the request might take, for the message.
        see: is called with the events that are taken.
        late: is called when the deadline has passed.
    """

    def __init__(
        self,
        events: Events,
        deadline: float,
        seconds: float,
        see: Callable[[Sequence[TokenEvent]], None],
        late: Callable[[], None],
    ) -> None:
        self._events = events
        self._deadline, self._seconds = deadline, seconds
        self._see, self._late = see, late

    async def take(self) -> list[TokenEvent]:
        """The events that nobody has read yet, at least one; none once they have ended."""
        try:
            async with asyncio.timeout_at(self._deadline):
                taken = await self._events.take()
        except TimeoutError:
            self._late()
            raise late_error(self._seconds) from None
        ended = not taken or taken[-1].finish_reason is not None
        if not ended and asyncio.get_running_loop().time() > self._deadline:
            await self._events.aclose()  # its reader is the slow one: there are always more events
            self._late()
            raise late_error(self._seconds)
        self._see(taken)
        return taken

    async def aclose(self) -> None:
        await self._events.aclose()


def late_error(seconds: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"the request took longer than {seconds:g} seconds ({TIMEOUT_HEADER}, or the server's "
        "own limit)"
    )
