"""The file that --json names: checked before the work, written whole after it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.errors import require

JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the results here.")]


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
