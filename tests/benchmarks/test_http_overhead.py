"""The benchmark of HTTP against the engine alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.server import http_overhead


def test_one_line_and_its_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_overhead, "REQUESTS", 3)
    file = tmp_path / "overhead.json"
    http_overhead.main(["--model", "tiny", "--rounds", "1", "--json", str(file)])
    assert "tiny" in capsys.readouterr().out
    (record,) = json.loads(file.read_text())
    assert record["params"]["requests"] == 3
    assert record["ratio"] == record["value"] / record["peer_value"] > 0
    assert len(record["params"]["values"]) == len(record["params"]["peer_values"]) == 1
