"""Reads a Dockerfile: its stages, and what each says about the containers that it makes.

The syntax is that of the Dockerfile reference (docs.docker.com/reference/dockerfile), less what
nobody here needs: here-documents, ONBUILD, SHELL and ADD. Those are refused by name, so that
nothing is passed over in silence.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Self

PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_EXPANDED: Final = frozenset(
    ("FROM", "ARG", "ENV", "COPY", "WORKDIR", "USER", "VOLUME", "LABEL", "EXPOSE", "STOPSIGNAL")
)
_AS_WRITTEN: Final = frozenset(("RUN", "CMD", "ENTRYPOINT", "HEALTHCHECK"))
_VARIABLE: Final = re.compile(
    r"\\(?P<escaped>.)|\$(?:(?P<plain>\w+)|\{(?P<name>\w+)(?:(?P<how>:[-+])(?P<word>[^}]*))?\})"
)
_FLAG: Final = re.compile(r"--(?P<name>[a-z-]+)(?:=(?P<value>\S*))?\s+")


class DockerfileError(ValueError):
    """A Dockerfile that cannot be read or carried out; says where and why."""


@dataclass(frozen=True)
class Instruction:
    """One instruction as it stands in the file.

    Attributes:
        line: where it begins, from 1.
        name: in capitals.
        flags: what stands before the value as `--name=value`.
        value: the rest, with continued lines joined.
    """

    line: int
    name: str
    flags: tuple[tuple[str, str], ...]
    value: str

    def flag(self, name: str) -> str | None:
        return dict(self.flags).get(name)

    def exec_form(self) -> tuple[str, ...] | None:
        """The words of a JSON array, None if the value is not one: then a shell reads it."""
        try:
            words = json.loads(self.value)
        except json.JSONDecodeError:
            return None
        whole = isinstance(words, list) and all(isinstance(word, str) for word in words)
        return tuple(words) if whole else None

    def command(self) -> tuple[str, ...]:
        """What is executed, in either form."""
        return self.exec_form() or ("/bin/sh", "-c", self.value)

    def words(self) -> tuple[str, ...]:
        return self.exec_form() or tuple(shlex.split(self.value))

    def pairs(self) -> dict[str, str]:
        """The `key=value` of ENV, LABEL and ARG; a key without a value has an empty one."""
        return {key: value for key, _, value in (word.partition("=") for word in self.words())}


@dataclass(frozen=True)
class Image:
    """What an image says about its containers, and the build arguments of the stage so far."""

    environment: Mapping[str, str] = field(default_factory=lambda: {"PATH": PATH})
    arguments: Mapping[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "root"
    volumes: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    healthcheck: Instruction | None = None
    stop_signal: str = "SIGTERM"

    def after(self, step: Instruction, given: Mapping[str, str]) -> Self:
        """This image after one more instruction, whose variables are expanded.

        Args:
            given: the build arguments of the command line, which win over their defaults.
        """
        match step.name:
            case "ENV":
                return replace(self, environment={**self.environment, **step.pairs()})
            case "ARG":
                chosen = {name: given.get(name, value) for name, value in step.pairs().items()}
                return replace(self, arguments={**self.arguments, **chosen})
            case "LABEL":
                return replace(self, labels={**self.labels, **step.pairs()})
            case "WORKDIR":
                path = step.value if step.value.startswith("/") else f"{self.workdir}/{step.value}"
                return replace(self, workdir=path)
            case "USER":
                return replace(self, user=step.value)
            case "VOLUME":
                return replace(self, volumes=(*self.volumes, *step.words()))
            case "EXPOSE":
                return replace(self, ports=(*self.ports, *step.words()))
            case "STOPSIGNAL":
                return replace(self, stop_signal=step.value)
            case "ENTRYPOINT":
                return replace(self, entrypoint=step.command(), cmd=())
            case "CMD":
                return replace(self, cmd=step.command())
            case "HEALTHCHECK":
                return replace(self, healthcheck=_check(step))
        return self

    def expand(self, step: Instruction) -> Instruction:
        """The instruction with the variables that are known here."""
        if step.name not in _EXPANDED:
            return step
        known = {**self.arguments, **self.environment}
        flags = tuple((name, expand(value, known)) for name, value in step.flags)
        return replace(step, flags=flags, value=expand(step.value, known))


@dataclass(frozen=True)
class Stage:
    """One FROM and what follows it.

    Attributes:
        name: what other stages call it; its number from 0 if it has no name.
        base: an earlier stage's name, or an image's.
    """

    name: str
    base: str
    steps: tuple[Instruction, ...]


@dataclass(frozen=True)
class Dockerfile:
    """The stages of a file, in its order.

    Attributes:
        arguments: build arguments from the command line.
    """

    stages: tuple[Stage, ...]
    arguments: Mapping[str, str]

    @classmethod
    def parse(cls, text: str, arguments: Mapping[str, str] | None = None) -> Self:
        """Read the text of a Dockerfile.

        Raises:
            DockerfileError: it has what is not understood, or build arguments that it does not.
        """
        given = dict(arguments or {})
        before, stages = Image(environment={}), list[Stage]()
        steps = list(instructions(text))
        for step in steps:
            if step.name == "FROM":
                stages.append(_stage(before.expand(step), len(stages)))
            elif stages:
                stages[-1] = replace(stages[-1], steps=(*stages[-1].steps, step))
            elif step.name == "ARG":
                before = before.after(before.expand(step), given)
            else:
                raise DockerfileError(f"line {step.line}: {step.name} stands before the first FROM")
        if not stages:
            raise DockerfileError("there is no FROM")
        known = {name for step in steps if step.name == "ARG" for name in step.pairs()}
        if unknown := given.keys() - known:
            raise DockerfileError(f"no ARG is named {', '.join(sorted(unknown))}")
        return cls(tuple(stages), given)

    def stage(self, name: str) -> Stage:
        """Raises DockerfileError if there is none of that name."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = ", ".join(stage.name for stage in self.stages)
        raise DockerfileError(f"there is no stage {name!r}, only {names}")

    def has(self, name: str) -> bool:
        return any(stage.name == name for stage in self.stages)

    def image(self, name: str) -> Image:
        """What the image of the stage of that name says when every step is done."""
        stage = self.stage(name)
        image = self.image(stage.base) if self.has(stage.base) else Image()
        for step in stage.steps:
            image = image.after(image.expand(step), self.arguments)
        return image

    def needed(self, target: str) -> list[Stage]:
        """The stages that `target` is made of, itself last; the others are not built."""
        wanted = {target}
        for stage in reversed(self.stages):  # a stage uses earlier ones alone
            if stage.name in wanted:
                sources = (step.flag("from") for step in stage.steps if step.name == "COPY")
                wanted |= {stage.base, *(source for source in sources if source)}
        self.stage(target)
        return [stage for stage in self.stages if stage.name in wanted]


def instructions(text: str) -> Iterator[Instruction]:
    """The instructions of a Dockerfile, comments left out and continued lines joined."""
    parts: list[str] = []
    begins = 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or (parts and not line.strip()):
            continue  # both may stand between continued lines
        begins = begins if parts else number
        parts.append(line.rstrip())
        if parts[-1].endswith("\\"):
            parts[-1] = parts[-1][:-1]
        elif joined := "".join(parts).strip():
            yield _instruction(begins, joined)
            parts = []
        else:
            parts = []
    if parts:
        raise DockerfileError(f"line {begins}: the file ends in a continued line")


def expand(text: str, known: Mapping[str, str]) -> str:
    """Replace `$NAME`, `${NAME}`, `${NAME:-default}`, `${NAME:+word}`; unknown ones are empty."""

    def replacement(found: re.Match[str]) -> str:
        if found["escaped"]:
            return found[0] if found["escaped"] != "$" else "$"
        value = known.get(found["plain"] or found["name"], "")
        match found["how"]:
            case ":-":
                return value or found["word"]
            case ":+":
                return found["word"] if value else ""
        return value

    return _VARIABLE.sub(replacement, text)


def _instruction(line: int, text: str) -> Instruction:
    name, _, rest = text.partition(" ")
    name, rest = name.upper(), rest.strip()
    if name not in _EXPANDED | _AS_WRITTEN:
        raise DockerfileError(f"line {line}: {name} is not supported here")
    flags = []
    while found := _FLAG.match(rest):
        flags.append((found["name"], found["value"] or ""))
        rest = rest[found.end() :]
    if "<<" in rest and re.search(r"<<-?['\"]?[A-Za-z_]", rest):
        raise DockerfileError(f"line {line}: here-documents are not supported here")
    if not rest:
        raise DockerfileError(f"line {line}: {name} says nothing")
    if name == "ARG" and "=" not in rest:
        raise DockerfileError(f"line {line}: ARG {rest} needs a default here")
    return Instruction(line, name, tuple(flags), rest)


def _stage(step: Instruction, number: int) -> Stage:
    match step.words():
        case [base]:
            return Stage(str(number), base, ())
        case [base, keyword, name] if keyword.upper() == "AS":
            return Stage(name.lower(), base, ())
    raise DockerfileError(f"line {step.line}: write FROM image, or FROM image AS name")


def _check(step: Instruction) -> Instruction | None:
    """The command of a HEALTHCHECK with the check's flags; None takes an inherited one back."""
    if step.value == "NONE":
        return None
    keyword, _, command = step.value.partition(" ")
    if keyword != "CMD":
        raise DockerfileError(f"line {step.line}: write HEALTHCHECK CMD command, or NONE")
    return replace(step, value=command.strip())
