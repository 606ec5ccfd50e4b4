"""Carries out the stages of a Dockerfile in directories, without a container engine."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

from deploy.build_context import context_files
from deploy.dockerfile import Dockerfile, DockerfileError, Image, Instruction, Stage
from deploy.host import Mirrors, PipSettings, apt_settings, proxies
from deploy.rootfs import (
    Account,
    RootError,
    container,
    copy_into,
    copy_root,
    debootstrap,
    inside,
    machine,
    visible,
)

_DEBIAN: Final = re.compile(r"(?:docker\.io/library/)?debian:(?P<suite>[a-z]+)(?:-\d{8})?-slim")


@dataclass
class Builder:
    """Builds stages below `work`, a directory each.

    Attributes:
        context: the directory that is built from.
        say: told what is being done.
    """

    dockerfile: Dockerfile
    context: Path
    work: Path
    mirrors: Callable[[str], Mirrors]
    say: Callable[[str], None]
    _built: dict[str, Path] = field(default_factory=dict)

    def build(self, target: str) -> Path:
        """The root of the target's image; stages that it shares with others are built once.

        Raises:
            DockerfileError: it asks for what cannot be done here.
            RootError: a step failed.
        """
        for stage in self.dockerfile.needed(target):
            if stage.name not in self._built:
                self._built[stage.name] = self._build(stage)
        return self._built[target]

    def _build(self, stage: Stage) -> Path:
        started = time.monotonic()
        root = self.work / stage.name
        if stage.base in self._built:
            copy_root(self._built[stage.base], root)
            image = self.dockerfile.image(stage.base)
        else:
            self._substitute(stage, root)
            image = Image()
        for step in stage.steps:
            step = image.expand(step)
            short = " ".join(step.value.split())[:60]
            self.say(f"{stage.name}: line {step.line}, {step.name} {short}")
            image = image.after(step, self.dockerfile.arguments)
            self._carry_out(step, root, image)
        self.say(f"{stage.name}: done in {time.monotonic() - started:.0f} s")
        return root

    def _substitute(self, stage: Stage, root: Path) -> None:
        """Debian itself in the place of Debian's image."""
        found = _DEBIAN.fullmatch(stage.base)
        if found is None:
            raise DockerfileError(
                f"FROM {stage.base}: without an engine only debian:SUITE-slim can be made here"
            )
        self.say(f"{stage.name}: debootstrap {found['suite']} in the place of {stage.base}")
        debootstrap(found["suite"], root, self.mirrors(found["suite"]).archive)

    def _carry_out(self, step: Instruction, root: Path, image: Image) -> None:
        match step.name:
            case "RUN":
                self._run(step, root, image)
            case "COPY":
                self._copy(step, root, image)
            case "WORKDIR":
                inside(root, image.workdir).mkdir(parents=True, exist_ok=True)

    def _run(self, step: Instruction, root: Path, image: Image) -> None:
        """RUN; of its flags, cache mounts are left out, which changes nothing but the time."""
        for name, value in step.flags:
            if name != "mount" or "type=cache" not in value.split(","):
                raise DockerfileError(f"line {step.line}: RUN --{name}={value} is not supported")
        pip = PipSettings.of_host()
        files = self._host_files(pip)
        account = Account.find(root, image.user)
        environment = {
            **proxies(),
            **pip.environment,
            "APT_CONFIG": "/mnt/apt.conf",
            **image.arguments,
            **image.environment,
        }
        with ExitStack() as mounted:
            mounted.enter_context(machine(root))
            mounted.enter_context(visible(root, files, pip.folders))
            call = container(root, step.command(), account, image.workdir, environment)
            log = (self.work / "log").open("wb")
            mounted.enter_context(log)
            done = subprocess.run(**call, stdout=log, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            output = (self.work / "log").read_text(encoding="utf-8", errors="replace")
            raise RootError(
                f"line {step.line}: RUN ended with status {done.returncode}:\n{output[-3000:]}"
            )

    def _host_files(self, pip: PipSettings) -> dict[str, Path]:
        """What a step sees of the host, by its name below /mnt."""
        folder = self.work / "host"
        folder.mkdir(exist_ok=True)
        suite = self._suite()
        written = {
            "apt.conf": apt_settings(),
            "sources.list": self.mirrors(suite).sources(suite),
        }
        for name, text in written.items():
            (folder / name).write_text(text, encoding="utf-8")
        return {**{name: folder / name for name in written}, **pip.files}

    def _suite(self) -> str:
        return next(
            found["suite"]
            for stage in self.dockerfile.stages
            if (found := _DEBIAN.fullmatch(stage.base))
        )

    def _copy(self, step: Instruction, root: Path, image: Image) -> None:
        allowed = {"from", "chown"}
        if unknown := {name for name, _ in step.flags} - allowed:
            raise DockerfileError(f"line {step.line}: COPY --{unknown.pop()} is not supported")
        *sources, target = step.words()
        wanted = PurePosixPath(image.workdir, target)
        to_folder = target.endswith("/") or target in (".", "..") or len(sources) > 1
        account = Account.find(root, step.flag("chown") or "0:0")
        owner = (account.uid, account.gid)
        origin = step.flag("from")
        if origin is not None and origin not in self._built:
            raise DockerfileError(f"line {step.line}: COPY --from={origin}: no such stage above")
        for source in sources:
            base = self._built[origin] if origin else self._seen_context()
            path = inside(base, source)
            if not path.exists() and not path.is_symlink():
                raise RootError(f"line {step.line}: COPY {source}: not there, or ignored")
            place = wanted if path.is_dir() or not to_folder else wanted / path.name
            copy_into(path, inside(root, place), owner)

    def _seen_context(self) -> Path:
        """A copy of the context without what `.dockerignore` excludes."""
        folder = self.work / "context"
        if not folder.exists():
            for file in context_files(self.context):
                copy_into(self.context / file, folder / file)
        return folder
