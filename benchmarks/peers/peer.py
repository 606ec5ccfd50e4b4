"""The other side of a comparison, in a process of its own; idle, it uses no processor.

`benchmarks.peers.vllm_worker.answer_all` is what such a process does.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from engine.errors import AmbidexError

LOAD_SECONDS: Final = 900.0
ANSWER_SECONDS: Final = 1800.0
MAX_ANSWER: Final = 1 << 20


class PeerFailed(AmbidexError):
    """The peer ended, stayed silent, or answered nonsense."""


class Peer:
    """A subprocess that answers each line of JSON with one line of JSON."""

    def __init__(
        self,
        command: Sequence[str],
        settings: Mapping[str, Any],
        environment: Mapping[str, str],
        load_seconds: float = LOAD_SECONDS,
    ) -> None:
        """Start it and wait until it has loaded its model.

        Raises:
            PeerFailed: if it does not come up; the message ends with what it printed last.
        """
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        self._received = b""
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **environment},
            cwd=Path(__file__).parents[2],
            bufsize=0,
        )
        try:
            self.about = self.ask(settings, load_seconds)
        except BaseException:
            self.close()
            raise

    def ask(self, message: Mapping[str, Any], seconds: float = ANSWER_SECONDS) -> dict[str, Any]:
        """Send a message; its answer.

        Raises:
            PeerFailed: if none comes in time.
        """
        assert self._process.stdin is not None
        try:
            view = memoryview(json.dumps(message).encode() + b"\n")
            while view:
                view = view[self._process.stdin.write(view) or 0 :]
            answer = json.loads(self._line(seconds))
        except (OSError, ValueError) as error:
            raise self._failure(str(error)) from error
        if not isinstance(answer, dict):
            raise self._failure("answered no JSON object")
        return answer

    def _line(self, seconds: float) -> bytes:
        assert self._process.stdout is not None
        descriptor, deadline = self._process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise self._failure(f"gave no answer in {seconds:.0f} seconds")
            part = os.read(descriptor, 1 << 16)
            self._received += part
            if not part or len(self._received) > MAX_ANSWER:
                raise self._failure("ended" if not part else "answered too much")
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _failure(self, what: str) -> PeerFailed:
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 2000))
        last = self._log.read().decode(errors="replace").strip()
        return PeerFailed(f"the peer {what}; it printed last:\n{last}")

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
