"""Runs a built image as `docker run --read-only --tmpfs /tmp` would, for the check's questions."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deploy.dockerfile import Image
from deploy.rootfs import Account, RootError, bind, container, inside, machine, mount, unmount

START_SECONDS: Final = 180
STOP_SECONDS: Final = 45  # what the documentation gives `docker stop`


@dataclass(frozen=True)
class Container:
    """An image whose root is mounted read-only, with a tmpfs on /tmp and its volumes.

    Attributes:
        volumes: where on the host the image's volumes lie, by their path inside.
    """

    root: Path
    image: Image
    account: Account
    volumes: Mapping[str, Path]

    def call(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Arguments for subprocess; `env` is what `docker run --env` gives."""
        environment = {"HOSTNAME": "image-check", **self.image.environment, **(env or {})}
        return container(self.root, command, self.account, self.image.workdir, environment)

    def output(self, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        """What the entrypoint prints when it is given other arguments than the default ones.

        Raises:
            RootError: it does not exit 0.
        """
        call = self.call((*self.image.entrypoint, *arguments), env)
        done = subprocess.run(
            **call, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RootError(
                f"ambidex {' '.join(arguments)}: {(done.stderr or done.stdout)[-2000:]}"
            )
        return str(done.stdout)


@contextmanager
def started(root: Path, image: Image, work: Path) -> Iterator[Container]:
    """The image's root made read-only, as an engine does before it starts the entrypoint."""
    account = Account.find(root, image.user)
    view, volumes = work / "view", work / "volumes"
    view.mkdir()
    with ExitStack() as mounted:
        bind(root, view)
        mounted.callback(unmount, view)
        mounted.enter_context(machine(view))
        # Docker's own options for --tmpfs.
        mount("tmpfs", view / "tmp", "-t", "tmpfs", "--options", "mode=1777,noexec,nosuid,nodev")
        mounted.callback(unmount, view / "tmp")
        places = {}
        for number, path in enumerate(image.volumes):
            # A new volume begins as what the image has there, owner included.
            place = volumes / str(number)
            shutil.copytree(inside(root, path), place, symlinks=True)
            found = inside(root, path).stat()
            os.chown(place, found.st_uid, found.st_gid)
            bind(place, inside(view, path), writable=True)
            mounted.callback(unmount, inside(view, path))
            places[path] = place
        yield Container(view, image, account, places)
    view.rmdir()
    shutil.rmtree(volumes, ignore_errors=True)


class Server:
    """The image's default command, as process 1, with a port of its own."""

    def __init__(self, box: Container, log: Path, env: Mapping[str, str]) -> None:
        self.box, self.log = box, log
        self.port = _free_port()
        self.env = {"AMBIDEX_PORT": str(self.port), **env}
        call = box.call((*box.image.entrypoint, *box.image.cmd), self.env)
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                **call, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait_until_healthy(self) -> float:
        """Seconds until the image's own HEALTHCHECK succeeds.

        Raises:
            RootError: the process ends, or it takes too long.
        """
        check = self.box.image.healthcheck
        if check is None:
            raise RootError("the image has no HEALTHCHECK")
        began = time.monotonic()
        while time.monotonic() - began < START_SECONDS:
            if self.process.poll() is not None:
                raise RootError(f"the server ended by itself:\n{self.said()[-3000:]}")
            call = self.box.call(check.command(), self.env)
            last = subprocess.run(**call, capture_output=True, text=True, check=False)
            if last.returncode == 0:
                return time.monotonic() - began
            time.sleep(0.5)
        raise RootError(
            f"not healthy after {START_SECONDS} s: {last.stderr[-300:]}\n{self.said()[-3000:]}"
        )

    def generate(self, body: Mapping[str, Any]) -> Any:
        """The answer of POST /generate."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/generate",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            request, timeout=60
        ) as answer:
            return json.load(answer)

    def stop(self) -> tuple[int, float]:
        """The image's STOPSIGNAL to process 1; its exit status, and how long it took.

        Raises:
            RootError: it does not end.
        """
        began = time.monotonic()
        os.kill(self._first_process(), signal.Signals[self.box.image.stop_signal])
        try:
            return self.process.wait(STOP_SECONDS), time.monotonic() - began
        except subprocess.TimeoutExpired:
            raise RootError(f"still running {STOP_SECONDS} s after the signal") from None

    def _first_process(self) -> int:
        """Process 1 of the container, the only child of the `unshare` that made it."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
        return int(children[0])

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()  # and process 1 with it: --kill-child
            self.process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
