"""Server-sent events: their format, and a response that notices when the client has gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, Final, TypeVar

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.http import calls

T = TypeVar("T")

logger = logging.getLogger("ambidex.server")

# How long after its deadline a client may take to read the last event.
SLOW_READER_SECONDS: Final = 5.0

# X-Accel-Buffering keeps nginx from collecting events before it passes them on.
STREAM_HEADERS: Final = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def sse_event(payload: Any) -> bytes:
    """One event in the wire format of the HTML standard, section 9.2 (server-sent events).

    JSON text has no raw newlines, so the payload is always a single `data:` line.
    """
    return b"data: " + to_json(payload, inf_nan_mode="null") + b"\n\n"


async def _disconnect(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`, or None if the client left first: then `work` is cancelled."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


class EventResponse(Response):
    """A `text/event-stream` response over `frames`, watched for a disconnect from the start.

    Starlette's own streaming response sees a lost client only when it next sends; a request that
    still waits in the queue must not wait for that. A client that reads so slowly that the last
    event does not get through after the deadline is cut off. `close` runs exactly once, however it
    ends.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        close: Callable[[], Awaitable[None]],
        headers: Mapping[str, str],
    ) -> None:
        self.frames = frames
        self.close = close
        self.status_code = 200
        self.background = None
        self.init_headers({**STREAM_HEADERS, **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        deadline = calls.current().deadline
        limit = None if deadline is None else deadline + SLOW_READER_SECONDS
        try:
            async with asyncio.timeout_at(limit):
                await while_connected(receive, self._send_frames(send))
        except TimeoutError:
            logger.warning("a client that does not read its stream was cut off")
        finally:
            await self.close()

    async def _send_frames(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        async with aclosing(self.frames) as frames:
            async for frame in frames:
                await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
