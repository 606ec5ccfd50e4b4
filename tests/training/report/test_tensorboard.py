"""TensorBoard events: read back with TensorBoard's own reader."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from training.errors import TrainingError
from training.experts.study import ActivationStudy, LayerStudy
from training.report.tensorboard import TensorBoardLog

reader: Any
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
except ImportError:
    reader = None
needs_package = pytest.mark.skipif(reader is None, reason="needs the extra: tensorboard")

LAYER = LayerStudy(0.1, 0.01, (0.4, 0.5, 0.7), 0.6, 0.55, (2.0, 1.0, 1.0, 0.0), 0.3, 0.1)
UNROUTED = LayerStudy(0.2, 0.0, (0.1, 0.2, 0.3), 0.2, None, (), 0.2, 0.2)
PROBE = ActivationStudy(1024, 2, (LAYER, UNROUTED)).to_dict()


def step_record(loss: float) -> dict[str, Any]:
    return {
        "phase": "sparse",
        "loss": loss,
        "outside": None,
        "top_k": 8,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_second": 1000.0,
        "flops": 1e12,
        "seconds": 2.0,
    }


def read(run: Path) -> Any:
    events = reader.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


def scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(run).Scalars(tag)]


@needs_package
def test_every_kind_of_record_is_written(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path, 0)
    log.write(0, **step_record(5.0))
    log.write(10, **step_record(4.0))
    log.write(10, probe=PROBE, settled=0.75, drift=None)
    log.write(20, valid={"dense": 70.5, "8": 72.0})
    log.write(20, switch={"step": 20, "phase": "dense", "reason": "x < 1", "cluster": False})
    log.close()
    assert scalars(tmp_path, "train/loss") == [(0, 5.0), (10, 4.0)]
    assert scalars(tmp_path, "train/phase") == [(0, 1.0), (10, 1.0)]
    assert scalars(tmp_path, "probe/settled") == [(10, 0.75)]
    assert scalars(tmp_path, "valid/dense") == [(20, 70.5)]
    assert scalars(tmp_path, "valid/top_k_8") == [(20, 72.0)]
    assert scalars(tmp_path, "active/layer_01") == [(10, pytest.approx(0.2))]
    assert scalars(tmp_path, "dead_experts/layer_00") == [(10, 1.0)]
    events = read(tmp_path)
    absent = {"train/outside", "probe/drift", "coverage/layer_01", "dead_experts/layer_01"}
    assert not absent & set(events.Tags()["scalars"])
    assert events.Tags()["histograms"] == ["load/layer_00"]
    histogram = events.Histograms("load/layer_00")[0].histogram_value
    assert (histogram.num, histogram.min, histogram.max, histogram.sum) == (4, 0, 2, 4)
    text = events.Tensors("switch/text_summary")[0]
    assert (text.step, text.tensor_proto.string_val[0]) == (20, b"dense: x &lt; 1")


@needs_package
def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    first = TensorBoardLog(tmp_path, 0)
    for step in range(5):
        first.write(step, **step_record(10.0 + step))
    # Killed here: never closed. What the state at step 3 does not know is written anew.
    second = TensorBoardLog(tmp_path, 3)
    for step in range(3, 7):
        second.write(step, **step_record(20.0 + step))
    second.close()
    found = scalars(tmp_path, "train/loss")
    assert found == [(0, 10), (1, 11), (2, 12), (3, 23), (4, 24), (5, 25), (6, 26)]
    first.close()


@needs_package
def test_a_fresh_run_hides_what_was_there(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        log = TensorBoardLog(tmp_path, 0)
        log.write(0, **step_record(loss))
        log.close()
    assert scalars(tmp_path, "train/loss") == [(0, 2.0)]


@needs_package
def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path, 0)
    log.write(0, **step_record(float("nan")))
    log.close()
    assert "train/loss" not in read(tmp_path).Tags()["scalars"]


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrainingError, match=r"ambidex\[tensorboard\]"):
        TensorBoardLog(tmp_path, 0)
    assert not list(tmp_path.iterdir())
