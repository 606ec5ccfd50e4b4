"""What is known of the HTTP request under way: filled in as it passes through, read at its end.

The outermost middleware opens a `Call`; whatever runs below it, in the same task or one that it
starts, finds it with `current()`. So keys, deadlines, the access log and traces need no place in
the signatures between.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from engine.serving.request import TokenEvent, Usage
from server.ratelimit import ANONYMOUS
from server.security import Key


@dataclass(frozen=True)
class Finished:
    """One generation of a call: what it took, and when, in seconds from the call's beginning."""

    usage: Usage
    first_token: float | None
    ended: float


@dataclass
class Call:
    """One HTTP request.

    Attributes:
        request_id: the client's `X-Request-Id`, or a new one.
        method: such as POST.
        path: percent-encoded and cut, so that it cannot forge a log line.
        route: the pattern of the route that answered; None if none did.
        client: its address.
        key: the key that it presented; None if none was asked for.
        user: whom it names as the one who asks, in OpenAI's field `user`.
        timeout: its `X-Request-Timeout` as it came.
        traceparent: its W3C trace context as it came.
        deadline: when its generation must have ended, by the event loop's clock.
        status: of the response; 0 before it begins.
        outcome: how its last generation ended, such as "length", "abort" or "timeout".
        finished: its generations that have ended.
        generated_tokens: of all its generations so far.
        started: `time.time()` when it came.
    """

    request_id: str = ""
    method: str = ""
    path: str = ""
    route: str | None = None
    client: str | None = None
    key: Key | None = None
    user: str | None = None
    timeout: str | None = None
    traceparent: str | None = None
    deadline: float | None = None
    status: int = 0
    outcome: str | None = None
    finished: list[Finished] = field(default_factory=list)
    generated_tokens: int = 0
    started: float = field(default_factory=time.time)
    _clock: float = field(default_factory=time.perf_counter)
    _first_tokens: dict[str, float] = field(default_factory=dict)  # by request

    @property
    def seconds(self) -> float:
        """Since it came."""
        return time.perf_counter() - self._clock

    @property
    def key_name(self) -> str:
        """Who calls, for limits and metrics."""
        return self.key.name if self.key else ANONYMOUS

    @property
    def first_token(self) -> float | None:
        """Seconds from its beginning to its first token."""
        return min(self._first_tokens.values(), default=None)

    @property
    def usages(self) -> list[Usage]:
        """What its finished generations took."""
        return [each.usage for each in self.finished]

    def note(self, event: TokenEvent) -> None:
        """Take an event of one of its generations into account."""
        if event.token is not None:
            self.generated_tokens += 1
            if event.request_id not in self._first_tokens:
                self._first_tokens[event.request_id] = self.seconds
        if event.finish_reason is not None:
            self.outcome = event.finish_reason
        if event.usage is not None:
            first = self._first_tokens.get(event.request_id)
            self.finished.append(Finished(event.usage, first, self.seconds))


_current: ContextVar[Call | None] = ContextVar("ambidex_call", default=None)


def current() -> Call:
    """The call that this task works for; outside of any, a new one."""
    return _current.get() or Call()


def begin(call: Call) -> None:
    """Make `call` the one that this task works for."""
    _current.set(call)
