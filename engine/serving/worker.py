"""The engine's thread while serving, for coroutines that submit requests and read their events.

One thread owns the engine and is the only caller of `Engine.step`. Who submits a request gets an
`EventStream`; every accepted request gets exactly one terminal event, also when a step fails,
hangs, or the worker stops. Health follows the progress of the steps, not the mere existence of the
thread.

A step that raises ends the requests that were running, with an error. If the engine then proves
clean it goes on with those that wait; otherwise, and after MAX_FAILED_STEPS in a row, the worker
has failed for good, as it has when a step hangs: a thread cannot be stopped from outside, so a hung
one is left behind. `on_failure` tells whoever can put another worker in its place.

Who touches what: `_inbox`, `_aborts` and `_streams` under `_lock`; the engine only from the thread
(`Engine.make_request`, `Engine.stats` and the queue's counters are safe to use elsewhere); a stream
only from the event loop that submitted its request.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Final

from engine.errors import EngineStopped, InvalidRequest, require
from engine.serving.engine import Engine
from engine.serving.event_stream import EventStream, Outbox
from engine.serving.request import FinishReason, Request, TokenEvent
from engine.serving.stats import usage_of

logger = logging.getLogger(__name__)

STEP_TIMEOUT: Final = 120.0  # in seconds; the first step may compile kernels, so this is long
MAX_FAILED_STEPS: Final = 3  # in a row; more than this is no accident
_POLL_SECONDS: Final = 0.01
# how long `drain` waits for a step under way before it ends streams itself
_ABORT_SECONDS: Final = 5.0


class Worker:
    """Runs an engine in a thread of its own.

    Args:
        engine: the engine; nothing else may step it.
        step_timeout: seconds after which a step that has not returned counts as hung.
        stream_interval: seconds of events that are handed over together; 0 for each step's own.

    Attributes:
        failure: why the worker has failed for good; None while it has not.
        failed_steps: steps that raised.
        on_failure: is called once the worker has failed and its requests have ended, in a thread of
            its own.
    """

    def __init__(
        self, engine: Engine, step_timeout: float = STEP_TIMEOUT, stream_interval: float = 0.0
    ) -> None:
        require(step_timeout > 0, f"step_timeout must be above 0, got {step_timeout}")
        require(stream_interval >= 0, f"stream_interval must be 0 or more, got {stream_interval}")
        self.engine = engine
        self.step_timeout = step_timeout
        self.stream_interval = stream_interval
        self.failure: str | None = None
        self.failed_steps = 0
        self.on_failure: Callable[[], None] = lambda: None
        self._failed_in_a_row = 0
        self.last_progress = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="ambidex-engine", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="ambidex-watchdog", daemon=True)
        self._ended = threading.Event()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._inbox: list[Request] = []
        self._aborts: set[str] = set()
        self._streams: dict[str, EventStream] = {}
        self._outboxes: dict[asyncio.AbstractEventLoop, Outbox] = {}
        self._stepping = False
        self._draining = False
        self._stopping = False

    # Health

    @property
    def hung(self) -> bool:
        """Whether the step under way takes longer than `step_timeout`."""
        return self._stepping and time.monotonic() - self.last_progress > self.step_timeout

    @property
    def alive(self) -> bool:
        """Whether the thread runs and makes progress; if not, only a restart helps."""
        return self.running and self.failure is None and not self.hung

    @property
    def running(self) -> bool:
        """Whether the thread has not ended."""
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.alive and not self._draining and not self._stopping

    @property
    def num_unfinished(self) -> int:
        """Accepted requests whose terminal event has not been handed over."""
        with self._lock:
            return len(self._streams)

    # From the event loop

    def start(self) -> None:
        """Start the threads; once in a worker's life."""
        self._thread.start()
        self._watchdog.start()

    async def submit(self, request: Request) -> EventStream:
        """Accept a request that this worker's engine has made; returns its events. Does not wait.

        Raises:
            InvalidRequest: its id is in use.
            Overloaded: the queue is full.
            EngineStopped: no requests are taken: not started, draining, stopped, failed or hung.
        """
        stream = EventStream(request, self.abort)
        with self.engine.stats.counting_rejections(), self._lock:
            self._check_acceptable(request)
            self._inbox.append(request)
            self._streams[request.request_id] = stream
            if stream.loop not in self._outboxes:
                self._outboxes[stream.loop] = Outbox(stream.loop, self.stream_interval)
        self._wake.set()
        return stream

    def _check_acceptable(self, request: Request) -> None:
        """Raise unless the engine will certainly take the request from the inbox."""
        if not self.ready:
            raise EngineStopped(self.why_not_ready())
        require(
            request.request_id not in self._streams,
            f"request_id {request.request_id[:64]!r} is already in use",
            InvalidRequest,
        )
        tokens = sum(earlier.prompt_len for earlier in self._inbox)
        self.engine.scheduler.check_room(request.prompt_len, len(self._inbox), tokens)

    def knows(self, request_id: str) -> bool:
        """Whether an accepted request of this id still owes its terminal event."""
        with self._lock:
            return request_id in self._streams

    def why_not_ready(self) -> str:
        """Why the worker takes no requests, as a sentence."""
        if self.failure is not None:
            return f"the engine has failed: {self.failure}"
        if self.hung:
            return f"the engine is stuck in a step of more than {self.step_timeout:g} s"
        if self._stopping:
            return "the engine was stopped"
        return "the engine is draining" if self._draining else "the engine is not running"

    def abort(self, request_id: str) -> None:
        """End a request early: an "abort" event, unless it has ended. Thread-safe."""
        with self._lock:
            if request_id in self._streams:
                self._aborts.add(request_id)
        self._wake.set()

    async def drain(self, timeout: float) -> None:
        """Refuse new requests, finish those in flight, and abort what is left after `timeout` s.

        Returns when every accepted request has its terminal event.
        """
        self._draining = True
        await self._wait_until_empty(timeout)
        with self._lock:
            self._aborts |= self._streams.keys()
        self._wake.set()
        await self._wait_until_empty(_ABORT_SECONDS)
        self._end_streams("abort")
        await asyncio.sleep(0)  # lets the event loop deliver what was handed to it

    async def _wait_until_empty(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while self.num_unfinished and time.monotonic() < deadline and self.alive:
            await asyncio.sleep(_POLL_SECONDS)

    def stop(self, timeout: float = 10.0) -> None:
        """Abort what is in flight and end the thread, waiting at most `timeout` s for its step."""
        with self._lock:
            self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        self._end_streams("abort")

    # In the thread

    def _run(self) -> None:
        try:
            self._serve()
            # otherwise this thread hung, and the watchdog has ended its requests
            if self.failure is None:
                self._deliver(self.engine.end_all("abort"))
        except BaseException as error:
            # catch everything: no caller above this thread would see the exception
            logger.exception("the engine failed")
            self._fail(_text(error))
        finally:
            self._ended.set()

    def _watch(self) -> None:
        """The watchdog: a step that hangs ends every request, without the engine's help."""
        while not self._ended.wait(min(1.0, self.step_timeout / 4)):
            if self.hung:
                with self._lock:
                    self.failure = f"a step took longer than {self.step_timeout:g} s"
                    self._inbox.clear()
                logger.error("the engine has failed: %s", self.failure)
                self._end_streams("error", f"the engine has failed: {self.failure}")
                self.on_failure()
                return

    def _serve(self) -> None:
        while True:
            self._wake.clear()  # first, so that a signal from here on ends the wait below
            if self._stopping or self.failure is not None:
                break
            self._take_messages()
            if self.engine.has_work():
                self._step()
            else:
                self._wake.wait()
        self._take_messages()

    def _step(self) -> None:
        self.last_progress = time.monotonic()
        self._stepping = True
        try:
            events = self.engine.step()
            self._failed_in_a_row = 0
        except Exception as error:
            events = self._recover(error)
        self._stepping = False
        self.last_progress = time.monotonic()
        self._deliver(events)

    def _recover(self, error: Exception) -> list[TokenEvent]:
        """End what the failed step was working on; raises unless the engine can go on."""
        self.failed_steps += 1
        self._failed_in_a_row += 1
        if self._failed_in_a_row > MAX_FAILED_STEPS:
            raise error
        logger.exception("a step of the engine failed; its requests end, the others go on")
        return self.engine.end_running("error", f"a step of the engine failed: {_text(error)}")

    def _take_messages(self) -> None:
        """Move submitted requests and aborts into the engine."""
        with self._lock:
            aborts, self._aborts = self._aborts, set()
            # Added under the lock, so that a request is always either in the inbox or queued when
            # `submit` counts them.
            for request in self._inbox:
                self.engine.add(request)
            self._inbox.clear()
        for request_id in aborts:
            self.engine.abort(request_id)

    def _fail(self, message: str) -> None:
        """Nobody can tell what the engine is like now, so everything in flight ends."""
        with self._lock:
            self.failure = message
            self._inbox.clear()
        self._stepping = False
        sentence = f"the engine has failed: {message}"
        try:
            self._deliver(self.engine.end_all("error", sentence))
        except Exception:
            logger.exception("the engine could not end its requests")
        self._end_streams("error", sentence)
        self.on_failure()

    # Delivery

    def _deliver(self, events: Sequence[TokenEvent]) -> None:
        """Hand events to their streams.

        A stream leaves the table with its terminal event, so nothing can follow that, not even the
        late events of a step that was given up.
        """
        posts: defaultdict[asyncio.AbstractEventLoop, list[tuple[EventStream, TokenEvent]]]
        posts = defaultdict(list)
        with self._lock:
            for event in events:
                stream = self._streams.get(event.request_id)
                if stream is not None:
                    posts[stream.loop].append((stream, event))
                    if event.finish_reason is not None:
                        del self._streams[event.request_id]
                        # An abort that comes too late must not meet a later request of this id.
                        self._aborts.discard(event.request_id)
            # Under the lock: who finds no streams left may rely on their events being on the way.
            for loop, batch in posts.items():
                self._outboxes[loop].send(batch)

    def _end_streams(self, reason: FinishReason, error: str | None = None) -> None:
        """Give each stream that is left its terminal event, without the engine's help."""
        now = time.monotonic()
        with self._lock:
            requests = [stream.request for stream in self._streams.values()]
        if requests:
            self.engine.stats.record_given_up(reason, len(requests))
        self._deliver(
            [
                TokenEvent(
                    request.request_id,
                    request.num_output,
                    token=None,
                    finish_reason=reason,
                    error=error,
                    usage=usage_of(request, now),
                )
                for request in requests
            ]
        )


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:500]
