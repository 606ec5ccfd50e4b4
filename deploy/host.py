"""What a build without a container engine takes from the machine that it runs on.

`docker build` resolves names as the host does, and its base image brings Debian's package sources.
Here the steps run in a bare Debian root, so both come from the host, as do pip's settings, since a
host that reaches its packages through a mirror or a folder must build through it too. All of it is
mounted below /mnt for the time of a step: nothing of it stays in an image.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final
from urllib.parse import unquote, urlsplit

DEBIAN: Final = "http://deb.debian.org/debian"
SECURITY: Final = "http://deb.debian.org/debian-security"
PROXIES: Final = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


@dataclass(frozen=True)
class Mirrors:
    """Where a suite of Debian comes from: its archive, and its security updates."""

    archive: str
    security: str

    @classmethod
    def of_host(cls, suite: str) -> Mirrors:
        """Those of the host's own apt where it uses this suite, else Debian's."""
        command = ["apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return cls(DEBIAN, SECURITY)
        pairs = (line.split(maxsplit=1) for line in done.stdout.splitlines())
        known = {pair[0]: pair[1].rstrip("/") for pair in pairs if len(pair) == 2}
        return cls(known.get(suite, DEBIAN), known.get(f"{suite}-security", SECURITY))

    def sources(self, suite: str) -> str:
        """A sources.list, as the official images have it."""
        return (
            f"deb {self.archive} {suite} main\n"
            f"deb {self.archive} {suite}-updates main\n"
            f"deb {self.security} {suite}-security main\n"
        )


@dataclass(frozen=True)
class PipSettings:
    """pip's settings on the host, as they hold inside a root.

    Attributes:
        environment: PIP_* variables.
        folders: what must be visible at the same place.
        files: what must be visible as /mnt/NAME, by that name.
    """

    environment: dict[str, str]
    folders: tuple[Path, ...]
    files: dict[str, Path]

    @classmethod
    def of_host(cls) -> PipSettings:
        """What `pip config list` says."""
        command = [sys.executable, "-m", "pip", "config", "list"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return cls.parse(done.stdout)

    @classmethod
    def parse(cls, listing: str) -> PipSettings:
        """Read lines such as `global.find-links='/srv/wheels'`; those of the environment win."""
        wanted: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
        for line in listing.splitlines():
            key, _, value = line.partition("=")
            section, _, name = key.rpartition(".")
            if section in wanted:
                text = value.strip().strip("'\"").replace("\\n", " ")
                wanted[section][f"PIP_{name.upper().replace('-', '_')}"] = text
        settings = wanted["global"] | wanted["install"] | wanted[":env:"]
        settings.pop("PIP_CONFIG_FILE", None)  # read already
        folders: list[Path] = []
        files: dict[str, Path] = {}
        environment = {
            name: " ".join(_visible(word, folders, files) for word in value.split())
            for name, value in settings.items()
        }
        return cls(environment, tuple(dict.fromkeys(folders)), files)


def _visible(word: str, folders: list[Path], files: dict[str, Path]) -> str:
    """The word as it must read inside; what it names is added to `folders` or `files`."""
    parts = urlsplit(word)
    path = Path(unquote(parts.path) if parts.scheme == "file" else word)
    if not path.is_absolute() or not path.exists():
        return word
    if path.is_dir():
        # The pages of an index on disk refer to files beside it.
        folders.append(path.parent if parts.scheme == "file" else path)
        return word
    name = f"{len(files)}-{path.name}"
    files[name] = path
    return str(PurePosixPath("/mnt", name))


def apt_settings() -> str:
    """The host's own way to fetch packages, and where the sources are, as an apt.conf."""
    done = subprocess.run(
        ["apt-config", "dump", "Acquire"], capture_output=True, text=True, check=False
    )
    # Without lists (Name:: "value") and empty values, which are defaults.
    kept = [line for line in done.stdout.splitlines() if ":: " not in line and ' "";' not in line]
    places = ['Dir::Etc::sourcelist "/mnt/sources.list";', 'Dir::Etc::sourceparts "/mnt/none";']
    return "\n".join([*kept, *places, ""])


def proxies() -> dict[str, str]:
    """The variables that docker build passes on without being asked."""
    return {name: os.environ[name] for name in PROXIES if name in os.environ}


def missing_tools() -> list[str]:
    """What must be installed first."""
    return [name for name in ("debootstrap", "mount", "unshare") if shutil.which(name) is None]
