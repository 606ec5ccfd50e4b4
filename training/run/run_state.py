"""What an interrupted run needs to go on bit for bit: one directory of safetensors and JSON.

    RUN/state-000150/  weights and optimiser moments (float32), probe patterns, tokenizer, step,
                       controller, clock
    RUN/log.jsonl      one line a logged step, probe, validation or switch
    RUN/config.json    the configuration

A state is complete when it has its name, and older ones go only then: a kill at any moment leaves
at least the one that was there before.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from engine.checkpoint import (
    MANIFEST,
    atomic_directory,
    load_tensors,
    read_json,
    save_tensors,
    verify_manifest,
    write_json,
)
from engine.errors import CheckpointError
from engine.model.decoder import Decoder
from engine.text.tokenizer import Tokenizer
from training.config import TrainConfig, used_by
from training.errors import TrainingError, writing
from training.experts.activation import ActivationPattern
from training.parallel.sharding import gathered, sharded_like

_STATE: Final = re.compile(r"state-\d{9,}")
_UNFINISHED: Final = re.compile(r"\.state-\d{9,}\.\d+\.(tmp|old)")
LOG: Final = "log.jsonl"


@dataclass(frozen=True)
class Progress:
    """The non-tensor part of a state.

    Attributes:
        step: the next step to take.
        seconds: training time so far, over all sittings.
        controller: `SwitchController.to_dict()`.
        flops: training FLOPs so far, probes included.
        switches: the decisions so far.
        config_digest: identifies the configuration that the run was started with.
        corpus_fingerprint: identifies the text that it trains on.
        device: "cpu" or "cuda"; sums round differently on another one.
        threads: CPU threads of each process; sums round differently with another number.
        processes: how many shared the work; sums round differently with another number.
    """

    step: int
    seconds: float
    flops: float
    controller: dict[str, Any]
    switches: list[dict[str, Any]]
    config_digest: str
    corpus_fingerprint: str
    device: str
    threads: int
    processes: int = 1


def save_state(
    run: Path,
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
    patterns: dict[str, ActivationPattern],
    progress: Progress,
    keep: int = 1,
    *,
    is_main: bool = True,
) -> None:
    """Write the state of `progress.step`, then remove all but the `keep` latest ones.

    Of several processes all call it, since weights may be divided among them; `is_main` writes.
    The state is the same however many there were.

    Raises:
        StorageError: if it cannot be written, on a full disk for example; says what is intact.
    """
    tensors = gathered(_weights_and_moments(model, optimizer), keep=is_main)
    if not is_main:
        return
    for name, pattern in patterns.items():
        for layer, active in enumerate(pattern.layers):
            tensors[f"pattern.{name}.{layer}"] = active
    path = run / f"state-{progress.step:09d}"
    with writing(path, _intact(run)), atomic_directory(path) as directory:
        save_tensors(directory, tensors, "state")
        write_json(directory / "state.json", vars(progress))
        # The backend's own save is not used: for a full disk it raises something else than OSError.
        text = tokenizer.backend.to_str(pretty=True)
        (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    for other in sorted(_folders(run, _STATE), key=_step_of)[:-keep]:
        shutil.rmtree(other)


def _weights_and_moments(
    model: Decoder, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        yield f"model.{name}", tensor
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            yield f"optimizer.{name}.{key}", value


def _intact(run: Path) -> str:
    """The end of an error's sentence: which state is still there when nothing can be written."""
    latest = _latest(run)
    if latest is None:
        return "no state was saved before; free space and start again"
    return f"{latest.name} is intact: free space and run the same command again to go on from it"


def load_state(
    run: Path, model: Decoder, optimizer: torch.optim.Optimizer
) -> dict[str, ActivationPattern]:
    """Restore `model` and `optimizer` from the run's latest state; returns its probe patterns.

    Raises:
        CheckpointError: if the state is damaged.
    """
    path = _latest(run)
    assert path is not None
    tensors = load_tensors(path, verify_manifest(path), "state")
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "pattern": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = tensor
    weights = model.state_dict()
    model.load_state_dict({n: sharded_like(t, weights[n]) for n, t in groups["model"].items()})
    parameters = dict(model.named_parameters())
    for name, tensor in groups["optimizer"].items():
        parameter, _, key = name.rpartition(".")
        owner = parameters[parameter]
        value = tensor.to(owner.device, copy=True)
        is_moment = value.shape == owner.shape
        optimizer.state[owner][key] = sharded_like(value, owner) if is_moment else value
    layers: dict[str, dict[int, Tensor]] = {}
    for name, tensor in groups["pattern"].items():
        pattern, _, layer = name.partition(".")
        layers.setdefault(pattern, {})[int(layer)] = tensor.to(model.embedding.weight.device)
    return {
        name: ActivationPattern(tuple(found[i] for i in sorted(found)))
        for name, found in layers.items()
    }


def _folders(run: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The run's own folders of one kind; whatever else lies in the directory is not ours."""
    found = run.iterdir() if run.is_dir() else ()
    return [p for p in found if p.is_dir() and pattern.fullmatch(p.name)]


def _latest(run: Path) -> Path | None:
    return max(_folders(run, _STATE), key=_step_of, default=None)


def _step_of(state: Path) -> int:
    return int(state.name.removeprefix("state-"))


def load_progress(run: Path) -> Progress | None:
    """The non-tensor part of the run's latest state, verified; None if it has no state.

    Raises:
        CheckpointError: if the state is damaged.
    """
    path = _latest(run)
    if path is None:
        return None
    verify_manifest(path)
    try:
        return Progress(**read_json(path / "state.json"))
    except TypeError as error:
        raise CheckpointError(f"{path / 'state.json'}: {error}") from error


def saved_tokenizer(run: Path) -> Tokenizer:
    """The tokenizer of the run's latest state."""
    path = _latest(run)
    assert path is not None
    return Tokenizer.from_file(path / "tokenizer.json")


def write_config(run: Path, config: TrainConfig) -> None:
    """Write RUN/config.json, for people and for `ambidex report` on a run that is not finished."""
    temporary = run / ".config.json.tmp"
    with writing(run / "config.json", _intact(run)):
        write_json(temporary, dataclasses.asdict(config))
        os.replace(temporary, run / "config.json")


def clear(run: Path) -> None:
    """Remove what earlier training left in `run`: states, log, checkpoint; nothing else."""
    for path in _folders(run, _STATE):
        shutil.rmtree(path)
    if (run / "checkpoint" / MANIFEST).exists():
        shutil.rmtree(run / "checkpoint")
    (run / LOG).unlink(missing_ok=True)


def sweep(run: Path) -> None:
    """Remove states that a kill left unfinished."""
    for path in _folders(run, _UNFINISHED):
        shutil.rmtree(path)


@contextmanager
def exclusive(run: Path) -> Iterator[None]:
    """Hold the run's directory for this process alone.

    Raises:
        TrainingError: if another process is at work there, or it cannot be a directory.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"{run}: cannot be made a directory ({error.strerror})") from error
    with (run / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrainingError(f"{run}: another process is at work here") from error
        yield


def check_resumable(
    run: Path,
    progress: Progress,
    config_digest: str,
    fingerprint: str,
    device: str,
    processes: int = 1,
) -> None:
    """Raise TrainingError unless the run in `run` was started the same way.

    Another number of processes is no obstacle: the run goes on, equal up to rounding.
    """
    gone = None if config_digest == progress.config_digest else _removed_of(run)
    if gone is not None:
        raise TrainingError(
            f"{run}: holds a run that cannot go on: {gone}; give --out another directory, or "
            f"--fresh to start over"
        )
    for what, now, then in (
        ("configuration", config_digest, progress.config_digest),
        ("corpus", fingerprint, progress.corpus_fingerprint),
        ("device", device, progress.device),
    ):
        if now != then:
            raise TrainingError(
                f"{run}: holds a run with another {what}; give --out another directory, "
                f"or --fresh to start over"
            )
    alike = device == "cpu" and progress.processes == processes
    if alike and progress.threads != torch.get_num_threads():
        raise TrainingError(
            f"{run}: was trained with {progress.threads} CPU threads, this process has "
            f"{torch.get_num_threads()}; set OMP_NUM_THREADS={progress.threads} to resume exactly, "
            f"or --fresh to start over"
        )


def _removed_of(run: Path) -> str | None:
    """The sentence about a removed setting that the run used, if it did and can be read."""
    try:
        return used_by(read_json(run / "config.json"))
    except CheckpointError:
        return None


class RunLog:
    """Appends JSON lines; on resume, drops what was written after the state that is resumed."""

    def __init__(self, run: Path, resume_step: int | None) -> None:
        self.path = run / LOG
        kept: list[str] = []
        if resume_step is not None and self.path.exists():
            kept = [
                line for line in self.path.read_text().splitlines() if _before(line, resume_step)
            ]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept))
        os.replace(temporary, self.path)

    def write(self, step: int, **values: Any) -> None:
        line = json.dumps({"step": step, **values}) + "\n"
        intact = _intact(self.path.parent)
        with writing(self.path, intact), self.path.open("a", encoding="utf-8") as file:
            file.write(line)


def _before(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] < step)
    except (ValueError, KeyError, TypeError):
        return False  # a kill cut the line short
