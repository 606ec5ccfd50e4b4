"""The picture shows the records of its folder, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chart
from engine.errors import ConfigError


def decode(batch: int, experts: int = 32, routing: str = "own", **changes: Any) -> dict[str, Any]:
    params = {
        "shape": "opt-125m",
        "E": experts,
        "k": 6 if experts == 32 else 8,
        "batch": batch,
        "routing": routing,
        "threads": 2,
        "dtype": "bfloat16",
        "dense_share_of_limit": 0.8 / batch,
        "sparse_share_of_limit": 0.6 / batch,
    }
    return {
        "name": "engine_decode",
        "params": params | changes,
        "value": 4.0 * batch + experts / 32,
        "unit": "ms",
        "peer_value": 10.0 * batch + experts / 32,
        "ratio": 2.5,
        "versions": {"torch": "2.13.0"},
        "machine": "a test",
    }


def against_vllm(case: str, side: str) -> dict[str, Any]:
    params = {"shape": "opt-125m", "case": case, "side": side}
    return {"name": "vs_vllm", "params": params, "value": 5.0, "peer_value": 12.0}


RECORDS = [
    *(decode(batch, experts) for experts in (64, 32) for batch in (4, 1)),
    decode(4, routing="same"),
    *(against_vllm(case, "6/32") for case in ("decode:4", "same:4", "prefill:512", "serve")),
]


def write(folder: Path) -> None:
    (folder / "cpu-decode-a.json").write_text(json.dumps(RECORDS[:3]), encoding="utf-8")
    (folder / "cpu-decode-b.json").write_text(json.dumps(RECORDS[3:5]), encoding="utf-8")
    (folder / "cpu-vs-vllm-a.json").write_text(json.dumps(RECORDS[5:]), encoding="utf-8")
    (folder / "cpu-ffn.json").write_text('[{"name": "ffn", "params": {}}]', encoding="utf-8")


def test_lines_are_by_shape_and_experts_with_dense_and_vllm_once(tmp_path: Path) -> None:
    write(tmp_path)
    shapes = chart.lines_by_shape(chart.read_records(tmp_path))
    (lines,) = shapes.values()
    assert lines.milliseconds == {
        "dense": {1: 11.0, 4: 41.0},
        "6 of 32 experts": {1: 5.0, 4: 17.0},
        "6 of 32 experts, all the same": {4: 17.0},
        "8 of 64 experts": {1: 6.0, 4: 18.0},
        "vLLM (dense)": {4: 12.0},
    }
    assert lines.shares["dense"] == {1: 0.8, 4: 0.2}
    assert "vLLM (dense)" not in lines.shares


def test_shapes_get_a_row_each() -> None:
    shapes = chart.lines_by_shape([decode(1), decode(1, shape="opt-1.3b"), *RECORDS[5:]])
    assert list(shapes) == ["opt-125m", "opt-1.3b"]
    assert "vLLM (dense)" not in shapes["opt-1.3b"].milliseconds


def test_the_picture_is_written_with_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path)
    out = tmp_path / "images" / "decode.png"
    chart.main(["--results", str(tmp_path), "--out", str(out)])
    picture = out.read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert int.from_bytes(picture[16:20], "big") == 9 * 160
    assert str(out) in capsys.readouterr().out
    chart.main(["--results", str(tmp_path), "--out", str(out)])
    assert out.read_bytes() == picture


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no cpu-decode-\*.json"):
        chart.main(["--results", str(tmp_path)])
