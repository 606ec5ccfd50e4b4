"""A request has a deadline: so many seconds from its arrival to its last token.

The client chooses them by `X-Request-Timeout: SECONDS`, up to the server's bound. Without the
header the server's default holds. A request that is late is aborted in the engine. The client gets
status 504 if nothing was sent yet, otherwise an error event that ends the stream.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from engine.errors import InvalidRequest, require
from engine.serving.request import TokenEvent
from server.errors import DeadlineExceeded

TIMEOUT_HEADER: Final = "X-Request-Timeout"


def timeout_of(header: str | None, default: float, most: float) -> float:
    """Seconds that a request may take.

    Args:
        header: `X-Request-Timeout` as it came; None takes `default`.
        default: seconds; never more than `most`.
        most: seconds that a client may ask for.

    Raises:
        InvalidRequest: the header is no number, or out of range.
    """
    if header is None:
        return min(default, most)
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
    """A source of token events."""

    async def take(self) -> list[TokenEvent]: ...
    async def aclose(self) -> None: ...


class TimedEvents:
    """The events of one request; at its deadline it is aborted, and `DeadlineExceeded` is raised.

    Args:
        events: the request's events; cancelling a wait for them must abort it.
        deadline: the time on the event loop's clock.
        seconds: how long the request may take, for the error.
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
            await self._events.aclose()  # the client reads slowly, so that events were always there
            self._late()
            raise late_error(self._seconds)
        self._see(taken)
        return taken

    async def aclose(self) -> None:
        await self._events.aclose()


def late_error(seconds: float) -> DeadlineExceeded:
    """The error of a request that took longer than `seconds`."""
    return DeadlineExceeded(
        f"the request took longer than {seconds:g} seconds ({TIMEOUT_HEADER}, or the server's "
        "own limit)"
    )
