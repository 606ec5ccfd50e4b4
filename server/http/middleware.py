"""ASGI middleware: a request's identity, its key, and bounds on its head and body.

It passes messages on one by one, so that a stream stays a stream.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import Callable
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import AmbidexError
from server.errors import BodyTooLarge, BodyTooSlow, HeadersTooLarge, UrlTooLong
from server.http import calls
from server.http.calls import Call
from server.http.deadlines import TIMEOUT_HEADER
from server.http.error_responses import error_response
from server.http.ratelimit import RateLimited, RateLimiter
from server.http.security import Keyring

REQUEST_ID: Final = "X-Request-Id"
MAX_PATH_CHARS: Final = 200
MAX_DISCARDED_BYTES: Final = 1 << 16  # of the body of a refused request
DISCARD_SECONDS: Final = 1.0
_ACCEPTABLE_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")

logger = logging.getLogger("ambidex.server")


def request_id(headers: Headers) -> str:
    """The client's `X-Request-Id` where it is short and harmless, otherwise a new one."""
    given = headers.get(REQUEST_ID, "")
    return given if _ACCEPTABLE_ID.fullmatch(given) else uuid.uuid4().hex


class CallMiddleware:
    """Opens a request's `Call`, echoes or makes `X-Request-Id`, turns a crash into a plain 500.

    It is the outermost middleware, so that every response carries the id, the 500 included.

    Args:
        app: the application inside.
        ended: is called once with every call, as soon as its response is complete.
    """

    def __init__(self, app: ASGIApp, ended: Callable[[Call], None]) -> None:
        self.app = app
        self.ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        call = _call(scope)
        calls.begin(call)
        has_ended = False

        def end() -> None:
            nonlocal has_ended
            if not has_ended:
                has_ended = True
                call.route = getattr(scope.get("route"), "path", None)
                self.ended(call)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = call.request_id
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                # Now, not when the application has cleaned up behind its response: by then the
                # connection's next request may have ended, and its line would come first.
                end()

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:
            logger.exception("request %s failed", call.request_id)
            if call.status:  # too late for another answer: the connection must break
                raise
            await error_response(error)(scope, receive, send_with_id)
        finally:
            end()


def _call(scope: Scope) -> Call:
    headers = Headers(scope=scope)
    # the raw path is percent-encoded: a newline in it cannot forge a log line
    path = scope.get("raw_path", b"").partition(b"?")[0].decode("ascii", "replace")
    return Call(
        request_id=request_id(headers),
        method=scope["method"],
        path=path[:MAX_PATH_CHARS],
        client=scope["client"][0] if scope.get("client") else None,
        timeout=headers.get(TIMEOUT_HEADER),
        traceparent=headers.get("traceparent"),
    )


class HeadLimitMiddleware:
    """Bounds the URL and the headers.

    uvicorn bounds a head that arrives in many pieces; this middleware bounds one that arrives at
    once.
    """

    def __init__(self, app: ASGIApp, max_url_bytes: int, max_header_bytes: int) -> None:
        self.app = app
        self.max_url_bytes = max_url_bytes
        self.max_header_bytes = max_header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except AmbidexError as error:
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        url, most = len(scope.get("raw_path", b"")) + len(scope["query_string"]), self.max_url_bytes
        if url > most:
            raise UrlTooLong(f"the URL must have at most {most} bytes (max_url_bytes)")
        most = self.max_header_bytes
        if sum(len(name) + len(value) for name, value in scope["headers"]) > most:
            raise HeadersTooLarge(f"headers must have at most {most} bytes (max_header_bytes)")


class KeyMiddleware:
    """Finds the key of a request and checks what it opens, before anything of the body is kept.

    Args:
        app: the application inside.
        keyring: the keys.
        limiter: counts every POST outside of /admin.
        rejected: is called with the reason of a refusal.
    """

    def __init__(
        self, app: ASGIApp, keyring: Keyring, limiter: RateLimiter, rejected: Callable[[str], None]
    ) -> None:
        self.app = app
        self.keyring = keyring
        self.limiter = limiter
        self.rejected = rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except AmbidexError as error:
                limited = isinstance(error, RateLimited)
                self.rejected("rate_limited" if limited else "unauthorized")
                response = error_response(error)
                if not await _discard_body(scope, receive):
                    response.headers["Connection"] = "close"  # the rest is not read
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        call, path = calls.current(), scope["path"]
        call.key = self.keyring.authorize(path, Headers(scope=scope).get("authorization", ""))
        if scope["method"] == "POST" and not path.startswith("/admin"):
            self.limiter.admit(call.key_name)


async def _discard_body(scope: Scope, receive: Receive) -> bool:
    """Read and drop the body if it is small. Returns whether all of it was read.

    Closing a connection with unread bytes resets it, and the client may never see the answer.
    """
    if _declared_length(scope) > MAX_DISCARDED_BYTES:
        return False
    size = 0
    try:
        async with asyncio.timeout(DISCARD_SECONDS):
            while size <= MAX_DISCARDED_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return True
    except TimeoutError:
        pass
    return False


class BodyLimitMiddleware:
    """Reads the body, at most `max_bytes` of it within `timeout` seconds, before the app runs.

    So routes never wait for a slow sender, and all have the same bound, whatever parses their
    bodies. After the body the application's `receive` waits for the disconnect, as in ASGI.
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
    """`Content-Length`; 0 if there is none, or no number."""
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
