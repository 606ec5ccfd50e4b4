"""The soak: its arithmetic, what it calls a problem, and a few seconds of the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.server import soak
from benchmarks.server.soak import Report, Sample, Tally

LAG = "ambidex_event_loop_lag_seconds"
METRICS = {f'{LAG}_bucket{{le="0.1"}}': 98.0, f'{LAG}_bucket{{le="0.5"}}': 99.0}
METRICS[f'{LAG}_bucket{{le="+Inf"}}'] = 100.0


def report(**changes: Any) -> Report:
    values: dict[str, Any] = {
        "seconds": 60.0,
        "rate": 5.0,
        "tally": Tally(sent=3),
        "left": {},
        "slope": 0.0,
        "memory": [Sample(0.0, 100.0)],
        "metrics": METRICS,
    }
    return Report(**{**values, **changes})


def test_the_slope_of_memory_begins_after_the_warm_up() -> None:
    samples = [Sample(t, 1000.0 * t if t < 20 else 500 + 0.5 * t) for t in range(61)]
    assert soak.slope(samples) == pytest.approx(30.0)
    assert soak.slope(samples[:1]) == 0.0


def test_quantiles_of_a_histogram() -> None:
    assert soak.quantile(METRICS, LAG, 0.98) == 0.1
    assert soak.quantile(METRICS, LAG, 0.99) == 0.5
    assert soak.quantile(METRICS, LAG, 1.0) == float("inf")
    text = '# HELP a b\na{le="0.1"} 3.0\nb 4\n'
    assert soak.read_metrics(text) == {'a{le="0.1"}': 3.0, "b": 4.0}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tally": Tally(lost=["stream: 0 ends in 3 events"])}, "lost: stream"),
        ({"left": {"ambidex_kv_blocks_used": 2.0}}, "left over: ambidex_kv_blocks_used 2"),
        ({"slope": 2.5}, "memory grows by 2.50"),
        (
            {"metrics": {**METRICS, f'{LAG}_bucket{{le="0.5"}}': 98.0}},
            "the event loop is inf s late",
        ),
    ],
)
def test_what_is_a_problem(changes: dict[str, Any], sentence: str) -> None:
    assert report().problems(2.0, 0.5) == []
    (problem,) = report(**changes).problems(2.0, 0.5)
    assert problem.startswith(sentence)


def test_a_stream_ends_once_and_at_its_end() -> None:
    token: dict[str, Any] = {"token": {}, "details": None}
    end = {"token": {}, "details": {"finish_reason": "length"}}
    error = {"error": "late", "error_type": "timeout"}
    assert soak._stream_end([token, end]) == "answered"
    assert soak._stream_end([token, error]) == "timeout"
    for events in ([], [token], [end, token], [end, error], [token, end, end]):
        with pytest.raises(ValueError, match="ends in"):
            soak._stream_end(events)


def test_an_error_must_be_one_that_clients_expect() -> None:
    body = {"error": "x", "error_type": "overloaded"}
    fine = httpx.Response(429, json=body, headers={"Retry-After": "2"})
    assert soak._error(fine, {429}) == "overloaded"
    with pytest.raises(ValueError, match="status 429"):
        soak._error(fine, {422})
    with pytest.raises(ValueError, match="without Retry-After"):
        soak._error(httpx.Response(429, json=body, headers={"Retry-After": "0"}), {429})


def test_a_few_seconds_of_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "soak.json"
    limits = ["--max-slope", "1e9", "--max-lag", "10"]
    with pytest.raises(SystemExit) as ended:
        soak.main(["--minutes", "0.06", "--json", str(file), *limits])
    said = capsys.readouterr().out
    assert ended.value.code == 0, said
    assert "nothing lost, nothing left over" in said
    records = {record["name"]: record for record in json.loads(file.read_text())}
    assert records["soak_lost"]["value"] == records["soak_left_over"]["value"] == 0
    ends = records["soak_sent"]["params"]["ends"]
    assert sum(ends.values()) == records["soak_sent"]["value"] > 10
    assert ends["bad body: validation"]
