"""What is known of the HTTP request under way: filled in as it passes through, read at its end.

The outermost middleware opens a `Call`; whatever runs below it, in the same task or one that it
starts, finds it with `current()`. So keys, deadlines, the access log and traces need no place in
the signatures between.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from engine.request import TokenEvent, Usage
from server.ratelimit import ANONYMOUS
from server.security import Key


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
        timeout: its `X-Request-Timeout` as it came.
        traceparent: its W3C trace context as it came.
        deadline: when its generation must have ended, by the event loop's clock.
        status: of the response; 0 before it begins.
        outcome: how its last generation ended, such as "length", "abort" or "timeout".
        usages: what its finished generations took.
        generated_tokens: of all its generations so far.
        started: `time.time()` when it came.
        first_token: seconds from then to its first token.
    """

    request_id: str = ""
    method: str = ""
    path: str = ""
    route: str | None = None
    client: str | None = None
    key: Key | None = None
    timeout: str | None = None
    traceparent: str | None = None
    deadline: float | None = None
    status: int = 0
    outcome: str | None = None
    usages: list[Usage] = field(default_factory=list)
    generated_tokens: int = 0
    started: float = field(default_factory=time.time)
    first_token: float | None = None
    _clock: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Since it came."""
        return time.perf_counter() - self._clock

    @property
    def key_name(self) -> str:
        """Who calls, for limits and metrics."""
        return self.key.name if self.key else ANONYMOUS

    def note(self, event: TokenEvent) -> None:
        """Take an event of one of its generations into account."""
        if event.token is not None:
            self.generated_tokens += 1
            if self.first_token is None:
                self.first_token = self.seconds
        if event.finish_reason is not None:
            self.outcome = event.finish_reason
        if event.usage is not None:
            self.usages.append(event.usage)


_current: ContextVar[Call | None] = ContextVar("ambidex_call", default=None)


def current() -> Call:
    """The call that this task works for; outside of any, a new one."""
    return _current.get() or Call()


def begin(call: Call) -> None:
    """Make `call` the one that this task works for."""
    _current.set(call)
