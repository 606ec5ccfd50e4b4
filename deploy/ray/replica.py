"""A replica is the server as it is on one machine, but its requests come from the ingress."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncGenerator
from typing import Any

from prometheus_client import generate_latest
from ray import serve
from starlette.types import Message

from deploy.ray.scaling import DEMAND, demand
from deploy.ray.wire import Accepted, Identity, Reply, Target, merged_body
from engine.errors import AmbidexError, EngineStopped
from server.app import create_app
from server.engines.fleet import make_worker
from server.engines.reload import Candidate, first_engine
from server.generation.frontend import Frontend
from server.http import access_log
from server.http.tracing import Tracing, otlp_provider
from server.routes import admin
from server.settings import Settings


def log(settings: Settings) -> None:
    """Write our log to standard error, which Ray collects."""
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )


class Replica:
    """One engine and the application around it.

    A Serve deployment: Serve makes it, asks it for its health, and ends it once its requests have
    ended. Its methods run on one event loop.

    Args:
        settings: the settings of the server.
    """

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        self.replica = serve.get_replica_context().replica_id.unique_id
        self.root = settings.watch or settings.model
        log(settings)
        if settings.access_log:
            access_log.write_to_stderr()
        tracing = Tracing(otlp_provider()) if settings.traces else None
        gc.collect()
        gc.freeze()  # server.process.serve says why
        engine = await asyncio.to_thread(first_engine, settings)
        worker = make_worker(engine, settings)
        # The rollout looks for new checkpoints, so that replicas do not load them all at once.
        self.app = create_app(worker, settings, tracing, watch=False)
        self.front: Frontend = self.app.state.frontend
        self._running: set[asyncio.Task[None]] = set()
        self._life = self.app.router.lifespan_context(self.app)
        await self._life.__aenter__()

    async def __del__(self) -> None:
        """Called by Serve when requests have ended; before that they had the grace period."""
        if hasattr(self, "_life"):
            await self._life.__aexit__(None, None, None)

    async def call(
        self, target: Target, scope: dict[str, Any], body: bytes
    ) -> AsyncGenerator[Accepted | list[Message], None]:
        """Serve one HTTP request.

        Yields:
            Accepted, then lists of the response's messages as they come. Closing the generator, or
            cancelling it, looks to the application like a client that has left.
        """
        taken = target.only in (None, self.replica)
        yield Accepted(self.replica, taken)
        if not taken:
            return
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        left = asyncio.Event()
        running = asyncio.create_task(self._run(scope, body, messages, left))
        self._running.add(running)
        running.add_done_callback(self._forget)
        try:
            ended = False
            while not ended:
                batch = [await messages.get()]
                while not messages.empty():
                    batch.append(messages.get_nowait())
                ended = batch[-1] is None
                if some := [message for message in batch if message is not None]:
                    yield merged_body(some)
            await asyncio.shield(running)  # a caller that stops waiting must not cancel it
        finally:
            # The application sees a disconnect, as from any ASGI server, and ends by itself. If it
            # were cancelled while it does, requests would be left half closed.
            left.set()

    def _forget(self, ended: asyncio.Task[None]) -> None:
        self._running.discard(ended)
        if not ended.cancelled():
            ended.exception()  # CallMiddleware has logged the error; who still waits gets it too

    async def _run(
        self,
        scope: dict[str, Any],
        body: bytes,
        messages: asyncio.Queue[Message | None],
        left: asyncio.Event,
    ) -> None:
        """Run the application on a request; its messages go into the queue, and None at the end."""
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if unread:
                return unread.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            messages.put_nowait(message)

        try:
            await self.app({**scope, "state": {}, "extensions": {}}, receive, send)
        finally:
            messages.put_nowait(None)

    # What Serve asks

    async def check_health(self) -> None:
        """Raise once the engine has failed for good: Serve then puts another replica here.

        While an engine is replaced, or a checkpoint loaded in the place of another, requests get
        503 and the ingress asks the next replica, so this replica stays.
        """
        failure = self.front.fleet.failure
        if failure is not None:
            raise RuntimeError(f"the server has failed for good: {failure}")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """How full this replica is, for `ScalingPolicy`."""
        numbers, engine = self.front.numbers(), self.front.engine
        used = numbers.kv_blocks_used / numbers.kv_blocks_total if numbers.kv_blocks_total else 0.0
        return {DEMAND: demand(numbers.running, numbers.waiting, engine.config.max_num_seqs, used)}

    # What ingress and rollout ask of every replica

    async def metrics(self) -> tuple[str, bytes]:
        """(replica, everything that it counts in Prometheus' text format)."""
        return self.replica, generate_latest(self.front.registry)

    async def status(self) -> tuple[str, dict[str, Any]]:
        """(replica, what `/admin/status` says of it)."""
        return self.replica, (await admin.status(self.front)).model_dump()

    async def identity(self) -> Identity:
        return Identity(self.replica, self.front.engine.checkpoint.digest)

    async def reload(self, target: Target, path: str) -> Reply | None:
        """Serve the checkpoint `path` of the watched directory; None if another replica is meant,
        or this one is about to stop."""
        if target.only != self.replica:
            return None
        if await asyncio.to_thread(Candidate.at, self.root / path) is None:
            return Reply("absent", f"{path} is not there, or has no manifest")
        try:
            return Reply(await self.front.reloader.reload(path))
        except EngineStopped:
            return None
        except AmbidexError as error:
            return Reply("failure", self.front.reloader.last_error or str(error))
