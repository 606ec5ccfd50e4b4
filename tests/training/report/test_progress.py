"""Progress bars: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from training.report.progress import ImportProgress


@pytest.mark.parametrize("terminal", [True, False])
def test_an_import_shows_its_stage_and_how_far_it_is(terminal: bool) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120)
    with ImportProgress(200, console) as progress:
        progress.advance("layer 1/2 routed:8", 50)
        progress.message("layer 1/2: 12% of the neurons [fire]")
    text = file.getvalue()
    assert "12% of the neurons [fire]" in text
    assert ("layer 1/2 routed:8" in text and "25%" in text) == terminal
