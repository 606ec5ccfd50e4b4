"""Forwards a request from the ingress to a replica; it gets exactly one answer, whatever happens.

A stream is passed on as it comes. Any other answer is held until it is complete, so that until then
another replica can give it. If a replica dies during a stream, the ingress ends the stream with the
error event that the replica itself would have sent. This module knows no Ray: `Replicas` is
whatever reaches them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from deploy.ray.affinity import prompt_key
from deploy.ray.wire import Accepted, Target, plain_scope
from engine.errors import AmbidexError, EngineStopped, InvalidRequest, Overloaded
from server.errors import IncompleteGeneration
from server.http import calls
from server.http.deadlines import TIMEOUT_HEADER, late_error, timeout_of
from server.http.error_responses import describe, error_response, openai_call
from server.http.middleware import REQUEST_ID
from server.http.streaming import EventResponse, sse_event, while_connected
from server.routes.openai import DONE
from server.settings import Settings

# In this time a replica must take a request; one that just starts may be slow.
ACCEPT_SECONDS: Final = 30.0
# So long after its deadline the replica itself may still say that a request was late.
GRACE_SECONDS: Final = 10.0
MOST_REFUSALS: Final = 3  # replicas that may answer 503 before the client gets that answer
# A request may be what its replica died of, so it must not end one replica after another.
MOST_LOSSES: Final = 2
REJECTED: Final[dict[type[AmbidexError], str]] = {
    InvalidRequest: "invalid",
    Overloaded: "overloaded",
    EngineStopped: "stopped",
}
INLINE_BYTES: Final = 64 << 10  # a body up to this size is parsed on the event loop

logger = logging.getLogger("ambidex.server")


class ReplicaLost(Exception):
    """The replica that worked on a request has died or cannot be reached."""


class Replicas(Protocol):
    """The replicas, as one request needs them."""

    def call(
        self, target: Target, scope: dict[str, Any], body: bytes
    ) -> AsyncGenerator[Accepted | list[Message], None]:
        """As `deploy.ray.replica.Replica.call`, or ReplicaLost. Closing it aborts the request."""


@dataclass
class Counts:
    """What an ingress has seen.

    Attributes:
        retried: how many requests went to another replica as well.
        broken: how many streams lost their replica.
        active: how many requests are under way.
        rejections: how many requests it refused itself, by reason as in the server's metrics.
    """

    retried: int = 0
    broken: int = 0
    active: int = 0
    rejections: Counter[str] = field(default_factory=Counter)


@dataclass
class _Answer:
    """A response on its way to the client.

    Attributes:
        send: sends a message to the client.
        started: whether something was sent, so that no other replica can answer.
        held: the messages that were not sent yet.
        replica: the replica that answers.
    """

    send: Send
    started: bool = False
    held: list[Message] = field(default_factory=list)
    replica: str | None = None

    @property
    def refused(self) -> bool:
        """Whether this replica takes no requests at the moment."""
        return not self.started and bool(self.held) and self.held[0]["status"] == 503

    async def take(self, messages: list[Message]) -> None:
        """Take messages of the replica: send them on if they are a stream, otherwise hold them."""
        self.held += messages
        if self.started or _streams(self.held[0]):
            await self.flush()

    async def flush(self) -> None:
        messages, self.held = self.held, []
        for message in messages:
            self.started = True
            await self.send(message)

    def forget(self) -> None:
        """Drop what was held, because another replica answers."""
        assert not self.started
        self.held, self.replica = [], None

    async def break_off(self, error: AmbidexError) -> None:
        """End a stream with an event that says what is wrong."""
        body = sse_event(describe(error)) + (DONE if openai_call() else b"")
        await self.send({"type": "http.response.body", "body": body, "more_body": False})


class Forwarder:
    """An ASGI application that lets one replica answer each request.

    Args:
        replicas: reaches the replicas.
        settings: the settings of the replicas.
        characters: how many characters of a prompt decide which replica it prefers.
        max_active: how many requests there may be at once; others get 429.
    """

    def __init__(
        self, replicas: Replicas, settings: Settings, characters: int, max_active: int
    ) -> None:
        self.replicas = replicas
        self.settings = settings
        self.characters = characters
        self.max_active = max_active
        self.counts = Counts()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive()).get("body", b"")  # whole, by BodyLimitMiddleware
        answer = _Answer(send)
        self.counts.active += 1
        try:
            if self.counts.active > self.max_active:
                raise Overloaded(f"the ingress has {self.max_active} requests already")
            await while_connected(receive, self._serve(scope, body, answer))
        except AmbidexError as error:
            if reason := REJECTED.get(type(error)):
                self.counts.rejections[reason] += 1
            if answer.started:
                await answer.break_off(error)
            else:
                await error_response(error)(scope, receive, send)
        except Exception:
            if not answer.started:
                raise
            logger.exception("request %s failed", calls.current().request_id)
            await answer.break_off(IncompleteGeneration("the stream broke off; the log has more"))
        finally:
            self.counts.active -= 1

    async def _serve(self, scope: Scope, body: bytes, answer: _Answer) -> None:
        """Ask replicas until one has answered.

        Raises:
            IncompleteGeneration: the replica was lost under a stream.
            EngineStopped: no replica took the request, or each that did was lost.
            DeadlineExceeded: the replica is long past the deadline.
        """
        seconds = timeout_of(
            calls.current().timeout,
            self.settings.request_timeout,
            self.settings.max_request_timeout,
        )
        deadline = asyncio.get_running_loop().time() + seconds
        key = await self._key(scope, body)
        asked: set[str] = set()
        losses = refusals = 0
        while True:
            try:
                async with asyncio.timeout_at(deadline + GRACE_SECONDS):
                    headers = _headers(scope, deadline if asked or losses else None)
                    request = {**plain_scope(scope), "headers": headers}
                    await self._ask(Target(key, frozenset(asked)), request, body, answer)
                refusals += answer.refused
                again = answer.refused and answer.replica not in asked
                if not again or refusals >= MOST_REFUSALS:
                    await answer.flush()
                    return
            except ReplicaLost as error:
                losses += 1
                if answer.started:
                    self.counts.broken += 1
                    message = "the replica that wrote this answer was lost before it was complete"
                    raise IncompleteGeneration(message) from error
                if losses >= MOST_LOSSES:
                    raise EngineStopped(f"{losses} replicas were lost over this request") from error
            except TimeoutError:
                raise late_error(seconds) from None
            asked |= {answer.replica} if answer.replica else set()
            self.counts.retried += 1
            answer.forget()

    async def _ask(
        self, target: Target, scope: dict[str, Any], body: bytes, answer: _Answer
    ) -> None:
        """Have one replica answer."""
        async with aclosing(self.replicas.call(target, scope, body)) as replies:
            try:
                async with asyncio.timeout(ACCEPT_SECONDS):
                    accepted = await anext(replies)
            except TimeoutError:
                message = f"no replica took the request within {ACCEPT_SECONDS:g} seconds"
                raise EngineStopped(message) from None
            assert isinstance(accepted, Accepted)
            answer.replica = accepted.replica
            async for messages in replies:
                assert isinstance(messages, list)
                await answer.take(messages)

    async def _key(self, scope: Scope, body: bytes) -> bytes | None:
        if scope["method"] != "POST" or not body:
            return None
        if len(body) <= INLINE_BYTES:
            return prompt_key(body, self.characters)
        return await asyncio.to_thread(prompt_key, body, self.characters)


def _streams(start: Message) -> bool:
    kind = Headers(raw=start["headers"]).get("content-type", "")
    return kind.startswith(EventResponse.media_type)


def _headers(scope: Scope, deadline: float | None) -> list[tuple[bytes, bytes]]:
    """The request's headers with its id; if it is sent again, also with the time that is left.

    Raises:
        TimeoutError: no time is left.
    """
    mine = {REQUEST_ID: calls.current().request_id}
    if deadline is not None:
        left = deadline - asyncio.get_running_loop().time()
        if left <= 0:
            raise TimeoutError
        mine[TIMEOUT_HEADER] = f"{left:.3f}"
    new = {name.lower().encode(): value.encode() for name, value in mine.items()}
    kept = [(name, value) for name, value in scope["headers"] if name.lower() not in new]
    return [*kept, *new.items()]
