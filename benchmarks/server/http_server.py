"""A server in a process of its own, to measure over HTTP."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import httpx

from server.settings import Settings

STARTED_SECONDS: Final = 120.0


@contextmanager
def http_server(
    model: Path, settings: Mapping[str, str]
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process of our own that serves `model`, and its URL; ready, and stopped afterwards.

    `settings` are environment variables; of the caller's own, none that is a setting is passed on.
    """
    own = {"AMBIDEX_PORT": "0", "AMBIDEX_MODEL": str(model), "PYTHONUNBUFFERED": "1"}
    names = {f"AMBIDEX_{name.upper()}" for name in Settings.model_fields}
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    environment = {**inherited, **own, **settings}
    command = [sys.executable, "-m", "server"]
    with subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            silent = threading.Timer(STARTED_SECONDS, child.kill)
            silent.start()
            url = next((u for line in child.stdout if (u := _url_in(line))), None)
            silent.cancel()
            if url is None:
                raise SystemExit("the server did not start")
            _wait_until_up(url)
            yield child, url
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(60)
            except subprocess.TimeoutExpired:
                child.kill()


def _url_in(line: str) -> str | None:
    return next((word for word in line.split() if word.startswith("http://")), None)


def _wait_until_up(url: str) -> None:
    deadline = time.monotonic() + STARTED_SECONDS
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit("the server did not become ready")
