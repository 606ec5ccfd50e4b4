"""The clustering benchmark runs from end to end on the packaged model and writes what it prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.training import clustering


def test_one_table_of_the_packaged_model_and_its_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clustering, "LENGTH", 64)
    text = tmp_path / "text"
    text.mkdir()
    for number in range(12):
        lines = [f"def function_{number}_{i}(x):\n    return x + {i}\n" for i in range(40)]
        (text / f"{number}.py").write_text("\n".join(lines), encoding="utf-8")
    path = tmp_path / "records.json"
    sizes = ["--fit-tokens", "512", "--test-tokens", "256", "--k", "8"]
    clustering.main(["--no-timing", "--data", str(text), *sizes, "--json", str(path)])
    printed = capsys.readouterr().out
    records = json.loads(path.read_text(encoding="utf-8"))
    coverages = [r for r in records if r["name"] == "coverage"]
    assert len(coverages) == 10
    for record in coverages:
        assert 0 < record["ratio"] <= 1.0001
        assert f"{record['value']:.1%}" in printed
    assert {r["params"]["grouping"] for r in coverages} == {
        "present",
        "weights",
        "random",
    }


def test_the_times_are_of_whole_clusterings() -> None:
    records = list(clustering.time_clustering([(64, 16, 4)], "cpu", rounds=2))
    assert [r.params["rows"] for r in records] == ["gaussian", "planted"]
    assert all(r.value > 0 and 0 < r.params["inertia"] < 1 for r in records)
