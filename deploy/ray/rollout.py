"""The one process that decides when a replica loads another checkpoint."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import aclosing
from contextvars import Context
from pathlib import Path
from typing import Any

from ray.serve.handle import DeploymentHandle
from starlette.types import Message

from deploy.ray.forward import ReplicaLost, Replicas
from deploy.ray.reach import Reach
from deploy.ray.replica import log
from deploy.ray.rolling import Rolling
from deploy.ray.wire import Accepted, Target
from engine.errors import EngineStopped
from server.settings import Settings

logger = logging.getLogger("ambidex.server")


class Rollout:
    """Watches for new checkpoints, and carries `POST /admin/reload` from replica to replica.

    A Serve deployment of one replica. If it dies nothing is lost: the next one looks again.

    Args:
        settings: the settings of the server.
        model: a handle of the replicas.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, model: DeploymentHandle[Any]
    ) -> None:
        log(settings)
        self.replicas = Reach(model)
        self.rolling = Rolling(settings.watch or settings.model, self.replicas)
        self._watching: asyncio.Task[None] | None = None
        self._reloading: set[asyncio.Task[list[Message]]] = set()
        if settings.watch:
            self._watching = asyncio.create_task(self._watch(settings.watch_interval))

    async def __del__(self) -> None:
        if self._watching is not None:
            self._watching.cancel()

    async def _watch(self, interval: float) -> None:
        while True:
            try:
                await self.rolling.look()
            except EngineStopped:  # no replica runs yet, as in the first seconds
                pass
            except Exception:
                logger.exception("could not look for checkpoints in %s", self.rolling.root)
            await asyncio.sleep(interval)

    async def reload(self, scope: dict[str, Any], body: bytes) -> list[Message]:
        """Answer `POST /admin/reload` with the last replica's answer, or the first refusal.

        It returns no messages if no replica runs. It goes on even if nobody waits for it any more,
        so that replicas are not left on different weights.
        """
        # In a context of its own: with the request's, Serve would cancel the calls to the replicas.
        running = asyncio.create_task(self._reload(scope, body), context=Context())
        self._reloading.add(running)
        running.add_done_callback(self._reloading.discard)
        return await asyncio.shield(running)

    async def _reload(self, scope: dict[str, Any], body: bytes) -> list[Message]:
        async with self.rolling.lock:
            answer: list[Message] = []
            try:
                names = sorted(each.replica for each in await self.replicas.identities())
            except EngineStopped:
                return []
            for name in names:
                answer = await _answer(self.replicas, name, scope, body) or answer
                if answer and answer[0]["status"] != 200:
                    return answer
            if not answer:
                return []
            document = json.loads(b"".join(message.get("body", b"") for message in answer))
            await self.rolling.keep(Path(document["model"]["path"]))
            return answer


async def _answer(
    replicas: Replicas, name: str, scope: dict[str, Any], body: bytes
) -> list[Message]:
    """The messages of one replica's response to a request; none if the replica has gone."""
    messages: list[Message] = []
    try:
        async with aclosing(replicas.call(Target(only=name), scope, body)) as replies:
            async for reply in replies:
                if isinstance(reply, Accepted):
                    continue
                messages += reply
    except ReplicaLost:
        return []
    return messages
