"""Proves the Dockerfile without a container engine: `make image-check`.

    python3 -m deploy.image_check [--target cpu] [--target cuda] [--build-arg NAME=VALUE]

The file's own steps are carried out in a clean Debian root, stage by stage; then the image's
entrypoint runs as the image's user, as process 1, with the root read-only. It must become healthy
by the image's HEALTHCHECK, answer POST /generate, run other commands, and end with status 0 on its
STOPSIGNAL. Needs root, Linux, debootstrap, and some gigabytes in the temporary directory.

A host whose pip is set up to prefer a CPU build of torch needs PIP_CONFIG_FILE=/dev/null for cuda.

What it cannot prove: that an engine reads the file in the same way, and anything about a GPU. The
base image is replaced by what it is made of.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from deploy.dockerfile import Dockerfile, DockerfileError, Image
from deploy.host import Mirrors, missing_tools
from deploy.image_build import Builder
from deploy.image_run import Container, Server, started
from deploy.rootfs import RootError, size

ROOT: Final = Path(__file__).parent.parent
BODY: Final = {"inputs": "def main(", "parameters": {"max_new_tokens": 8, "details": True}}


@dataclass(frozen=True)
class Result:
    """What was measured of one target."""

    target: str
    size: int
    build_seconds: float
    healthy_seconds: float
    again_seconds: float

    def __str__(self) -> str:
        return (
            f"{self.target}: {self.size / 1e6:,.0f} MB; built in {self.build_seconds:.0f} s, "
            f"healthy after {self.healthy_seconds:.1f} s, {self.again_seconds:.1f} s once its "
            "kernels are compiled"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = _options(arguments)
    try:
        dockerfile = _read(options)
        if options.inside is None:
            return _outside(options, sys.argv[1:] if arguments is None else list(arguments))
        builder = Builder(
            dockerfile, options.context, options.inside, lambda suite: _mirrors(options, suite), say
        )
        results = [check(builder, target) for target in options.target]
    except (DockerfileError, RootError, OSError) as error:
        print(f"image-check: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    for result in results:
        print(result)
    return 0


def check(builder: Builder, target: str) -> Result:
    """Build one target and ask its container everything.

    Raises:
        RootError: something did not work.
    """
    image = builder.dockerfile.image(target)
    began = time.monotonic()
    root = builder.build(target)
    built = time.monotonic() - began
    say(f"{target}: running it with a read-only root as {image.user}")
    with started(root, image, builder.work) as box:
        log = builder.work / f"{target}.log"
        healthy, again = (_serve(box, log, _environment(image)) for _ in range(2))
        for command in (("inspect",), ("generate", "def main(", "--max-new-tokens", "4")):
            box.output(*command, env=_environment(image))
            say(f"{target}: ambidex {command[0]} works")
        if image.environment.get("AMBIDEX_DEVICE") == "cuda":
            _require_launchers(box)
    return Result(target, size(root), built, healthy, again)


def _environment(image: Image) -> dict[str, str]:
    """No GPU is asked for: what can be shown of the CUDA image here is that all the rest works."""
    return {"AMBIDEX_DEVICE": "cpu"} if "AMBIDEX_DEVICE" in image.environment else {}


def _serve(box: Container, log: Path, env: dict[str, str]) -> float:
    """Serve, answer and stop; returns the seconds until the server was healthy."""
    with Server(box, log, env) as server:
        healthy = server.wait_until_healthy()
        say(f"healthy after {healthy:.1f} s")
        answer = server.generate(BODY)
        _require(answer["details"]["generated_tokens"] == 8, f"/generate answered {answer}")
        say(f"POST /generate: {answer['generated_text']!r}")
        kernels = list(box.volumes["/cache"].glob("ambidex/cpu-*.so"))
        _require(bool(kernels), f"the CPU kernels were not compiled:\n{server.said()}")
        status, seconds = server.stop()
        _require(status == 0, f"exit status {status} after the signal:\n{server.said()}")
        say(f"{box.image.stop_signal}: exit status 0 after {seconds:.1f} s")
    return healthy


def _require_launchers(box: Container) -> None:
    """What Triton compiles when a kernel is first launched is C against Python's headers."""
    headers = 'I="$(python -c "import sysconfig; print(sysconfig.get_path(\'include\'))")"'
    compiles = "echo '#include <Python.h>' | gcc -x c -fsyntax-only -I\"$I\" -"
    call = box.call(("/bin/sh", "-c", f"{headers}; {compiles}"))
    done = subprocess.run(**call, capture_output=True, text=True, check=False)
    _require(done.returncode == 0, f"no C against Python's headers: {done.stderr[-1000:]}")
    say("C against Python's headers compiles, as Triton needs it")


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise RootError(sentence)


def say(text: str) -> None:
    print(f"image-check: {text}", flush=True)


def _outside(options: argparse.Namespace, arguments: list[str]) -> int:
    """Run this again where mounts are private, and remove its directory when it has ended.

    Nothing is ever mounted out here, so removing cannot reach through a mount; and what the inner
    process leaves running ends with it, since it is process 1 of its own.
    """
    if os.geteuid() != 0:
        raise RootError("only root may mount and change roots: run it with sudo")
    if missing := missing_tools():
        raise RootError(f"install {', '.join(missing)} first, such as by apt-get install")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    work = Path(tempfile.mkdtemp(prefix="image-check-"))
    private = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    again = [sys.executable, "-m", "deploy.image_check", *arguments, "--inside", str(work)]
    try:
        return subprocess.run([*private, *again], cwd=ROOT, check=False).returncode
    finally:
        if options.keep:
            say(f"kept {work}")
        else:
            _remove(work)


def _remove(work: Path) -> None:
    """Remove the directory, unless something is mounted there after all."""
    if str(work) in Path("/proc/self/mountinfo").read_text(encoding="utf-8"):
        say(f"something is mounted below {work}: it stays as it is")
        return
    for _ in range(20):  # what was killed a moment ago may still write
        shutil.rmtree(work, ignore_errors=True)
        if not work.exists():
            return
        time.sleep(0.5)
    say(f"{work} could not be removed")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m deploy.image_check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--target", action="append", help="stage to build and run [cpu]")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument(
        "--context", type=lambda text: Path(text).resolve(), default=ROOT, help="directory to build"
    )
    parser.add_argument("--apt-mirror", help="Debian's archive [the host's]")
    parser.add_argument("--security-mirror", help="its security updates [the host's]")
    parser.add_argument("--keep", action="store_true", help="leave the built roots where they are")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.target = options.target or ["cpu"]
    return options


def _read(options: argparse.Namespace) -> Dockerfile:
    given: dict[str, str] = {}
    for text in options.build_arg:
        name, equals, value = text.partition("=")
        if not equals:
            raise DockerfileError(f"--build-arg {text}: write NAME=VALUE")
        given[name] = value
    dockerfile = Dockerfile.parse(
        (options.context / "Dockerfile").read_text(encoding="utf-8"), given
    )
    for target in options.target:
        dockerfile.stage(target)
    return dockerfile


def _mirrors(options: Any, suite: str) -> Mirrors:
    found = Mirrors.of_host(suite)
    return Mirrors(options.apt_mirror or found.archive, options.security_mirror or found.security)


if __name__ == "__main__":
    sys.exit(main())
