"""A stopped run goes on bit for bit, in every mode; what a run logs, keeps and counts."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoint import load
from engine.model.experts import centroid_router
from training.config import TrainConfig
from training.errors import Interrupted
from training.experts.flops import FlopCounter
from training.report.history import RunHistory
from training.report.training_page import write_report
from training.run.interrupt import StopRequest
from training.trainer import SilentTraining, Trainer

PHASES = {"ssd": {"dense", "sparse", "mixed"}, "dense": {"dense"}, "static": {"dense", "sparse"}}


class StopsAfter(SilentTraining):
    """Asks for the end while a step runs."""

    def __init__(self, last: int) -> None:
        self.request = StopRequest()
        self._last = last

    def step(self, step: int, loss: float, phase: str, tokens_per_second: float) -> None:
        if step == self._last:
            self.request.signal = signal.SIGTERM


def configured(micro: TrainConfig, mode: str, **changes: Any) -> TrainConfig:
    """Few states but those of a stop; a look at held-out text every five steps."""
    switch = dataclasses.replace(micro.switch, mode=mode, top_k=(4, 2), max_sparse_share=0.3)
    return dataclasses.replace(micro, switch=switch, checkpoint_share=0.5, **changes)


def records(run: Path) -> list[dict[str, Any]]:
    """The log without the clock."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    clock = {"tokens_per_second", "seconds"}
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def stop_after(config: TrainConfig, run: Path, corpus: Path, last: int) -> None:
    monitor = StopsAfter(last)
    with pytest.raises(Interrupted, match=f"SIGTERM: stopped before step {last + 1} of 20 with"):
        Trainer(config, run, [corpus], monitor).train(monitor.request)
    assert f"state-{last + 1:09d}" in {path.name for path in run.iterdir()}
    assert not (run / "checkpoint").exists()


@pytest.mark.parametrize(
    ("mode", "lasts"),
    [
        ("ssd", [4]),  # the state is that of a look at held-out text
        ("ssd", [10, 16]),
        ("dense", [8]),
        ("static", [5]),
        ("static", [12]),
    ],
)
def test_a_stopped_run_ends_as_an_uninterrupted_one(
    micro: TrainConfig, corpus: Path, tmp_path: Path, mode: str, lasts: list[int]
) -> None:
    config = configured(micro, mode)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    Trainer(config, whole, [corpus]).train()
    for last in lasts:
        stop_after(config, stopped, corpus, last)
    Trainer(config, stopped, [corpus]).train()
    for folder in ("checkpoint", "state-000000020"):
        (path,) = (whole / folder).glob("*.safetensors")
        expected, found = load_file(path), load_file(stopped / folder / path.name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert records(whole) == records(stopped)
    reports = [load(run / "checkpoint").report for run in (whole, stopped)]
    for key in ("switches", "flops", "evaluation"):
        assert reports[0][key] == reports[1][key]


def test_micro_batches_and_autocast_together_resume_too(
    micro: TrainConfig, corpus: Path, tmp_path: Path
) -> None:
    config = configured(micro, "ssd", batch_size=3, micro_batch_size=2, precision="bfloat16")
    Trainer(config, tmp_path / "whole", [corpus]).train()
    stop_after(config, tmp_path / "stopped", corpus, 9)
    Trainer(config, tmp_path / "stopped", [corpus]).train()
    runs = [load_file(tmp_path / r / "checkpoint/model.safetensors") for r in ("whole", "stopped")]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_stop_in_the_last_step_ends_the_run(
    micro: TrainConfig, corpus: Path, tmp_path: Path
) -> None:
    monitor = StopsAfter(19)
    path = Trainer(micro, tmp_path / "run", [corpus], monitor).train(monitor.request)
    assert load(path).report["tokens_seen"] == 20 * micro.batch_tokens


@pytest.mark.parametrize("mode", ["ssd", "dense", "static"])
def test_what_a_run_leaves_is_understood(
    micro: TrainConfig, corpus: Path, tmp_path: Path, mode: str
) -> None:
    """Its log by the reader of logs, its states, its report; looks where they are due."""
    run = tmp_path / "run"
    config = configured(micro, mode, keep_states=3)
    config = dataclasses.replace(config, checkpoint_share=0.1)
    path = Trainer(config, run, [corpus]).train()
    history = RunHistory.read(run)
    assert history.skipped == 0
    assert [record.step for record in history.steps] == [0, 7, 14]
    assert [record.step for record in history.valids] == [5, 10, 15, 20]
    assert [record.step for record in history.probes][:3] == [1, 2, 3]
    assert {phase for _, _, phase in history.phases} == PHASES[mode]
    for record in history.steps:
        assert None not in (record.loss, record.lr, record.grad_norm, record.flops)
        assert (record.outside is None) == (mode == "dense")  # which is plain training
    policies = set(history.valids[-1].perplexity)
    ks = {"ssd": {"1", "2"}, "dense": set(), "static": {"1", "2"}}[mode]
    assert policies == {"dense"} | ks
    states = sorted(p.name for p in run.iterdir() if p.name.startswith("state-"))
    assert states == ["state-000000016", "state-000000018", "state-000000020"]
    assert json.loads((run / "config.json").read_text()) == json.loads(
        json.dumps(dataclasses.asdict(config))
    )
    assert "Training loss" in write_report(run).read_text()
    assert [point.top_k for point in load(path).config.experts.quality] == [1, 2, 4]


def test_the_logged_flops_are_the_sum_of_the_counted_ones(
    micro: TrainConfig, corpus: Path, tmp_path: Path
) -> None:
    config = configured(micro, "ssd")
    trainer = Trainer(config, tmp_path / "run", [corpus])
    counted: list[float] = []

    class Recording(FlopCounter):
        def token(self, top_k: int | None) -> float:
            counted.append(super().token(top_k))
            return counted[-1]

    trainer.counter = Recording(trainer.model.config, config.switch, config.sequence_length)
    plain = FlopCounter(trainer.model.config, config.switch, config.sequence_length)
    path = trainer.train()
    history = RunHistory.read(tmp_path / "run")
    assert len(counted) == 20
    look = plain.plain_token * 2 / 3 * trainer.data.probe_BL.numel()
    for record in history.steps:
        assert counted[record.step] == plain.token(record.top_k)
        looks = sum(probe.step <= record.step for probe in history.probes)
        total = sum(counted[: record.step + 1]) * config.batch_tokens + looks * look
        assert record.flops == pytest.approx(total, rel=1e-12)
    total = sum(counted) * config.batch_tokens + len(history.probes) * look
    flops = load(path).report["flops"]
    assert flops["training"] == pytest.approx(total, rel=1e-12)
    assert flops["dense"] == plain.plain_token * config.batch_tokens * 20


@pytest.mark.parametrize("mode", ["dense", "static"])
def test_neurons_are_clustered_once(
    micro: TrainConfig, corpus: Path, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dense run when it ends, a static one when its dense phase does."""
    steps = []
    cluster = Trainer._cluster

    def watched(self: Trainer, *, warm_start: bool) -> None:
        steps.append(self.step)
        cluster(self, warm_start=warm_start)

    monkeypatch.setattr(Trainer, "_cluster", watched)
    config = dataclasses.replace(configured(micro, mode), dtype="float32")
    checkpoint = load(Trainer(config, tmp_path / "run", [corpus]).train())
    switches = checkpoint.report["switches"]
    assert steps == ([20] if mode == "dense" else [switches[0]["step"]])
    assert len(switches) == (0 if mode == "dense" else 1)
    for ffn in checkpoint.model.ffns():
        norm = float(ffn.router.norm(dim=1).mean())
        assert norm > 0
        torch.testing.assert_close(ffn.router, centroid_router(ffn.up, 8, norm))
    curve = [point.perplexity for point in checkpoint.config.experts.quality]
    assert len(set(curve)) == 3


def test_no_looks_at_held_out_text_when_none_are_wanted(
    micro: TrainConfig, corpus: Path, tmp_path: Path
) -> None:
    Trainer(dataclasses.replace(micro, validate_share=0.0), tmp_path / "run", [corpus]).train()
    assert RunHistory.read(tmp_path / "run").valids == ()
