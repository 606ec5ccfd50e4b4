"""The engine's benchmarks run from end to end on a tiny model and record what they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engine import engine_speed
from benchmarks.engine.engine_speed import Options
from benchmarks.load import Percentiles, Served
from engine.errors import ConfigError

TINY = ["--shape", "tiny", "--seconds", "0"]


def run(path: Path, command: str, *arguments: str) -> list[dict[str, Any]]:
    engine_speed.main([command, *TINY, *arguments, "--json", str(path)])
    records: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return records


def test_decode_records_both_sides_and_their_share_of_the_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = run(tmp_path / "r.json", "decode", "--experts", "64")
    printed = capsys.readouterr().out
    assert [r["params"]["batch"] for r in records] == list(engine_speed.BATCHES)
    for record in records:
        params = record["params"]
        assert record["ratio"] == record["peer_value"] / record["value"]
        assert (params["E"], params["k"]) == (64, 8)
        assert params["steps"] == engine_speed.MIN_STEPS
        limit_ms = params["sparse_bytes"] / params["bytes_per_second"] * 1e3
        assert params["sparse_share_of_limit"] == pytest.approx(limit_ms / record["value"])
        assert f"{record['value']:.2f}" in printed
    alone, many = records[0]["params"], records[-1]["params"]
    assert alone["experts_read"] == 8 / 64
    assert alone["experts_read"] < many["experts_read"] <= 1
    assert alone["sparse_bytes"] < alone["dense_bytes"] < many["dense_bytes"]


def test_the_same_prompts_read_no_more_experts_than_one() -> None:
    options = Options("tiny", routing="same", seconds=0.0)
    (record,) = engine_speed.decode_records(options, [8])
    assert record.params["experts_read"] == pytest.approx(6 / 32, abs=0.02)


def test_prefill_records_every_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = run(tmp_path / "r.json", "prefill")
    printed = capsys.readouterr().out
    assert [r["params"]["length"] for r in records] == list(engine_speed.PREFILLS)
    for record in records:
        assert record["params"]["rounds"] == engine_speed.MIN_PREFILLS
        assert f"{record['peer_value']:.2f}" in printed


def test_serve_records_the_greatest_throughput_and_poisson_arrivals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_speed, "NEW_TOKENS", 8)
    full, poisson = run(tmp_path / "r.json", "serve", "--requests", "4", "--rate", "50")
    printed = capsys.readouterr().out
    assert full["params"]["arrivals_per_second"] is None
    assert poisson["params"]["arrivals_per_second"] == 50
    for record in (full, poisson):
        for side, tokens_per_second in (("dense", "peer_value"), ("sparse", "value")):
            served = Served.from_dict(record["params"][side])
            assert served.tokens == 4 * 8
            assert served.tokens_per_second == record[tokens_per_second]
            assert f"{served.tokens_per_second:.1f}" in printed
    assert "50.00/s" in printed


def test_the_median_run_is_a_run() -> None:
    times = Percentiles(0.0, 0.0, 0.0)
    runs = [Served(1.0, tokens, times, times) for tokens in (50, 10, 30, 20)]
    assert engine_speed.median_run(runs).tokens == 20
    assert engine_speed.median_run(runs[:3]).tokens == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"routing": "random"}, "routing must be one of own, same; got 'random'"),
        ({"seconds": -1.0}, "seconds must be between 0"),
        ({"threads": 2000}, "threads must be between 0 and 1024"),
    ],
)
def test_options_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Options(**arguments)
