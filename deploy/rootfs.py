"""Directories that are the root of a file system: making, filling, entering and measuring them.

Everything here runs inside a mount namespace of its own (`image_check.py` enters it), so a mount
ends with the process that made it, however that ends, and the host never sees one.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

# The official slim images are made without these.
_LEFT_OUT: Final = ("doc", "groff", "info", "linda", "lintian", "locale", "man")
_DEVICES: Final = ("full", "null", "random", "tty", "urandom", "zero")


class RootError(RuntimeError):
    """A step that did not work, in words that say which."""


@dataclass(frozen=True)
class Account:
    """Who runs something in a root, by numbers."""

    uid: int
    gid: int
    home: str

    @classmethod
    def find(cls, root: Path, user: str) -> Account:
        """The user of an image: `name`, `uid`, or either with `:gid`.

        Raises:
            RootError: a name that the root's passwd does not have.
        """
        name, _, group = user.partition(":")
        for line in (root / "etc/passwd").read_text(encoding="utf-8").splitlines():
            fields = line.split(":")
            if name in (fields[0], fields[2]):
                return cls(int(fields[2]), int(group or fields[3]), fields[5])
        if not name.isdecimal():
            raise RootError(f"USER {user}: there is no such user in the image")
        return cls(int(name), int(group or 0), "/")


def debootstrap(suite: str, root: Path, mirror: str) -> None:
    """A bare Debian, made like the official slim image."""
    root.mkdir(parents=True)
    run(["debootstrap", "--variant=minbase", suite, str(root), mirror])
    excludes = "".join(f"path-exclude /usr/share/{name}/*\n" for name in _LEFT_OUT)
    keep = "path-include /usr/share/doc/*/copyright\n"
    (root / "etc/dpkg/dpkg.cfg.d/docker").write_text(excludes + keep, encoding="utf-8")
    (root / "etc/apt/apt.conf.d/docker-clean").write_text(
        'DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb || true"; };\n', encoding="utf-8"
    )
    for name in _LEFT_OUT:
        for file in (root / "usr/share" / name).rglob("*"):
            if not file.is_dir() and file.name != "copyright":
                file.unlink()
    for folder in ("var/lib/apt/lists", "var/cache/apt", "var/log"):
        for entry in (root / folder).iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for name in ("hosts", "resolv.conf"):  # the engine mounts its own here
        (root / "etc" / name).write_text("", encoding="utf-8")
    (root / "etc/apt/sources.list").unlink()


def copy_root(source: Path, target: Path) -> None:
    run(["cp", "--archive", "--reflink=auto", str(source), str(target)])


def copy_into(source: Path, target: Path, owner: tuple[int, int] = (0, 0)) -> None:
    """COPY: a file, link or the contents of a directory, which all get one owner."""
    if source.is_dir() and not source.is_symlink():
        target.mkdir(parents=True, exist_ok=True)
        for entry in sorted(source.iterdir()):
            copy_into(entry, target / entry.name, owner)
        os.chmod(target, stat.S_IMODE(source.stat().st_mode))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
    os.chown(target, *owner, follow_symlinks=False)


def inside(root: Path, path: PurePosixPath | str) -> Path:
    """The path on the host of an absolute path in `root`."""
    return root / str(path).lstrip("/")


def mount(source: str | Path, target: Path, *options: str) -> None:
    run(["mount", *options, str(source), str(target)])


def bind(source: Path, target: Path, *, writable: bool = False) -> None:
    """Make `source` visible at `target` too."""
    mount(source, target, "--bind")
    if not writable:
        mount(source, target, "--options", "remount,bind,ro")


@contextmanager
def machine(root: Path) -> Iterator[None]:
    """What an engine mounts: the host's names, /sys, /dev with shared memory of Docker's size."""
    dev = root / "dev"
    with ExitStack() as mounted:
        mount("tmpfs", dev, "-t", "tmpfs", "--options", "mode=755")
        mounted.callback(unmount, dev)
        for name in _DEVICES:
            (dev / name).touch()
            bind(Path("/dev", name), dev / name, writable=True)
            mounted.callback(unmount, dev / name)
        (dev / "shm").mkdir()
        mount("tmpfs", dev / "shm", "-t", "tmpfs", "--options", "size=64m,mode=1777")
        mounted.callback(unmount, dev / "shm")
        for name, target in (
            ("fd", "fd"),
            ("stdin", "fd/0"),
            ("stdout", "fd/1"),
            ("stderr", "fd/2"),
        ):
            (dev / name).symlink_to(f"/proc/self/{target}")
        (dev / "pts").mkdir()
        mount("devpts", dev / "pts", "-t", "devpts", "--options", "newinstance,ptmxmode=666")
        mounted.callback(unmount, dev / "pts")
        (dev / "ptmx").symlink_to("pts/ptmx")
        for path in ("/sys", "/etc/hosts", "/etc/resolv.conf"):
            bind(Path(path), inside(root, path))
            mounted.callback(unmount, inside(root, path))
        yield


@contextmanager
def visible(root: Path, files: Mapping[str, Path], folders: Sequence[Path]) -> Iterator[None]:
    """Show files of the host below /mnt, and folders where they are; read-only, and only now."""
    made: list[Path] = []
    with ExitStack() as mounted:
        mount("tmpfs", root / "mnt", "-t", "tmpfs")
        mounted.callback(unmount, root / "mnt")
        for name, path in files.items():
            (root / "mnt" / name).touch()
            bind(path, root / "mnt" / name)
            mounted.callback(unmount, root / "mnt" / name)
        for folder in folders:
            target = inside(root, str(folder))
            missing = [p for p in (target, *target.parents) if not p.exists()]
            target.mkdir(parents=True, exist_ok=True)
            made += missing
            bind(folder, target)
            mounted.callback(unmount, target)
        yield
    for path in made:
        if not any(path.iterdir()):
            path.rmdir()


def unmount(target: Path) -> None:
    run(["umount", "--lazy", str(target)])


def container(
    root: Path, command: Sequence[str], account: Account, workdir: str, env: Mapping[str, str]
) -> dict[str, Any]:
    """Arguments for subprocess that run `command` in `root`, as process 1 of its own."""
    unshare = shutil.which("unshare")
    assert unshare is not None
    enter = [unshare, "--pid", "--fork", "--kill-child", "--mount-proc", "--root", str(root)]
    who = ["--wd", workdir, "--setgid", str(account.gid), "--setuid", str(account.uid)]
    return {"args": [*enter, *who, "--", *command], "env": {"HOME": account.home, **env}}


def run(command: Sequence[str]) -> None:
    """Raises RootError with the last words of a command that fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip())[-1000:]
        raise RootError(f"{' '.join(command[:4])}: {words}")


def size(root: Path) -> int:
    """Bytes of the files below `root`, each once, whatever is mounted there left out."""
    device = root.lstat().st_dev
    seen: dict[int, int] = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [d for d in folders if Path(folder, d).lstat().st_dev == device]
        for name in files:
            found = Path(folder, name).lstat()
            seen[found.st_ino] = found.st_size
    return sum(seen.values())
