"""The worker that serves now, those that still finish what they began, and what all have counted.

A new worker takes a place in one assignment on the event loop: whoever asks from then on gets the
new one, and what the old one has accepted it finishes, on the weights that it began with. So a
checkpoint is replaced while requests run (server.reload), and so is an engine that has failed:
around the same weights, at most `max_restarts` times in `restart_window` seconds. After that the
fleet has failed for good, and only a new process helps.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Final

from engine.errors import AmbidexError, EngineStopped, require
from engine.serving.engine import Engine
from engine.serving.stats import Numbers, Stats
from engine.serving.worker import Worker
from server.settings import Settings

logger = logging.getLogger("ambidex.server")

_POLL_SECONDS: Final = 0.01


def make_worker(engine: Engine, settings: Settings) -> Worker:
    """A worker around `engine`, as the settings want it."""
    return Worker(engine, settings.step_timeout, settings.stream_interval)


class Fleet:
    """Owns every worker of a server. All methods belong to the event loop, `numbers` to anybody.

    Attributes:
        worker: the one that serves now.
        retiring: those that finish what they have accepted.
        changing: held while `worker` is about to be replaced.
        loaded_at: `time.time()` when the present weights began to serve.
        restarts: engines that took the place of failed ones.
        failure: why the fleet has failed for good; None while it has not.
        draining: set when the server is about to stop; nobody is replaced any more.
        on_failure: is called when the fleet has failed for good.
    """

    def __init__(self, worker: Worker, settings: Settings) -> None:
        self.worker = worker
        self.settings = settings
        self.retiring: list[Worker] = []
        self.changing = asyncio.Lock()
        self.loaded_at = time.time()
        self.restarts = 0
        self.failure: str | None = None
        self.draining = False
        self.on_failure: Callable[[], None] = lambda: None
        self.own = Stats(0, 0, 0)  # counts what no engine does, and keeps what past ones counted
        self._past_failed_steps = 0
        self._restarted: deque[float] = deque()
        self._leases: Counter[Worker] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.worker.ready and not self.draining

    def numbers(self) -> Numbers:
        """What all engines have counted, present and past."""
        total = self.own.snapshot()
        for worker in (self.worker, *self.retiring):
            total += worker.engine.stats.snapshot()
        return total

    @property
    def failed_steps(self) -> int:
        """Steps that raised."""
        workers = (self.worker, *self.retiring)
        return self._past_failed_steps + sum(worker.failed_steps for worker in workers)

    # Life

    def start(self) -> None:
        """Start the first worker."""
        self._start(self.worker)

    def _start(self, worker: Worker) -> None:
        loop = asyncio.get_running_loop()

        def failed() -> None:
            try:
                loop.call_soon_threadsafe(self._spawn, self._on_failure(worker))
            except RuntimeError:  # the loop is closed: nobody is left to serve
                logger.warning("an engine failed after the server's end")

        worker.on_failure = failed
        worker.start()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self, timeout: float) -> None:
        """Refuse new requests; return once accepted ones have ended, aborted after `timeout`."""
        self.draining = True
        workers = (self.worker, *self.retiring)
        await asyncio.gather(*(worker.drain(timeout) for worker in workers))

    async def stop(self) -> None:
        """End every worker; waits for the steps under way, but not for ever."""
        self.draining = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        workers = (self.worker, *self.retiring)
        await asyncio.gather(*(asyncio.to_thread(worker.stop) for worker in workers))

    # Replacing

    @contextmanager
    def lease(self) -> Iterator[Worker]:
        """The worker of now, which takes requests until the block has ended, replaced or not."""
        worker = self.worker
        self._leases[worker] += 1
        try:
            yield worker
        finally:
            self._leases[worker] -= 1
            if not self._leases[worker]:
                del self._leases[worker]

    def replace(self, engine: Engine, *, new_weights: bool = False) -> None:
        """Let `engine` serve from now on; the old worker finishes what it has and ends.

        Raises:
            EngineStopped: the server is about to stop.
        """
        require(not self.draining, "the server is shutting down", EngineStopped)
        if new_weights:
            self.loaded_at = time.time()
        old, self.worker = self.worker, make_worker(engine, self.settings)
        self._start(self.worker)
        self.retiring.append(old)
        self._spawn(self._retire(old))

    async def empty(self) -> None:
        """Drain the present worker and give its memory up; `replace` must follow."""
        worker = self.worker
        await worker.drain(self.settings.retire_timeout)
        await asyncio.to_thread(worker.stop)
        if not worker.running:
            worker.engine.release()

    async def _retire(self, worker: Worker) -> None:
        if worker.failure is not None:  # nothing to finish, and its thread may never return
            self._forget(worker)
            return
        deadline = time.monotonic() + self.settings.retire_timeout
        try:
            while self._leases[worker] and time.monotonic() < deadline:
                await asyncio.sleep(_POLL_SECONDS)
            await worker.drain(max(0.0, deadline - time.monotonic()))
            await asyncio.to_thread(worker.stop)
        finally:
            self._forget(worker)

    def _forget(self, worker: Worker) -> None:
        """Keep what a worker has counted, and let go of it."""
        if worker in self.retiring:
            self.retiring.remove(worker)
            self.own.absorb(worker.engine.stats.snapshot())
            self._past_failed_steps += worker.failed_steps

    async def wait_until_alone(self) -> None:
        """Return when no replaced worker is left, which `retire_timeout` bounds."""
        while self.retiring:
            await asyncio.sleep(_POLL_SECONDS)

    # Failing

    async def _on_failure(self, worker: Worker) -> None:
        """A worker has failed, and its requests have ended: put another engine in its place."""
        async with self.changing:
            if worker is not self.worker or self.draining or self.failure is not None:
                return
            try:
                self._count_restart()
                engine = await asyncio.to_thread(self._rebuild, worker)
                self.replace(engine)
                self.restarts += 1
                logger.warning("a new engine serves in place of one that failed")
            except EngineStopped:  # the server stops meanwhile: nobody needs it any more
                return
            except Exception as error:
                self.fail(f"{worker.failure}; {error}")

    def _count_restart(self) -> None:
        """Raise if there have been too many restarts of late."""
        now, most = time.monotonic(), self.settings.max_restarts
        window = self.settings.restart_window
        while self._restarted and now - self._restarted[0] > window:
            self._restarted.popleft()
        if len(self._restarted) >= most:
            raise AmbidexError(f"it was restarted {most} times in {window:g} seconds already")
        self._restarted.append(now)

    @staticmethod
    def _rebuild(worker: Worker) -> Engine:
        """A fresh engine around the same weights, which no step ever writes."""
        return Engine(worker.engine.checkpoint, worker.engine.config)

    def fail(self, reason: str) -> None:
        """Nothing here can be repaired by this process."""
        self.failure = reason
        logger.critical("the server has failed for good: %s", reason)
        self.on_failure()
