"""What an interrupted run needs to go on bit for bit: one directory of safetensors and JSON.

    RUN/state-000150/  weights and optimiser moments (float32), probe patterns, tokenizer, step,
                       controller, clock
    RUN/log.jsonl      one line a logged step, probe or switch

A state is complete when it has its name, and older ones go only then: a kill at any moment leaves
at least the one that was there before.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from engine.checkpoint import (
    atomic_directory,
    load_tensors,
    read_json,
    save_tensors,
    verify_manifest,
    write_json,
)
from engine.model import Decoder
from engine.tokenizer import Tokenizer
from training.activation import ActivationPattern
from training.errors import TrainingError

_STATE_GLOB: Final = "state-*"
LOG: Final = "log.jsonl"


@dataclass(frozen=True)
class Progress:
    """The non-tensor part of a state.

    Attributes:
        step: the next step to take.
        seconds: training time so far, over all sittings.
        controller: `SwitchController.to_dict()`.
        switches: the decisions so far.
        config_digest: of the configuration that the run was started with.
        corpus_fingerprint: of the text that it trains on.
        threads: CPU threads; sums round differently with another number.
    """

    step: int
    seconds: float
    controller: dict[str, Any]
    switches: list[dict[str, Any]]
    config_digest: str
    corpus_fingerprint: str
    threads: int


def save_state(
    run: Path,
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
    patterns: dict[str, ActivationPattern],
    progress: Progress,
) -> None:
    """Write the state of `progress.step`, then remove the previous ones."""
    tensors: dict[str, Tensor] = {f"model.{k}": v for k, v in model.state_dict().items()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, name in names.items():
        state = optimizer.state[parameter]
        tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    for name, pattern in patterns.items():
        for layer, active in enumerate(pattern.layers):
            tensors[f"pattern.{name}.{layer}"] = active
    path = run / f"state-{progress.step:09d}"
    with atomic_directory(path) as directory:
        save_tensors(directory, tensors, "state")
        write_json(directory / "state.json", vars(progress))
        tokenizer.backend.save(str(directory / "tokenizer.json"))
    for other in run.glob(_STATE_GLOB):
        if other != path:
            shutil.rmtree(other)


def load_state(
    run: Path, model: Decoder, optimizer: torch.optim.Optimizer
) -> tuple[Progress, dict[str, ActivationPattern]]:
    """Restore `model` and `optimizer` from the run's latest state; returns the rest.

    Raises:
        CheckpointError: if the state is damaged.
    """
    path = _latest(run)
    assert path is not None
    verify_manifest(path)
    tensors = load_tensors(path, "state")
    progress = Progress(**read_json(path / "state.json"))
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "pattern": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = tensor
    model.load_state_dict(groups["model"])
    parameters = dict(model.named_parameters())
    for name, tensor in groups["optimizer"].items():
        parameter, _, key = name.rpartition(".")
        device = parameters[parameter].device
        optimizer.state[parameters[parameter]][key] = tensor.to(device, copy=True)
    layers: dict[str, dict[int, Tensor]] = {}
    for name, tensor in groups["pattern"].items():
        pattern, _, layer = name.partition(".")
        layers.setdefault(pattern, {})[int(layer)] = tensor.to(model.embedding.weight.device)
    patterns = {
        name: ActivationPattern(tuple(found[i] for i in sorted(found)))
        for name, found in layers.items()
    }
    return progress, patterns


def _latest(run: Path) -> Path | None:
    return max(run.glob(_STATE_GLOB), default=None)


def has_state(run: Path) -> bool:
    return _latest(run) is not None


def saved_tokenizer(run: Path) -> Tokenizer | None:
    """The tokenizer of the run's latest state, if it has one."""
    path = _latest(run)
    return Tokenizer.from_file(path / "tokenizer.json") if path is not None else None


def clear(run: Path) -> None:
    """Remove what earlier training left in `run`: states, log, checkpoint; nothing else."""
    for path in (*run.glob(_STATE_GLOB), *run.glob(".state-*.tmp"), run / "checkpoint"):
        shutil.rmtree(path, ignore_errors=True)
    (run / LOG).unlink(missing_ok=True)


def check_resumable(progress: Progress, config_digest: str, fingerprint: str, run: Path) -> None:
    """Raise TrainingError unless the run in `run` was started with this config and corpus."""
    for what, now, then in (
        ("configuration", config_digest, progress.config_digest),
        ("corpus", fingerprint, progress.corpus_fingerprint),
    ):
        if now != then:
            raise TrainingError(
                f"{run}: holds a run with another {what}; give --out another directory, "
                f"or --fresh to start over"
            )
    if progress.threads != torch.get_num_threads():
        raise TrainingError(
            f"{run}: was trained with {progress.threads} CPU threads, this process has "
            f"{torch.get_num_threads()}; set OMP_NUM_THREADS={progress.threads} to resume exactly, "
            f"or --fresh to start over"
        )


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
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def _before(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] < step)
    except (ValueError, KeyError, TypeError):
        return False  # a line cut short by a kill
