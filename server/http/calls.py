"""A `Call` records what is known of an HTTP request: it is filled on the way, and read at the end.

The outermost middleware opens the call. Whatever runs below it, in the same task or in one that it
starts, finds it with `current()`. So keys, deadlines, the access log and traces need no parameters
in the functions between.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from engine.serving.request import TokenEvent, Usage
from server.http.ratelimit import ANONYMOUS
from server.http.security import Key


@dataclass(frozen=True)
class Finished:
    """A completion of a call that has ended.

    Attributes:
        usage: what it took.
        first_token: seconds from the call's beginning to its first token; None if there was none.
        ended: seconds from the call's beginning to its end.
    """

    usage: Usage
    first_token: float | None
    ended: float


@dataclass
class Call:
    """One HTTP request.

    Attributes:
        request_id: the client's `X-Request-Id`, or a new one.
        method: the HTTP method, such as POST.
        path: the URL's path, percent-encoded and cut, so that it cannot forge a log line.
        route: the pattern of the route that answered; None if none did.
        client: the client's address.
        key: the key that the client presented; None if none was asked for.
        user: the field `user` of OpenAI's bodies.
        timeout: the header `X-Request-Timeout` as it came.
        traceparent: the W3C trace context as it came.
        deadline: when its completions must have ended, by the event loop's clock.
        status: the response's status; 0 before the response begins.
        outcome: how its last completion ended, such as "length", "abort" or "timeout".
        finished: its completions that have ended.
        generated_tokens: how many tokens all its completions have so far.
        started: `time.time()` when the request came.
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
    _first_tokens: dict[str, float] = field(default_factory=dict)  # by the engine's request id

    @property
    def seconds(self) -> float:
        """Seconds since the request came."""
        return time.perf_counter() - self._clock

    @property
    def key_name(self) -> str:
        """The name of the caller, for limits and metrics."""
        return self.key.name if self.key else ANONYMOUS

    @property
    def first_token(self) -> float | None:
        """Seconds from the request's arrival to its first token; None before that."""
        return min(self._first_tokens.values(), default=None)

    @property
    def usages(self) -> list[Usage]:
        """What its finished completions took."""
        return [each.usage for each in self.finished]

    def note(self, event: TokenEvent) -> None:
        """Record an event of one of its completions."""
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
    """The call that this task works for; a new one if it works for none."""
    return _current.get() or Call()


def begin(call: Call) -> None:
    """Make `call` the one that this task works for."""
    _current.set(call)
