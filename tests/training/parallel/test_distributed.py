"""Two processes train as one does, with DDP and FSDP; what ends one of them ends both.

Two processes are one process with two micro-batches: the same sums in another order. So losses
agree to rounding, 1e-5, the penalty included, which is a ratio over the tokens of a forward pass
and therefore not the same over the whole batch at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import HashStore  # type: ignore[attr-defined]  # torch does not list it

from tests.models import make_corpus
from tests.training.parallel import distributed_run
from training.config import TrainConfig
from training.errors import NonFiniteLoss, TrainingError
from training.parallel import distributed
from training.parallel.distributed import Team
from training.trainer import Trainer

ROOT = Path(__file__).parents[2]
CLOSE = 1e-5
Steps = list[tuple[int, str, float]]


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def environment(**variables: str) -> dict[str, str]:
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **quiet, **variables}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes trained every case."""
    folder = tmp_path_factory.mktemp("two")
    make_corpus(folder / "corpus", documents=20, words=120)
    distributed_run.train_and_stop(folder, "fsdp", "one-to-two")
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, "-m", "tests.training.parallel.distributed_run", str(folder)]
    processes = [
        subprocess.Popen(
            command,
            env=environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return folder


def losses(folder: Path, name: str) -> Steps:
    found = json.loads((folder / "losses.json").read_text())[name]
    return [(step, phase, loss) for step, phase, loss in found]


def assert_alike(found: Steps, expected: Steps, close: float = CLOSE) -> None:
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    assert [loss for *_, loss in found] == pytest.approx([s[2] for s in expected], rel=close)


def alone(config: TrainConfig, folder: Path, run: str) -> Steps:
    recorder = distributed_run.Recorder()
    Trainer(config, folder / run, [folder / "corpus"], recorder).train()
    assert {phase for _, phase, _ in recorder.steps} == {"dense", "sparse", "mixed"}
    return recorder.steps


@pytest.fixture(scope="module")
def halves(folder: Path) -> Steps:
    """One process, two micro-batches."""
    config = dataclasses.replace(distributed_run.CONFIG, micro_batch_size=2)
    return alone(config, folder, "alone")


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(folder: Path, halves: Steps, name: str) -> None:
    assert_alike(losses(folder, name), halves)
    logs = [(folder / run / "log.jsonl").read_text().splitlines() for run in (name, "alone")]
    found, expected = ([json.loads(line) for line in lines] for lines in logs)
    assert len(found) == len(expected)
    for record, other in zip(found, expected, strict=True):
        assert record["step"] == other["step"]
        for key in {"outside", "grad_norm"} & record.keys():
            assert record[key] == pytest.approx(other[key], rel=1e-4)
        if "valid" in record:
            assert record["valid"] == pytest.approx(other["valid"], rel=CLOSE)


def test_both_ways_leave_whole_plain_weights(folder: Path) -> None:
    ddp, fsdp, one = (
        load_file(folder / run / "checkpoint/model.safetensors") for run in ("ddp", "fsdp", "alone")
    )
    assert ddp.keys() == fsdp.keys() == one.keys()
    for name, tensor in fsdp.items():
        # bfloat16: one unit in the last place
        torch.testing.assert_close(tensor, ddp[name], rtol=1e-2, atol=1e-4)


def test_micro_batches_of_each_process_add_up(folder: Path) -> None:
    config = dataclasses.replace(distributed_run.CONFIG, micro_batch_size=1)
    expected = alone(config, folder, "alone-micro")
    assert_alike(losses(folder, "ddp-micro"), expected)
    assert_alike(losses(folder, "fsdp-micro"), expected)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_run_that_was_stopped_ends_bit_for_bit_the_same(folder: Path, name: str) -> None:
    resumed = losses(folder, f"{name}-resumed")
    assert resumed == losses(folder, name)[distributed_run.STOP :]
    expected = load_file(folder / name / "checkpoint/model.safetensors")
    found = load_file(folder / f"{name}-resumed/checkpoint/model.safetensors")
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_one_process_goes_on_from_the_state_of_two(folder: Path, name: str) -> None:
    recorder = distributed_run.train(folder, name, f"{name}-two-to-one")
    assert any("saved by 2 processes, now 1" in message for message in recorder.messages)
    assert recorder.steps[0][0] == distributed_run.STOP
    # Here the penalty is over the whole batch: the same to its first step, then nearly.
    found = [loss for *_, loss in recorder.steps]
    rest = [loss for *_, loss in losses(folder, name)[distributed_run.STOP :]]
    assert found[0] == pytest.approx(rest[0], rel=CLOSE)
    assert found == pytest.approx(rest, rel=1e-3)


def test_two_processes_go_on_from_the_state_of_one(folder: Path) -> None:
    found = losses(folder, "fsdp-one-to-two")
    rest = losses(folder, "fsdp")[distributed_run.STOP :]
    assert [entry[:2] for entry in found] == [entry[:2] for entry in rest]
    assert [s[2] for s in found] == pytest.approx([s[2] for s in rest], rel=1e-3)


def test_sparse_steps_of_sharded_rows_are_those_of_whole_ones(folder: Path) -> None:
    found = load_file(folder / "optimizer.safetensors")
    for key in ("weight", "exp_avg", "exp_avg_sq", "step"):
        torch.testing.assert_close(found[f"sharded.{key}"], found[f"plain.{key}"], rtol=0, atol=0)


def torchrun(corpus: Path, run: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", free_port(), "-m", "ambidex", "train", "--preset", "smoke"]
    command += ["--steps", "12", "--set", "parallel=fsdp", "--set", "model.vocab_size=300"]
    command += ["--set", "evaluate_tokens=1024"]
    command += ["--data", str(corpus), "--out", str(run)]
    return subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def worker_of(launcher: subprocess.Popen[str]) -> int:
    """A process that torchrun started, its second."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return int(children[-1])


def test_a_killed_process_ends_the_other_and_the_run_goes_on(tmp_path: Path) -> None:
    corpus, run = make_corpus(tmp_path / "corpus"), tmp_path / "run"
    launcher = torchrun(corpus, run)
    try:
        deadline = time.monotonic() + 240
        while not any(run.glob("state-*")):
            assert time.monotonic() < deadline
            assert launcher.poll() is None, launcher.communicate()[0]
            time.sleep(0.01)
        os.kill(worker_of(launcher), signal.SIGKILL)
        output, _ = launcher.communicate(timeout=240)
    finally:
        launcher.terminate()
        launcher.wait()
    assert launcher.returncode != 0, output
    launcher = torchrun(corpus, run)
    try:
        output, _ = launcher.communicate(timeout=240)
    finally:
        launcher.terminate()
        launcher.wait()
    assert launcher.returncode == 0, output
    assert output.count("resuming at step") == 1
    assert output.count("step 12/12") == 1
    assert output.count("checkpoint: ") == 1
    report = json.loads((run / "checkpoint/training_report.json").read_text())
    assert report["processes"] == 2


def test_processes_must_divide_the_batch_and_one_of_them_says_so(
    micro: TrainConfig, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "_FIRST_SPEAKS", 0.0)
    with pytest.raises(TrainingError, match="batch_size 2 must be divisible by the number of proc"):
        Trainer(micro, tmp_path / "run", [corpus], team=Team("cpu", 0, 3))
    with pytest.raises(SystemExit) as ended:
        Trainer(micro, tmp_path / "run", [corpus], team=Team("cpu", 1, 3))
    assert ended.value.code == 1
    assert not (tmp_path / "run").exists()


TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"MASTER_PORT": "", "LOCAL_RANK": ""}, "not LOCAL_RANK, MASTER_PORT: start several"),
        ({"RANK": "one"}, "must be whole numbers, got one, 2, 1"),
        ({"RANK": "2"}, "RANK 2 must be below WORLD_SIZE 2"),
    ],
)
def test_variables_that_make_no_sense_are_refused(change: dict[str, str], sentence: str) -> None:
    with pytest.raises(TrainingError, match=sentence):
        Team.from_environment("cpu", environment={**TORCHRUN, **change})


@pytest.mark.parametrize("variables", [{}, {**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}])
def test_one_process_needs_no_group(variables: dict[str, str]) -> None:
    with Team.from_environment("cpu", environment=variables) as team:
        assert (team.rank, team.size, team.is_main) == (0, 1, True)
        assert not torch.distributed.is_initialized()


def test_a_process_whose_others_never_come_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": free_port()}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match="process 0 of 2 could not join the others at 127"):
        Team.from_environment("cpu", join=timedelta(seconds=1), environment=variables)


def test_the_others_wait_for_the_first_and_end_if_it_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(distributed, "_FIRST_SPEAKS", 0.0)
    store = HashStore()
    first, second = Team("cpu", 0, 2, store), Team("cpu", 1, 2, store)
    done = []
    with first.main_first("tokens"):
        done.append(0)
    with second.main_first("tokens"):
        done.append(1)
    assert done == [0, 1]
    with pytest.raises(NonFiniteLoss), first.main_first("bad"):
        raise NonFiniteLoss("no")
    with pytest.raises(SystemExit), second.main_first("bad"):
        pytest.fail("went on")
    with (
        pytest.raises(torch.distributed.DistStoreError),
        second.main_first("never", timedelta(seconds=0.1)),
    ):
        pytest.fail("went on")
