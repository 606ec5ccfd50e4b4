"""Builds the Dockerfile with buildah and runs its images with podman: `make image-check`.

    sudo python3 tests/image/check.py [cpu] [cuda] [--build-arg NAME=VALUE]

It needs root, disk space in the temporary directory (8 GB, and 35 GB for cuda), and from Debian

    apt-get install buildah debootstrap podman runc

but neither a registry nor a daemon: the base image that the Dockerfile names is made by debootstrap
and committed under that very name. Images, containers and caches lie in a temporary directory that
is removed at the end.

The steps of the build see the host's pip settings (a mirror, a folder of wheels, a certificate);
nothing of them stays in an image but the empty places that they were mounted at. A host whose pip
prefers a CPU build of torch needs PIP_CONFIG_FILE=/dev/null for the cuda target. No GPU is asked
for: the cuda image's server runs on the CPU here.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

ROOT: Final = Path(__file__).parents[2]
TOOLS: Final = ("buildah", "debootstrap", "podman", "runc")
MIRROR: Final = "http://deb.debian.org"
BUILD_SECONDS, COMMAND_SECONDS, START_SECONDS, STOP_SECONDS = 3600, 600, 600, 45

# What the documentation promises, as the configuration of each built image must say it.
PROMISED: Final[dict[str, Any]] = {
    "User": "10001:10001",
    "WorkingDir": "/models",
    "Volumes": {"/models": {}, "/cache": {}},
    "ExposedPorts": {"8000/tcp": {}},
    "Entrypoint": ["ambidex"],
    "Cmd": ["serve"],
    "StopSignal": "SIGTERM",
}
# The documentation's options for a hardened container, with /tmp as docker mounts it, and without a
# network here. The limits are given because podman's own may be above what the host allows.
HARDENED: Final = (
    *("--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp:noexec,nosuid,nodev"),
    *("--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=none", "--pull=never"),
    *("--http-proxy=false", "--env=AMBIDEX_DEVICE=cpu"),
    *("--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096"),
)
# What asks the server, from inside its container.
CLIENT: Final = """
import sys, urllib.request as web
body = [text.encode() for text in sys.argv[2:]]
headers = {"content-type": "application/json"}
request = web.Request("http://127.0.0.1:8000" + sys.argv[1], *body, headers=headers)
print(web.urlopen(request, timeout=60).read().decode())
"""
# Triton compiles a launcher in C for each kernel when it is first launched.
LAUNCHER: Final = "echo '#include <Python.h>' | gcc -x c -fsyntax-only -I/usr/include/python3.11 -"


class CheckError(RuntimeError):
    """Something did not work; the sentence says what."""


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="check.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("targets", nargs="*", default=["cpu"], help="stages to build and run [cpu]")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    if missing := [name for name in TOOLS if shutil.which(name) is None]:
        sys.exit(f"image-check: apt-get install {' '.join(missing)} first")
    if os.geteuid() != 0:
        sys.exit("image-check: only root may change roots: use sudo")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    store = Store(Path(tempfile.mkdtemp(prefix="image-check-")))
    os.environ["TMPDIR"] = str(store.work)  # for buildah's cache mounts, too
    os.environ["DISABLE_HC_SYSTEMD"] = "true"  # this program asks the health check, no timer
    try:
        make_base(store)
        results = [check(store, target, options.build_arg) for target in options.targets]
    except CheckError as error:
        sys.exit(f"image-check: {error}")
    finally:
        store.remove()
    print(*results, sep="\n")


@dataclass(frozen=True)
class Store:
    """buildah and podman with images and containers of their own, all below one directory."""

    work: Path

    def buildah(self, *arguments: str, **how: Any) -> str:
        """Run buildah where mounts and processes end with it, and return what it prints."""
        private = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        return run(*private, "buildah", *self._places(), *arguments, **how)

    def podman(self, *arguments: str, **how: Any) -> str:
        own = (f"--tmpdir={self.work}/libpod", "--cgroup-manager=cgroupfs", "--runtime=runc")
        return run("podman", *self._places(), *own, "--events-backend=none", *arguments, **how)

    def _places(self) -> tuple[str, ...]:
        """The driver vfs copies layers and mounts nothing, so that it works on any machine."""
        return f"--root={self.work}/root", f"--runroot={self.work}/run", "--storage-driver=vfs"

    def remove(self) -> None:
        """End the containers, whose mounts end with them, then remove the directory."""
        try:
            self.podman("rm", "--all", "--force", "--time=1")
        finally:
            if str(self.work) in Path("/proc/self/mountinfo").read_text(encoding="utf-8"):
                say(f"something is mounted below {self.work}: it stays as it is")
            else:
                shutil.rmtree(self.work)


def make_base(store: Store) -> None:
    """Make the image that the Dockerfile's DEBIAN names, as the official slim one is made."""
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    name, suite = re.findall(r"^ARG DEBIAN=(debian:([a-z]+)\S*)$", dockerfile, re.MULTILINE)[0]
    say(f"debootstrap {suite} in the place of {name}")
    container = store.buildah("from", "scratch").strip()
    root = Path(store.buildah("mount", container).strip())
    run("debootstrap", "--variant=minbase", suite, str(root), f"{MIRROR}/debian")
    releases = (f"debian {suite}", f"debian {suite}-updates", f"debian-security {suite}-security")
    left_out = [f"/usr/share/{name}" for name in ("doc", "groff", "info", "locale", "man")]
    clean = 'DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb || true"; };'
    for path, lines in (
        ("etc/apt/sources.list", [f"deb {MIRROR}/{release} main" for release in releases]),
        ("etc/dpkg/dpkg.cfg.d/docker", [f"path-exclude {folder}/*" for folder in left_out]),
        ("etc/apt/apt.conf.d/docker-clean", [clean]),
    ):
        (root / path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for folder in ("/var/lib/apt/lists", "/var/cache/apt", "/var/log", *left_out):
        shutil.rmtree(f"{root}{folder}", ignore_errors=True)
        Path(f"{root}{folder}").mkdir()
    store.buildah("commit", "--rm", container, f"docker.io/library/{name}")


def pip_config() -> dict[str, str]:
    """The host's pip settings by option; those of the environment win."""
    listing = run(sys.executable, "-m", "pip", "config", "list")
    found = re.findall(r"^(global|install|:env:)\.(\S+)=(.*)$", listing, re.MULTILINE)
    found.sort(key=lambda line: ["global", "install", ":env:"].index(line[0]))
    return {name: ast.literal_eval(text) for _, name, text in found if name != "config-file"}


def pip_volumes(work: Path, config: dict[str, str]) -> list[str]:
    """Volumes by which the settings hold in a build: as a file, and what it names below /mnt."""
    volumes = {str(work / "pip.conf"): "/etc/pip.conf"}

    def inside(word: str) -> str:
        """The word as it must read in the build."""
        path = unquote(urlsplit(word).path) if word.startswith("file://") else word
        if not path.startswith("/") or not Path(path).exists():
            return word
        # The pages of an index on disk refer to files beside it.
        seen = str(Path(path).parent) if word.startswith("file://") else path
        volumes[seen] = f"/mnt{seen}"
        return word.replace(path, f"/mnt{path}")

    lines = [f"{name} = {' '.join(map(inside, text.split()))}\n" for name, text in config.items()]
    (work / "pip.conf").write_text("".join(["[global]\n", *lines]), encoding="utf-8")
    return [f"--volume={source}:{target}:ro" for source, target in volumes.items()]


def build(store: Store, target: str, build_args: list[str]) -> None:
    """Build one stage and what it needs; the log goes to the terminal."""
    # OCI's format has no HEALTHCHECK, and a layer for each step would fill the disk.
    how = ["--isolation=chroot", "--pull-never", "--format=docker", "--layers=false"]
    how += [*pip_volumes(store.work, pip_config()), *(f"--build-arg={arg}" for arg in build_args)]
    what = (f"--target={target}", f"--tag=ambidex:{target}", str(ROOT))
    store.buildah("build", *how, *what, seconds=BUILD_SECONDS, show=True)


def check(store: Store, target: str, build_args: list[str]) -> str:
    """Build one target and ask its container everything; returns what was measured."""
    began = time.monotonic()
    build(store, target, build_args)
    built = time.monotonic() - began
    image = f"ambidex:{target}"
    (facts,) = json.loads(store.podman("image", "inspect", image))
    said = {key: facts["Config"].get(key) for key in PROMISED}
    require(said == PROMISED, f"{image} says {said}, promised is {PROMISED}")
    server = store.podman("run", "--detach", *HARDENED, image).strip()
    try:
        first = answer(store, server)
        for arguments in (["inspect"], ["generate", "def main(", "--max-new-tokens=4"]):
            store.podman("exec", server, *PROMISED["Entrypoint"], *arguments)
            say(f"ambidex {arguments[0]} works beside it")
        if target == "cuda":
            store.podman("exec", server, "sh", "-c", LAUNCHER)
            say("C against Python's headers compiles, as Triton needs it")
        stop(store, server)
        store.podman("start", server)
        again = answer(store, server)
        stop(store, server)
    except CheckError:
        store.podman("logs", server, show=True)
        raise
    return (
        f"{target}: {facts['Size'] / 1e6:,.0f} MB; built in {built:.0f} s; healthy after "
        f"{first:.1f} s, and {again:.1f} s with its kernels compiled"
    )


def answer(store: Store, server: str) -> float:
    """Let a started server answer; returns the seconds until it was healthy."""
    began = time.monotonic()
    wait_until_healthy(store, server)
    healthy = time.monotonic() - began
    say(f"healthy after {healthy:.1f} s by the image's own health check")
    require(ask(store, server, "/health") == {"status": "ok"}, "/health is not ok")
    config = json.loads((ROOT / "engine/starter/config.json").read_text(encoding="utf-8"))
    for experts, ratio in (("dense", 1), ({"top_k": 4}, 4 / config["experts"]["num_experts"])):
        parameters = {"max_new_tokens": 8, "details": True, "experts": experts}
        said = ask(store, server, "/generate", {"inputs": "def main(", "parameters": parameters})
        say(f"POST /generate, {experts}: {said['generated_text']!r}")
        require(said["details"]["experts"]["activated_ratio"] == ratio, f"not {ratio}: {said}")
    kernels = store.podman("exec", server, "sh", "-c", "ls /cache/ambidex/cpu-*.so")
    say(f"compiled {kernels.strip()}")
    return healthy


def stop(store: Store, server: str) -> None:
    """Let the engine send the image's signal, which the server must answer by ending well."""
    began = time.monotonic()
    store.podman("stop", f"--time={STOP_SECONDS}", server)
    status = store.podman("inspect", "--format={{.State.ExitCode}}", server).strip()
    require(status == "0", f"exit status {status} after SIGTERM")
    say(f"SIGTERM: exit status 0 after {time.monotonic() - began:.1f} s")


def wait_until_healthy(store: Store, server: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            store.podman("healthcheck", "run", server)
            return
        except CheckError:
            if time.monotonic() > deadline:
                raise
            store.podman("exec", server, "true")  # fails if the server has ended
            time.sleep(0.5)


def ask(store: Store, server: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON that the server answers to a GET, or to a POST with `body`."""
    bodies = [] if body is None else [json.dumps(body)]
    return json.loads(store.podman("exec", server, "python", "-c", CLIENT, path, *bodies))


def run(*command: str, seconds: int = COMMAND_SECONDS, show: bool = False) -> str:
    """Run a command for at most so long and return its output, or show it on the terminal.

    Raises:
        CheckError: it failed or took too long; the message has its last words.
    """
    pipe = None if show else subprocess.PIPE
    try:
        done = subprocess.run(command, stdout=pipe, stderr=pipe, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise CheckError(f"{' '.join(command)} took more than {seconds} s") from None
    last_words = (done.stderr or done.stdout or "")[-3000:]
    require(done.returncode == 0, f"{' '.join(command)}: status {done.returncode}: {last_words}")
    return done.stdout or ""


def require(condition: bool, sentence: str) -> None:
    if not condition:
        raise CheckError(sentence)


def say(text: str) -> None:
    print(f"image-check: {text}", flush=True)


if __name__ == "__main__":
    main()
