"""Compiles the C beside this file for the processor that it runs on, once, and loads it.

Needs a C compiler at run time, as Triton does on GPU hosts. The library is kept in a cache
directory, under a name that changes with the sources, the compiler, the flags and the processor.
Without a compiler everything still runs, on torch's operators; a warning says so once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import torch

logger = logging.getLogger(__name__)

_SOURCE: Final = Path(__file__).with_name("source")
_FLAGS: Final = (
    *("-std=gnu11", "-O3", "-march=native"),
    # No flag that lets the compiler reorder sums: a token's result must not depend on its batch.
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *("-fopenmp", "-shared", "-fPIC"),
)
_SECONDS: Final = 120


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where there is no compiler or AMBIDEX_NATIVE is 0."""
    if os.environ.get("AMBIDEX_NATIVE") == "0":
        return None
    try:
        built = _built()
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning(
            "the CPU kernels could not be compiled, so torch's slower operators serve: %s; "
            "a C compiler (gcc) is all they need",
            _reason(error),
        )
        return None
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:
        logger.warning(
            "the compiled CPU kernels could not be loaded, so torch's slower operators serve: %s; "
            "AMBIDEX_CACHE must name a directory whose file system is not mounted noexec",
            error,
        )
        return None


def _reason(error: Exception) -> str:
    output = getattr(error, "stderr", None) or b""
    # Show what the compiler says, if anything: the command itself is long and says little.
    return (output.decode(errors="replace").strip() or str(error))[:500]


def _built() -> Path:
    """The shared library for these sources, this compiler and this processor."""
    compiler = _compiler()
    sources = sorted(_SOURCE.glob("*.c"))
    flags, libraries = _flags(), _libraries()
    content = b"".join(file.read_bytes() for file in sorted(_SOURCE.glob("*.[ch]")))
    version = subprocess.run(
        [*compiler, "--version"], check=True, capture_output=True, timeout=_SECONDS
    ).stdout
    identity = repr((flags, libraries, version, processor(), torch.__version__)).encode()
    name = f"cpu-{hashlib.sha256(content + identity).hexdigest()[:32]}.so"
    target = _cache_directory() / name
    if not target.exists():
        _compile([*compiler, *flags, *map(str, sources), *libraries], target)
    return target


def _compiler() -> list[str]:
    """The command that compiles: CC, which may have arguments, or what is installed."""
    if chosen := shlex.split(os.environ.get("CC", "")):
        return chosen
    installed = shutil.which("gcc") or shutil.which("cc")
    if installed is None:
        raise FileNotFoundError("no C compiler is installed")
    return [installed]


def _flags() -> tuple[str, ...]:
    wide = platform.machine() in ("x86_64", "AMD64")
    return (*_FLAGS, "-mprefer-vector-width=512") if wide else _FLAGS


def _libraries() -> tuple[str, ...]:
    """The compiler's arguments behind the sources: the libraries to link."""
    # Link torch's own OpenMP: with two of them, two sets of threads would compete for the cores.
    folder = Path(torch.__file__).parent / "lib"
    return (f"-L{folder}", f"-Wl,-rpath,{folder}", "-lm")


def _compile(command: list[str], target: Path) -> None:
    """Compile into a temporary file and rename it: no other process sees half a library."""
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        subprocess.run(
            [*command, "-o", temporary], check=True, capture_output=True, timeout=_SECONDS
        )
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _cache_directory() -> Path:
    """A directory that nobody else can write to: what lies there is executed."""
    try:
        path = _wanted_directory()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
        if found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            with tempfile.TemporaryFile(dir=path):
                return path
        problem = f"{path} belongs to another user, or others may write to it"
    except (OSError, RuntimeError) as error:
        # RuntimeError: Path.home() raises it for a user without a home
        problem = str(error)
    private = _private_directory()
    logger.warning(
        "the compiled CPU kernels are kept in %s and compiled again by the next process: %s; "
        "AMBIDEX_CACHE must name a directory that user %d owns and can write to",
        private,
        problem,
        os.getuid(),
    )
    return private


def _wanted_directory() -> Path:
    if chosen := os.environ.get("AMBIDEX_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "ambidex"


@functools.cache
def _private_directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="ambidex-"))


def processor() -> str:
    """What `-march=native` depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor() or platform.machine()
