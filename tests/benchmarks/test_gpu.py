"""The GPU benchmark, tried out in the interpreter: every section runs, errors are borne."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.__main__ import Report
from benchmarks.gpu.kernels import Case
from benchmarks.records import Record, write_records

RECORD = Record("name", {"tokens": 1, "dtype": "bf16"}, 2.0, "us", 5.0, 2.5)


def test_every_usual_section_runs_at_tiny_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "records.json"
    gpu.main(["--tiny", "--json", str(path)])
    names = {record["name"] for record in json.loads(path.read_text())}
    wanted = {
        "ceiling copy bandwidth",
        "few_tokens",
        "few_tokens share of copy",
        "routing select",
        "routing step",
        "used_experts",
        "attend_step",
        "decode device",
        "decode step",
        "decode experts in use",
        "prefill device",
        "prefill graph",
        "prefill graph step",
        "tile gather best",
        "tile spread best",
        "tile few_tokens first best",
        "tile few_tokens second best",
        "tile used_experts first best",
        "tile used_experts second best",
    }
    assert wanted <= names
    for kind in ("few_tokens full", "many_tokens by TMA", "attend_chunks", "prompt graph top_k:2"):
        assert any(name.startswith(f"error {kind}") for name in names), kind
    printed = capsys.readouterr().out
    assert "FAILED" not in printed
    assert "left out" not in printed
    assert " 0 failures, sections cut short: none" in printed


def test_a_failing_case_is_told_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> list[Record]:
        raise ValueError("no\nluck")

    def wrong() -> list[Record]:
        raise SystemExit("relative error 1 exceeds 0")

    def cases() -> Iterator[Case]:
        yield from (("a", broken), ("b", wrong), ("c", lambda: [RECORD]))
        raise RuntimeError("out of memory")

    path = tmp_path / "records.json"
    report = Report(time.monotonic() + 60, path)
    report.section("s", cases)
    report.section("t", lambda: iter([("d", lambda: [RECORD])]))
    assert report.failures == ["a", "b", "section s"]
    assert len(report.records) == len(json.loads(path.read_text())) == 2
    printed = capsys.readouterr().out
    assert "FAILED a: ValueError: no luck (" in printed
    assert "FAILED section s: RuntimeError: out of memory" in printed


def test_no_case_starts_after_the_deadline(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(time.monotonic() - 1)
    report.section("s", lambda: iter([("a", lambda: [RECORD])]))
    assert report.skipped == ["s"]
    assert not report.records
    assert "skipped: the rest of section s, no time is left" in capsys.readouterr().out


def test_a_row_names_what_was_measured() -> None:
    assert gpu.row(RECORD).split() == ["name", "tokens=1", "2", "us", "5", "2.50x"]


def test_unknown_sections_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--sections", "check,nonsense"])
    assert "unknown sections nonsense" in capsys.readouterr().err


def test_a_lost_device_hands_the_rest_to_a_new_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    class Finished:
        returncode = 0

    def run(command: list[str], check: bool) -> Finished:
        commands.append(command)
        further = Path(command[command.index("--json") + 1])
        write_records(further, [RECORD])
        return Finished()

    monkeypatch.setattr("benchmarks.gpu.__main__.subprocess.run", run)
    report = Report(time.monotonic() + 60, tmp_path / "records.json", [RECORD])
    gpu.go_on_elsewhere(report, ["kernels", "tiles"], tiny=True)
    (command,) = commands
    assert command[command.index("--sections") + 1] == "kernels,tiles"
    assert gpu.parse(command[3:]).seconds == pytest.approx(60, abs=2)
    assert len(json.loads((tmp_path / "records.json").read_text())) == 2
