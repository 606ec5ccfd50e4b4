"""The page to try the model in a browser: its files, and the paths that they are served under."""

from __future__ import annotations

from pathlib import Path
from typing import Final

PAGE: Final = "/playground"
MEDIA_TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
FILES: Final = sorted(f for f in Path(__file__).parent.iterdir() if f.suffix in MEDIA_TYPES)
PATHS: Final = frozenset(
    {PAGE, f"{PAGE}/"} | {f"{PAGE}/{f.name}" for f in FILES if f.suffix != ".html"}
)
