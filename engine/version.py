"""The version of the installed distribution."""

from __future__ import annotations

from importlib import metadata
from typing import Final


def _installed() -> str:
    try:
        return metadata.version("ambidex")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "0+unknown"


VERSION: Final = _installed()
