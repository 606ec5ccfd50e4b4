"""Which files of a directory a build may see: `.dockerignore`, as Docker reads it.

Patterns are Go's filepath.Match plus `**` for any number of directories, relative to the
directory; one that matches a directory holds for all below it; `!` brings back; the last pattern
that matches decides (docs.docker.com/build/concepts/context).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self


@dataclass(frozen=True)
class IgnoreRules:
    """The patterns of a `.dockerignore`, in order: an expression, and whether it excludes."""

    rules: tuple[tuple[re.Pattern[str], bool], ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        lines = (line.strip() for line in text.splitlines())
        patterns = [line for line in lines if line and not line.startswith("#")]
        return cls(
            tuple((_expression(p.removeprefix("!")), not p.startswith("!")) for p in patterns)
        )

    @classmethod
    def of(cls, directory: Path) -> Self:
        """Those of the directory's own file, if it has one."""
        path = directory / ".dockerignore"
        return cls.parse(path.read_text(encoding="utf-8") if path.exists() else "")

    def excludes(self, path: PurePosixPath) -> bool:
        """Whether the build does not see `path`, which is relative to the directory."""
        lineage = [str(part) for part in (path, *path.parents[:-1])]
        excluded = False
        for expression, excludes in self.rules:
            if any(expression.fullmatch(part) for part in lineage):
                excluded = excludes
        return excluded


def context_files(directory: Path) -> Iterator[PurePosixPath]:
    """The files and links below `directory` that a build sees, relative to it, in order."""
    rules = IgnoreRules.of(directory)
    for folder, folders, files in os.walk(directory):
        here = PurePosixPath(Path(folder).relative_to(directory).as_posix())
        links = [name for name in folders if Path(folder, name).is_symlink()]
        # Also into those that are excluded: something in them may be brought back.
        folders[:] = sorted(set(folders) - set(links))
        yield from (p for p in _joined(here, [*files, *links]) if not rules.excludes(p))


def _joined(folder: PurePosixPath, names: Iterable[str]) -> Iterator[PurePosixPath]:
    return (folder / name for name in sorted(names))


def _expression(pattern: str) -> re.Pattern[str]:
    """One pattern as a regular expression for a whole relative path."""
    text, i = "", 0
    pattern = pattern.strip().strip("/").removeprefix("./")
    while i < len(pattern):
        if pattern.startswith("**/", i):
            text, i = text + "(?:.*/)?", i + 3
        elif pattern.startswith("**", i):
            text, i = text + ".*", i + 2
        elif pattern[i] == "[" and (end := pattern.find("]", i + 1)) > 0:
            text, i = text + pattern[i : end + 1], end + 1
        elif pattern[i] == "\\" and i + 1 < len(pattern):
            text, i = text + re.escape(pattern[i + 1]), i + 2
        else:
            text += {"*": "[^/]*", "?": "[^/]"}.get(pattern[i], re.escape(pattern[i]))
            i += 1
    return re.compile(text, re.DOTALL)
