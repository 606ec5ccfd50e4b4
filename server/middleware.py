"""Pure ASGI middleware: a request's identity, and a bound on its body.

Both work on messages as they pass, so a stream stays a stream.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import BodyTooLarge, BodyTooSlow, error_response

REQUEST_ID: Final = "X-Request-Id"
_ACCEPTABLE_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")

logger = logging.getLogger("ambidex.server")


def request_id(headers: Headers) -> str:
    """The client's `X-Request-Id` where it is short and harmless, otherwise a new one."""
    given = headers.get(REQUEST_ID, "")
    return given if _ACCEPTABLE_ID.fullmatch(given) else uuid.uuid4().hex


class RequestIdMiddleware:
    """Echoes or makes `X-Request-Id`; logs the request; turns a crash into a plain 500.

    Outermost, so that every response carries the id, the 500 included.
    """

    def __init__(self, app: ASGIApp, access_log: bool = False) -> None:
        self.app = app
        self.access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        identity = request_id(Headers(scope=scope))
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = identity
            await send(message)

        started = time.perf_counter()
        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            logger.exception("request %s failed", identity)
            if status:  # too late for another answer: the connection must break
                raise
            await error_response(error)(scope, receive, send_with_id)
        finally:
            if self.access_log:
                self._log(scope, identity, status, time.perf_counter() - started)

    @staticmethod
    def _log(scope: Scope, identity: str, status: int, seconds: float) -> None:
        # the raw path is percent-encoded: a newline in it cannot forge a log line
        path = scope.get("raw_path", b"").partition(b"?")[0].decode("ascii", "replace")[:200]
        logger.info("%s %s %d %.1fms id=%s", scope["method"], path, status, 1e3 * seconds, identity)


class BodyLimitMiddleware:
    """Reads the body, at most `max_bytes` of it within `timeout` seconds, before the app runs.

    Routes then never wait for a slow sender, and every route has the same bound whatever parses
    its body. After the body the app's `receive` reports a disconnect, as ASGI has it.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout: float) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.timeout):
                body = await self._read(scope, receive)
        except (BodyTooLarge, BodyTooSlow, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                error = BodyTooSlow(f"body must arrive within {self.timeout:g} seconds")
            response = error_response(error)
            response.headers["Connection"] = "close"  # the rest of the body is not read
            await response(scope, receive, send)
            return
        if body is None:  # the client left before it had sent everything
            return
        await self.app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client disconnected first."""
        self._check(_declared_length(scope))
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            size += len(chunk)
            self._check(size)
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)

    def _check(self, size: int) -> None:
        if size > self.max_bytes:
            raise BodyTooLarge(f"body must have at most {self.max_bytes} bytes (max_body_bytes)")


def _declared_length(scope: Scope) -> int:
    """`Content-Length`, or 0 where there is none that means anything."""
    length = Headers(scope=scope).get("content-length", "")
    # more than 18 digits are more than any limit, and int() of thousands of them is slow
    return int(length[:18]) if length.isascii() and length.isdigit() else 0


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` first and then whatever `receive` gives."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
