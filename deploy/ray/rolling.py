"""New checkpoints for many replicas: one after another, and none after the first refusal.

The first replica that loads a checkpoint is the trial: what it refuses, no other one is asked for.
If a later one refuses, those before it go back to what all served, where that is still there. A
replica that comes later, by scaling or after a crash, is brought to the same weights. It knows no
Ray: `Fleet` is whatever reaches the replicas.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Protocol

from deploy.ray.wire import Identity, Reply
from engine.checkpoint import content_digest
from engine.errors import CheckpointError
from server.reload import Candidate, candidates

logger = logging.getLogger("ambidex.server")


class Fleet(Protocol):
    """All replicas, as a rollout needs them."""

    async def identities(self) -> list[Identity]:
        """Those that run now."""

    async def reload(self, replica: str, path: str) -> Reply | None:
        """Let one serve the checkpoint `path`, relative to the watched one; None if it is gone."""


class Rolling:
    """Keeps a fleet on the newest good checkpoint of a watched path.

    Attributes:
        lock: held while replicas are reloaded.
        target: what all should serve; None before the first look that found something.
    """

    def __init__(self, root: Path, fleet: Fleet) -> None:
        self.root = root
        self.fleet = fleet
        self.lock = asyncio.Lock()
        self.target: Candidate | None = None
        self._newest = -1  # nothing written before this is begun by itself
        self._refused: set[Candidate] = set()

    async def look(self) -> None:
        """Bring every replica to the newest checkpoint that none refuses."""
        async with self.lock:
            found = await asyncio.to_thread(candidates, self.root)
            self._refused &= set(found)
            for candidate in found:
                wanted = candidate == self.target or candidate.written > self._newest
                if not wanted or candidate in self._refused:
                    continue
                if await self._bring(candidate):
                    self.target = candidate
                    self._newest = max(self._newest, candidate.written)
                    return
                self._refused.add(candidate)

    async def keep(self, path: Path) -> None:
        """`path` was chosen by hand: it stays until something newer than all that is there comes.

        The lock must be held.
        """
        found = await asyncio.to_thread(candidates, self.root)
        self._newest = max((candidate.written for candidate in found), default=self._newest)
        self.target = await asyncio.to_thread(Candidate.at, path)
        if self.target is not None:
            self._refused.discard(self.target)

    async def _bring(self, candidate: Candidate) -> bool:
        """Whether every replica serves `candidate` now."""
        try:
            digest = await asyncio.to_thread(content_digest, candidate.path)
        except CheckpointError as error:
            logger.error("refused a checkpoint: %s", error)
            return False
        path = str(candidate.path.relative_to(self.root))
        for each in sorted(await self.fleet.identities(), key=lambda each: each.replica):
            if each.digest == digest:
                continue
            reply = await self.fleet.reload(each.replica, path)
            if reply is not None and reply.refused:
                logger.error("replica %s refused %s: %s", each.replica, path, reply.error)
                return False
            if reply is not None:
                logger.info("replica %s serves %s", each.replica, candidate.path)
        return True
