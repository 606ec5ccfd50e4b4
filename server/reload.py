"""A new checkpoint takes the place of the one that serves, while requests run.

`AMBIDEX_WATCH` names a directory of checkpoint directories, of which the newest complete one
serves, or a checkpoint directory that is replaced atomically, as training does. It is looked at
every `watch_interval` seconds and whenever `POST /admin/reload` says so.

A checkpoint is verified against its manifest, loaded, and then serves in one step: requests under
way finish on the weights that they began with. What cannot be verified or loaded is refused with a
line in the log, and the old one keeps serving. Where memory does not hold both, the old one is
drained and dropped first; requests get 503 with Retry-After meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, Literal

from engine import checkpoint as checkpoints
from engine.checkpoint import MANIFEST
from engine.config import EngineConfig
from engine.errors import (
    AmbidexError,
    CheckpointError,
    ConfigError,
    EngineStopped,
    InvalidRequest,
    require,
)
from engine.serving.engine import Engine
from server.fleet import Fleet
from server.memory import available_bytes
from server.settings import Settings

logger = logging.getLogger("ambidex.server")

MAX_ENTRIES: Final = 10_000  # of a watched directory; more are not looked at
MAX_CANDIDATES: Final = 100  # complete checkpoints that are remembered, newest first
RESULTS: Final = ("success", "unchanged", "failure")
Phase = Callable[[str], AbstractContextManager[None]]
Result = Literal["success", "unchanged", "failure"]


@dataclass(frozen=True)
class Candidate:
    """A directory that has a manifest, and what tells whether that is another one by now."""

    written: int  # nanoseconds
    path: Path
    inode: int

    @classmethod
    def at(cls, path: Path) -> Candidate | None:
        """None if there is no manifest."""
        try:
            found = (path / MANIFEST).stat()
        except OSError:
            return None
        return cls(found.st_mtime_ns, path, found.st_ino)


def candidates(root: Path) -> list[Candidate]:
    """The checkpoints of a watched path, newest first: itself, or the directories in it."""
    own = Candidate.at(root)
    if own is not None:
        return [own]
    try:
        entries = list(islice(root.iterdir(), MAX_ENTRIES))
    except OSError:
        return []
    visible = (entry for entry in entries if not entry.name.startswith("."))
    found = [c for c in map(Candidate.at, visible) if c is not None]
    return sorted(found, key=lambda c: (c.written, c.path.name), reverse=True)[:MAX_CANDIDATES]


def unreadable(root: Path) -> str | None:
    """What of a watched path this process may not read, and why; None if that is nothing.

    A path that is not there yet is no problem, and lost+found is the file system's.
    """
    try:
        for path in islice(root.iterdir(), MAX_ENTRIES):
            if not path.name.startswith(".") and path.name != "lost+found":
                with suppress(FileNotFoundError, NotADirectoryError):
                    (path / MANIFEST).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return f"user {os.getuid()} cannot read {error.filename}: {error.strerror}"
    return None


def inside(root: Path, given: str) -> Path:
    """The checkpoint directory that a client names by its path from `root`.

    Raises:
        InvalidRequest: the path leads out of `root`.
    """
    base = root.resolve()
    try:
        path = (base / given).resolve()
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidRequest("path must be the path of a directory") from error
    require(
        not Path(given).is_absolute() and path.is_relative_to(base),
        "path must lead to a directory inside the watched one",
        InvalidRequest,
    )
    return path


def first_engine(settings: Settings, phase: Phase = lambda _: nullcontext()) -> Engine:
    """The newest checkpoint of the watched path that can serve, else the configured model's.

    Args:
        settings: say which.
        phase: surrounds each phase of loading, which it is told.

    Raises:
        CheckpointError: there is none that can be loaded.
        ConfigError: the settings do not fit the model.
    """
    config = settings.engine_config()
    if settings.watch and (problem := unreadable(settings.watch)):
        logger.warning("AMBIDEX_WATCH: %s", problem)
    for candidate in candidates(settings.watch) if settings.watch else ():
        try:
            return _load(candidate.path, config, phase)
        except (CheckpointError, ConfigError) as error:
            logger.error("refused a checkpoint: %s", error)
    return _load(settings.model, config, phase)


def _load(path: Path, config: EngineConfig, phase: Phase = lambda _: nullcontext()) -> Engine:
    with phase(f"verifying and loading {path}"):
        found = checkpoints.load(path, config.device, config.dtype)
    with phase("packing weights and making the KV cache"):
        engine = Engine(found, config)
    with phase("reading the vocabulary for grammars"):
        engine.grammars.prepare()  # now: everything waits for it, and requests would
    return engine


class Reloader:
    """Replaces the engine of a fleet by one with other weights.

    Attributes:
        counts: reloads by result.
        last_error: why the last one failed; None if it did not.
    """

    def __init__(self, fleet: Fleet, settings: Settings) -> None:
        self.fleet = fleet
        self.settings = settings
        self.counts: Counter[str] = Counter()
        self.last_error: str | None = None
        self._refused: set[Candidate] = set()
        self._unreadable = unreadable(self._root)  # which the first engine has told
        self._one_at_a_time = asyncio.Lock()
        self._serving = self._find_serving()
        self._newest = self._serving.written if self._serving in candidates(self._root) else -1

    def _find_serving(self) -> Candidate | None:
        """Where the present weights came from, unless something else lies there by now."""
        checkpoint = self.fleet.worker.engine.checkpoint
        with suppress(CheckpointError):
            if checkpoints.content_digest(checkpoint.path) == checkpoint.digest:
                return Candidate.at(checkpoint.path)
        return None

    @property
    def _root(self) -> Path:
        return self.settings.watch or self.settings.model

    async def watch(self) -> None:
        """Look for newer checkpoints for ever."""
        while True:
            await asyncio.sleep(self.settings.watch_interval)
            try:
                await self._look()
            except Exception:
                logger.exception("could not look for checkpoints in %s", self._root)

    async def _look(self) -> None:
        """Serve the newest checkpoint that is newer than the present one and can be loaded."""
        for candidate in await asyncio.to_thread(self._newer):
            try:
                await self._reload(candidate)
                return
            except CheckpointError:  # counted, logged; then the next newest
                self._refused.add(candidate)
            except EngineStopped:
                return

    def _newer(self) -> list[Candidate]:
        """What deserves a try, newest first: never what is older than what was served already."""
        problem = unreadable(self._root)
        if problem and problem != self._unreadable:  # once, not every few seconds
            logger.warning("looking for checkpoints: %s", problem)
        self._unreadable = problem
        found = candidates(self._root)
        self._refused &= set(found)
        fresh = [c for c in found if c.path == self._root or c.written > self._newest]
        return [c for c in fresh if c != self._serving and c not in self._refused]

    async def reload(self, given: str | None) -> Result:
        """Serve the checkpoint `given` by its path inside the watched one, or the newest.

        Raises:
            InvalidRequest: the path is not inside, or nothing is watched.
            CheckpointError: it is damaged or foreign, the settings do not fit it, or there is none.
            EngineStopped: the server is about to stop.
        """
        candidate = await asyncio.to_thread(self._choose, given)
        result = await self._reload(candidate)
        # It stays until something newer than all there is comes, even if it is an older one.
        known = await asyncio.to_thread(candidates, self._root)
        self._newest = max((c.written for c in known), default=self._newest)
        return result

    def _choose(self, given: str | None) -> Candidate:
        if given is not None:
            require(
                self.settings.watch is not None,
                "path needs a watched directory (AMBIDEX_WATCH)",
                InvalidRequest,
            )
            path = inside(self._root, given)
            candidate = Candidate.at(path)
        else:
            path = self._root
            candidate = next(iter(candidates(path)), None)
        if candidate is None:
            self._count("failure", f"{path.name}: no checkpoint with a {MANIFEST}")
            raise CheckpointError(str(self.last_error))
        return candidate

    async def _reload(self, candidate: Candidate) -> Result:
        async with self._one_at_a_time:
            started = time.monotonic()
            try:
                result = await self._replace(candidate.path)
            except (AmbidexError, MemoryError, RuntimeError) as error:
                self._count("failure", f"{candidate.path.name}: {error}"[:500])
                logger.error("refused a checkpoint: %s", error)
                if isinstance(error, CheckpointError | EngineStopped):
                    raise
                raise CheckpointError(str(self.last_error)) from error
            self._count(result)
            self._serving, self._newest = candidate, max(self._newest, candidate.written)
            if result == "success":
                fingerprint = self.fleet.worker.engine.checkpoint.fingerprint[:12]
                seconds = time.monotonic() - started
                logger.info("serving %s (%s) after %.1f s", candidate.path, fingerprint, seconds)
            return result

    def _count(self, result: Result, error: str | None = None) -> None:
        self.counts[result] += 1
        self.last_error = error

    async def _replace(self, path: Path) -> Result:
        if self.fleet.draining:
            raise EngineStopped("the server is shutting down")
        config = self.settings.engine_config()
        digest = await asyncio.to_thread(checkpoints.content_digest, path)
        if digest == self.fleet.worker.engine.checkpoint.digest:
            return "unchanged"
        await self.fleet.wait_until_alone()  # never more than two models in memory
        need = await asyncio.to_thread(self._verify, path, config)
        if self._fits_beside(need):
            engine = await asyncio.to_thread(_load, path, config)
            async with self.fleet.changing:
                self.fleet.replace(engine, new_weights=True)
        else:
            async with self.fleet.changing:
                await self._replace_drained(path, config)
        return "success"

    def _verify(self, path: Path, config: EngineConfig) -> int:
        """Bytes that the checkpoint needs in memory; raises if it is damaged."""
        entries = checkpoints.verify_manifest(path)
        weights = sum(e["bytes"] for name, e in entries.items() if name.endswith(".safetensors"))
        return int(weights) + config.kv_cache_bytes

    def _fits_beside(self, need: int) -> bool:
        mode = self.settings.reload_memory
        if mode != "auto":
            return mode == "beside"
        # As much again as the weights while they are packed or cast, a layer at a time at least.
        available = available_bytes(self.settings.device)
        return available is None or need * 1.25 < available

    async def _replace_drained(self, path: Path, config: EngineConfig) -> None:
        """Drop the old engine before the new one is loaded; bring it back if that fails."""
        old = self.fleet.worker.engine.checkpoint.path
        logger.warning("memory does not hold two models: draining before the new one is loaded")
        await self.fleet.empty()
        try:
            engine = await asyncio.to_thread(_load, path, config)
        except Exception:
            await self._bring_back(old, config)
            raise
        self.fleet.replace(engine, new_weights=True)

    async def _bring_back(self, path: Path, config: EngineConfig) -> None:
        try:
            self.fleet.replace(await asyncio.to_thread(_load, path, config))
        except Exception as error:
            self.fleet.fail(f"neither the new checkpoint nor the old one can be loaded: {error}")
