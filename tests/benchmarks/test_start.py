"""The benchmark of a start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.engine import start


def test_one_table_and_its_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "start.json"
    start.main(["--shape", "tiny", "--rounds", "1", "--json", str(file)])
    said = capsys.readouterr().out
    records = json.loads(file.read_text())
    times = {r["params"]["phase"]: r["value"] for r in records if r["name"] == "engine_start"}
    memory = {r["params"]["kind"]: r for r in records if r["name"] == "engine_memory"}
    assert times["all"] == pytest.approx(sum(times[phase] for phase in start.PHASES))
    assert all(phase in said for phase in times)
    assert 0 < memory["VmRSS"]["value"] <= memory["VmHWM"]["value"]
    assert memory["VmRSS"]["params"]["before"] < memory["VmRSS"]["value"]
    assert memory["VmRSS"]["ratio"] == memory["VmRSS"]["value"] / memory["VmRSS"]["peer_value"]
