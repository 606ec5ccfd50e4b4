"""New checkpoints for many replicas: one after another, and none after the first refusal.

The first replica that loads a checkpoint is the trial: what it refuses, no other one is asked for.
If a later one refuses, those before it go back to the newest that all can serve, where the watched
path still holds one: neither the configured model, from before the first checkpoint, nor a watched
checkpoint that was replaced can be gone back to. A replica that does not see a checkpoint yet is
asked again at the next look. One that comes later, by scaling or after a crash, is brought to the
same weights. It knows no Ray: `AllReplicas` is whatever reaches them.
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
        """Those that run now."""

    async def reload(self, replica: str, path: str) -> Reply | None:
        """Let one serve the checkpoint `path`, relative to the watched one; None if it is gone, or
        about to be."""


class Rolling:
    """Keeps all replicas on the newest good checkpoint of a watched path.

    Attributes:
        lock: held while replicas are reloaded.
        target: what all should serve; None before the first look that found something.
    """

    def __init__(self, root: Path, replicas: AllReplicas) -> None:
        self.root = root
        self.replicas = replicas
        self.lock = asyncio.Lock()
        self.target: Candidate | None = None
        self._newest = -1  # nothing written before this is begun by itself
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
        """`path` was chosen by hand: it stays until something newer than all that is there comes.

        The lock must be held.
        """
        found = await asyncio.to_thread(candidates, self.root)
        self._newest = max((candidate.written for candidate in found), default=self._newest)
        chosen = await asyncio.to_thread(Candidate.at, path)
        # The same directory may be called otherwise in `found`: relative, or through a link.
        same = (each for each in found if chosen and _same(each, chosen))
        self.target = next(same, chosen)
        if self.target is not None:
            self._refused.discard(self.target)

    async def _bring(self, candidate: Candidate) -> Outcome:
        """Let one replica after another serve `candidate`, until one does not."""
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
