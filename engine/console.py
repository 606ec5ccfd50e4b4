"""What all commands share: their exit status, their messages, and the file that --json names."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from engine.errors import AmbidexError, require

JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the results here.")]


def run(command: Callable[[], object]) -> None:
    """Run a command line; our own errors become one sentence and exit status 1."""
    if os.getpid() == 1:
        # The first process of a container ignores signals that it does not handle. Serving and
        # training set handlers of their own, seconds from now.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        command()
    except (AmbidexError, OSError) as error:
        # Whole, where no terminal breaks it: a break inside a path would hide what to look for.
        problem = f"error: {error}"
        stderr().print(problem, style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def stderr() -> Console:
    """For messages about the work; results go to standard output."""
    return Console(stderr=True)


def check_writable(file: Path | None) -> None:
    """Refuse a results file that could not be written, before the work is done."""
    if file is not None:
        folder = file.parent
        require(folder.is_dir(), f"--json must name a file in an existing directory, not {folder}")
        require(not file.is_dir(), f"--json must name a file, {file} is a directory")


def write_result(file: Path, value: Any) -> None:
    """Write a results file whole, or leave what was there."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    # Renaming over a link (/dev/stdout is one), a device or a pipe would replace it by a file.
    if file.is_symlink() or (file.exists() and not file.is_file()):
        file.write_text(text, encoding="utf-8")
        return
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
