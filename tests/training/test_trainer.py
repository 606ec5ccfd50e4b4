"""The loop: phases, exact resumption after a kill, and the stop before a bad optimiser step."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoint import load, write_json
from tests.models import make_corpus
from training.config import OptimizerConfig, TrainConfig
from training.errors import DataError, NonFiniteLoss, StorageError, TrainingError
from training.run import run_state
from training.trainer import Trainer


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_run_goes_through_all_phases_and_ends_with_a_scored_checkpoint(
    micro: TrainConfig, corpus: Path, tmp_path: Path
) -> None:
    path = Trainer(micro, tmp_path / "run", [corpus], command="ambidex train").train()
    checkpoint = load(path)
    experts = checkpoint.config.experts
    assert [p.top_k for p in experts.quality] == [1, 2, 4]
    dense = checkpoint.report["evaluation"]["dense"]["perplexity"]
    for point in experts.quality:
        assert point.relative == pytest.approx(point.perplexity / dense - 1, abs=1e-4)
    phases = [switch["phase"] for switch in checkpoint.report["switches"]]
    assert phases[0] == "sparse"
    assert phases[-1] == "mixed"
    card = (path / "README.md").read_text()
    assert "ambidex train" in card
    assert checkpoint.report["corpus"]["fingerprint"] in card
    assert len(log_of(tmp_path / "run")) > 10


def test_the_loss_falls_and_no_switch_makes_it_jump(
    micro: TrainConfig, corpus: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(micro, steps=120)
    losses: list[tuple[str, float]] = []

    class Recorder:
        def message(self, text: str) -> None:
            pass

        def step(self, step: int, loss: float, phase: str, tokens_per_second: float) -> None:
            losses.append((phase, loss))

    Trainer(config, tmp_path / "run", [corpus], Recorder()).train()
    values = [loss for _, loss in losses]
    assert sum(values[-10:]) / 10 < sum(values[:10]) / 10 - 0.5
    noise = max(abs(a - b) for (p, a), (q, b) in itertools.pairwise(losses) if p == q)
    jumps = [b - a for (p, a), (q, b) in itertools.pairwise(losses) if p != q]
    assert jumps
    assert max(jumps) <= noise


def test_two_runs_of_one_seed_are_the_same(
    micro: TrainConfig, corpus: Path, tmp_path: Path
) -> None:
    first = Trainer(micro, tmp_path / "a", [corpus]).train()
    second = Trainer(micro, tmp_path / "b", [corpus]).train()
    other = Trainer(dataclasses.replace(micro, seed=4), tmp_path / "c", [corpus]).train()
    weights = [load_file(p / "model.safetensors") for p in (first, second, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def start(corpus: Path, run: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ambidex", "train", "--preset", "smoke", "--steps", "24"]
    command += ["--set", "evaluate_tokens=1024"]
    command += ["--data", str(corpus), "--out", str(run)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def saved_steps(run: Path) -> list[int]:
    return [int(path.name[6:]) for path in run.glob("state-*")]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text with enough distinct words for a vocabulary of 512."""
    corpus = make_corpus(tmp_path_factory.mktemp("words") / "corpus", documents=120, words=800)
    for name in corpus.iterdir():
        name.write_text(name.read_text() + " ".join(f"w{hash_of(name.name, i)}" for i in range(99)))
    return corpus


@pytest.fixture(scope="module")
def whole(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of the command that nobody interrupted."""
    run = tmp_path_factory.mktemp("whole")
    finish(start(words, run))
    return run


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(
    words: Path, whole: Path, tmp_path: Path, end: signal.Signals
) -> None:
    """Killed, or asked to end: then it says in a sentence where it stopped, with status 1."""
    run = tmp_path / "run"
    process = start(words, run)
    deadline = time.monotonic() + 240
    while max(saved_steps(run), default=0) < 8:
        assert time.monotonic() < deadline
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.005)
    process.send_signal(end)
    said = " ".join(process.communicate(timeout=240)[0].split())
    if end is signal.SIGTERM:
        assert process.returncode == 1
        (step,) = saved_steps(run)
        sentence = f"error: SIGTERM: stopped before step {step} of 24 with its state saved; run the"
        assert f"{sentence} same command again to go on" in said
        assert "Traceback" not in said
    assert "resuming at step" in finish(start(words, run))
    expected = load_file(whole / "checkpoint/model.safetensors")
    found = load_file(run / "checkpoint/model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for kind in ("loss", "valid"):
        logs = [[e[kind] for e in log_of(r) if kind in e] for r in (whole, run)]
        assert logs[0] == logs[1]
        assert len(logs[0]) == 4


def hash_of(name: str, number: int) -> int:
    return (int(name[:3]) * 7919 + number * 104_729) % 997


def test_a_non_finite_loss_stops_before_the_step_and_keeps_the_last_state(
    micro: TrainConfig, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(micro, tmp_path / "run", [corpus])
    before: dict[str, torch.Tensor] = {}

    def poison(self: Trainer) -> None:
        if self.step == 5:
            before.update({n: p.detach().clone() for n, p in self.model.named_parameters()})
            self.optimizer.register_step_pre_hook(fail)
            weight = self.model.norm.weight
            original = self.model.norm.forward
            monkeypatch.setattr(self.model.norm, "forward", lambda x: original(x) * torch.nan)
            assert weight.isfinite().all()

    def fail(*_: object) -> None:
        pytest.fail("the optimiser step was taken")

    monkeypatch.setattr(Trainer, "_probe_and_switch", poison)
    with pytest.raises(NonFiniteLoss, match="step 5: loss nan"):
        trainer.train()
    assert all(torch.equal(before[n], p) for n, p in trainer.model.named_parameters())
    states = list((tmp_path / "run").glob("state-*"))
    assert len(states) == 1
    assert (states[0] / "manifest.json").exists()


def test_a_huge_learning_rate_is_caught_as_non_finite_or_survives(
    micro: TrainConfig, corpus: Path, tmp_path: Path
) -> None:
    """Real divergence, not a planted NaN: whatever happens, no checkpoint holds a NaN."""
    config = dataclasses.replace(micro, optimizer=OptimizerConfig(learning_rate=1.0, grad_clip=1e3))
    try:
        path = Trainer(config, tmp_path / "run", [corpus]).train()
    except NonFiniteLoss:
        path = max((tmp_path / "run").glob("state-*"))
    for file in path.glob("*.safetensors"):
        assert all(bool(t.isfinite().all()) for t in load_file(file).values())


def test_another_config_or_corpus_is_refused_and_fresh_starts_over(
    micro: TrainConfig, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    Trainer(micro, run, [corpus]).train()
    (run / "mine.txt").write_text("not the trainer's")
    longer = dataclasses.replace(micro, steps=24)
    with pytest.raises(TrainingError, match="another configuration"):
        Trainer(longer, run, [corpus]).train()
    (corpus / "new.txt").write_text("more text")
    with pytest.raises(TrainingError, match="another corpus"):
        Trainer(micro, run, [corpus]).train()
    Trainer(longer, run, [corpus], fresh=True).train()
    assert (run / "mine.txt").exists()


def test_fresh_keeps_the_run_until_the_new_one_can_begin(
    micro: TrainConfig, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    Trainer(micro, run, [corpus]).train()
    with pytest.raises(DataError):
        Trainer(micro, run, [tmp_path / "nowhere"], fresh=True)
    assert (run / "checkpoint").is_dir()
    assert run_state.load_progress(run) is not None


def test_only_the_trainers_own_files_are_touched(
    micro: TrainConfig, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for mine in ("state-machine", "state-1", "checkpoint"):
        (run / mine).mkdir(parents=True)
    (run / "state-999999999").write_text("a file")
    (run / ".state-000000003.4711.tmp").mkdir()  # left by a kill
    run_state.clear(run)
    assert (run / "checkpoint").is_dir()
    Trainer(micro, run, [corpus]).train()
    assert {"state-machine", "state-1", "state-999999999"} <= {p.name for p in run.iterdir()}
    assert not (run / ".state-000000003.4711.tmp").exists()


def test_another_shape_is_refused_before_any_work(
    micro: TrainConfig, corpus: Path, tmp_path: Path
) -> None:
    Trainer(micro, tmp_path / "run", [corpus]).train()
    other = dataclasses.replace(micro, model=dataclasses.replace(micro.model, hidden_size=32))
    with pytest.raises(TrainingError, match="another configuration"):
        Trainer(other, tmp_path / "run", [corpus])


def test_two_processes_do_not_train_in_one_directory(
    micro: TrainConfig, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trainer = Trainer(micro, run, [corpus])
    with run_state.exclusive(run), pytest.raises(TrainingError, match="another process"):
        trainer.train()
    trainer.train()


def test_another_number_of_threads_is_refused(
    micro: TrainConfig, corpus: Path, tmp_path: Path
) -> None:
    Trainer(micro, tmp_path / "run", [corpus]).train()
    torch.set_num_threads(2)
    try:
        with pytest.raises(TrainingError, match="OMP_NUM_THREADS=1"):
            Trainer(micro, tmp_path / "run", [corpus]).train()
    finally:
        torch.set_num_threads(1)


def test_a_corpus_shorter_than_a_sequence_is_refused(micro: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(chr(33 + i % 90) * (i % 7) for i in range(4000)))
    config = dataclasses.replace(micro, sequence_length=100_000)
    with pytest.raises(DataError, match="fewer than one sequence"):
        Trainer(config, tmp_path / "run", [tmp_path / "a.txt"])


def test_a_full_disk_keeps_the_previous_state(
    micro: TrainConfig, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    real = write_json

    def full(path: Path, value: Any) -> None:
        if value.get("step", 0) >= 3:
            raise OSError(28, "No space left on device")
        real(path, value)

    monkeypatch.setattr(run_state, "write_json", full)
    with pytest.raises(StorageError, match="No space left"):
        Trainer(micro, run, [corpus]).train()
    assert [p.name for p in run.glob("*state-*")] == ["state-000000002"]
    monkeypatch.undo()
    Trainer(micro, run, [corpus]).train()
