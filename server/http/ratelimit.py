"""Limits over time, per key: requests and generated tokens a minute, as token buckets.

A bucket holds a minute's worth and fills evenly. A request is refused while one of its key's
buckets is empty. Generated tokens are taken out as they come, because nobody knows before how many
there will be: the level may fall below zero, and must be made good before the next request.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from engine.errors import Overloaded

ANONYMOUS: Final = "anonymous"  # the name of all callers without a key; they share one bucket
MINUTE: Final = 60.0


class RateLimited(Overloaded):
    """The key has used up its minute."""


class TokenBucket:
    """Holds `per_minute` and fills at that rate.

    Args:
        per_minute: capacity, and what flows in a minute; 0: without limit.
        clock: seconds, monotonic.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = float(per_minute)
        self._filled = clock()

    def wait(self) -> float:
        """Seconds until the bucket holds 1; 0 if it does now."""
        if not self.per_minute:
            return 0.0
        self._fill()
        return max(0.0, 1.0 - self._level) * MINUTE / self.per_minute

    def take(self, amount: int) -> None:
        """Take `amount` out, whatever is left then."""
        self._fill()
        self._level -= amount

    def _fill(self) -> None:
        now = self._clock()
        flowed = (now - self._filled) * self.per_minute / MINUTE
        self._level = min(float(self.per_minute), self._level + flowed)
        self._filled = now


class RateLimiter:
    """Has the buckets of each key. There are few, since keys come from the server's settings."""

    def __init__(
        self,
        requests_per_minute: int,
        tokens_per_minute: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = {"requests": requests_per_minute, "generated tokens": tokens_per_minute}
        self._clock = clock
        self._buckets: dict[str, dict[str, TokenBucket]] = {}

    def admit(self, name: str) -> None:
        """Count a request of the key `name`.

        Raises:
            RateLimited: one of its buckets is empty; says when it will not be.
        """
        buckets = self._of(name)
        for what, bucket in buckets.items():
            wait = bucket.wait()
            if wait:
                limit = f"{bucket.per_minute} {what} a minute"
                raise RateLimited(f"this key may use at most {limit}", retry_after=wait)
        buckets["requests"].take(1)

    def generated(self, name: str, tokens: int) -> None:
        """Count generated tokens of the key `name`."""
        self._of(name)["generated tokens"].take(tokens)

    def _of(self, name: str) -> dict[str, TokenBucket]:
        if name not in self._buckets:
            self._buckets[name] = {
                what: TokenBucket(limit, self._clock) for what, limit in self._limits.items()
            }
        return self._buckets[name]
