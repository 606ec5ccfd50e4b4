"""Gives a new checkpoint to one replica after another, and stops at the first that refuses it.

The first replica to load a checkpoint is the trial: what it refuses is offered to no other. If a
later one refuses, those before it go back to the newest checkpoint that all can serve, if the
watched path still holds one. They cannot go back to the configured model from before the first
checkpoint, nor to a watched checkpoint that was replaced. A replica that does not see a checkpoint
yet is asked again at the next look. A replica that comes later, by scaling or after a crash, is
brought to the same weights. This module knows no Ray: `AllReplicas` is whatever reaches them.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Literal, Protocol

from deploy.ray.wire import Identity, Reply
from engine.checkpoint import content_digest
from engine.errors import CheckpointError
from server.engines.reload import Candidate, candidates

logger = logging.getLogger("ambidex.server")

Outcome = Literal["served", "refused", "absent"]


class AllReplicas(Protocol):
    """All replicas, as a rollout needs them."""

    async def identities(self) -> list[Identity]:
        """The replicas that run now, and what they serve."""

    async def reload(self, replica: str, path: str) -> Reply | None:
        """Let a replica serve the checkpoint at `path` in the watched directory.

        Returns:
            What came of it; None if the replica has gone or is about to.
        """


class Rolling:
    """Keeps all replicas on the newest good checkpoint of a watched path.

    Attributes:
        lock: is held while replicas are reloaded.
        target: the checkpoint that all should serve; None until a look has found one.
    """

    def __init__(self, root: Path, replicas: AllReplicas) -> None:
        self.root = root
        self.replicas = replicas
        self.lock = asyncio.Lock()
        self.target: Candidate | None = None
        self._newest = -1  # older checkpoints are not begun without an order
        self._refused: set[Candidate] = set()

    async def look(self) -> None:
        """Bring every replica to the newest checkpoint that none refuses."""
        async with self.lock:
            found = await asyncio.to_thread(candidates, self.root)
            self._refused &= set(found)
            refused = False
            for candidate in found:
                wanted = candidate == self.target or candidate.written > self._newest
                if not wanted or candidate in self._refused:
                    continue
                outcome = await self._bring(candidate)
                if outcome == "served":
                    self.target = candidate
                    self._newest = max(self._newest, candidate.written)
                if outcome != "refused":
                    return
                refused = True
                self._refused.add(candidate)
            if refused and len({each.digest for each in await self.replicas.identities()}) > 1:
                logger.error(
                    "replicas serve different weights, and %s holds none to go back to", self.root
                )

    async def keep(self, path: Path) -> None:
        """Keep the checkpoint `path`, chosen by hand, until one comes that is newer than all.

        The lock must be held.
        """
        found = await asyncio.to_thread(candidates, self.root)
        self._newest = max((candidate.written for candidate in found), default=self._newest)
        chosen = await asyncio.to_thread(Candidate.at, path)
        # `found` may name the same directory otherwise: by a relative path, or through a link.
        same = (each for each in found if chosen and _same(each, chosen))
        self.target = next(same, chosen)
        if self.target is not None:
            self._refused.discard(self.target)

    async def _bring(self, candidate: Candidate) -> Outcome:
        """Let one replica after another serve `candidate`, until one refuses it."""
        try:
            digest = await asyncio.to_thread(content_digest, candidate.path)
        except CheckpointError as error:
            logger.error("refused a checkpoint: %s", error)
            return "refused"
        path = str(candidate.path.relative_to(self.root))
        for each in sorted(await self.replicas.identities(), key=lambda each: each.replica):
            if each.digest == digest:
                continue
            reply = await self.replicas.reload(each.replica, path)
            if reply is None:
                continue
            if reply.result == "absent":
                logger.warning("replica %s has to wait: %s", each.replica, reply.error)
                return "absent"
            if reply.result == "failure":
                logger.error("replica %s refused %s: %s", each.replica, path, reply.error)
                return "refused"
            logger.info("replica %s serves %s", each.replica, candidate.path)
        return "served"


def _same(one: Candidate, other: Candidate) -> bool:
    return (one.written, one.inode) == (other.written, other.inode)
