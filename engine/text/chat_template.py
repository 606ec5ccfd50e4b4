"""The chat template that a checkpoint brings: a Jinja text, kept but not run here.

It lies where Hugging Face's tokenizers keep it: `chat_template.jinja`, or else the key
`chat_template` of `tokenizer_config.json`, which holds the text or a list of {name, template} with
one named default.
"""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path
from typing import Any, Final

from engine.errors import CheckpointError

TEMPLATE: Final = "chat_template.jinja"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"
MAX_BYTES: Final = 1 << 20


def read_chat_template(directory: Path, files: Container[str]) -> str | None:
    """The template of the checkpoint `directory`; None if it has none.

    Args:
        directory: the checkpoint.
        files: the files that its manifest lists; no other is read.

    Raises:
        CheckpointError: a file is too large or cannot be read.
    """
    if TEMPLATE in files:
        return read_text(directory / TEMPLATE)
    if TOKENIZER_CONFIG not in files:
        return None
    path = directory / TOKENIZER_CONFIG
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    template = found.get("chat_template") if isinstance(found, dict) else None
    if isinstance(template, list):
        template = next(filter(None, map(_default, template)), None)
    return template if isinstance(template, str) else None


def _default(entry: Any) -> str | None:
    """The template of a list's entry if that is the default one."""
    match entry:
        case {"name": "default", "template": str(template)}:
            return template
    return None


def read_text(path: Path) -> str:
    """The text of a small file; raises CheckpointError naming it if it is large or not UTF-8."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path}: larger than {MAX_BYTES >> 10} KiB")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as text ({error})") from error
