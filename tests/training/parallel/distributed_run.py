"""What two processes do for test_distributed.py; each is `python -m` this, in torchrun's variables.

Several checks in one start: importing torch takes longer than all of them.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from training.config import ModelShape, SwitchConfig, TrainConfig
from training.errors import Interrupted
from training.experts.optimizer import ExpertAdamW
from training.parallel.distributed import Team
from training.parallel.sharding import whole
from training.run.interrupt import StopRequest
from training.trainer import Trainer

STOP = 9
# Rows that two processes do not share evenly: 301 tokens, and 36 neurons in 9 experts, of which the
# fifth lies on both.
CONFIG = TrainConfig(
    preset="micro",
    steps=16,
    batch_size=4,
    sequence_length=16,
    seed=3,
    valid_share=0.1,
    validate_share=0.5,
    model=ModelShape(
        vocab_size=301,
        hidden_size=16,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=9,
    ),
    switch=SwitchConfig(top_k=(2,), mixed_top_k=(1, 2, 4), dense_penalty=0.3, penalty=0.3),
)


def config(name: str) -> TrainConfig:
    """The configuration of a case, its name beginning with ddp or fsdp."""
    changed = dataclasses.replace(CONFIG, parallel=name.partition("-")[0])
    if name.endswith("micro"):
        return dataclasses.replace(changed, micro_batch_size=1)
    return changed


class Recorder:
    """Keeps the losses, and asks to stop after some step."""

    def __init__(self, stop: StopRequest | None = None) -> None:
        self.steps: list[tuple[int, str, float]] = []
        self.messages: list[str] = []
        self._stop = stop

    def message(self, text: str) -> None:
        self.messages.append(text)

    def step(self, step: int, loss: float, phase: str, tokens_per_second: float) -> None:
        self.steps.append((step, phase, loss))
        if self._stop is not None and step + 1 == STOP:
            self._stop.signal = signal.SIGTERM


def train(folder: Path, name: str, run: str, team: Team | None = None) -> Recorder:
    """Train a case to its end in folder/run."""
    recorder = Recorder()
    Trainer(config(name), folder / run, [folder / "corpus"], recorder, team=team).train()
    return recorder


def train_and_stop(folder: Path, name: str, run: str, team: Team | None = None) -> Recorder:
    """The same until STOP; of several processes only the first one hears the signal."""
    stop = StopRequest()
    recorder = Recorder(stop)
    trainer = Trainer(config(name), folder / run, [folder / "corpus"], recorder, team=team)
    try:
        trainer.train(stop)
    except Interrupted:
        return recorder
    except SystemExit:
        assert team is not None
        assert not team.is_main
        return recorder
    raise AssertionError("was not stopped")


def optimizer_steps(team: Team) -> dict[str, torch.Tensor]:
    """Weights and moments [36, 4] after dense and sparse steps, sharded and plain."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(36, 4, generator=generator)
    mesh = init_device_mesh("cpu", (team.size,))
    found = {}
    for kind in ("plain", "sharded"):
        generator.manual_seed(1)
        value = start.clone()
        if kind == "sharded":
            value = distribute_tensor(value, mesh, [Shard(0)])
        weight = torch.nn.Parameter(value)
        group = {"params": [weight], "num_experts": 9}
        optimizer = ExpertAdamW([group], lr=0.1, weight_decay=0.1, fused=True)
        # Experts without a gradient: none, all, some, all but a part of the one on both processes.
        for rows in (slice(0, 36), slice(0, 0), slice(5, 11), slice(16, 17), slice(19, 20)):
            gradient = torch.zeros(36, 4)
            gradient[rows] = torch.randn(36, 4, generator=generator)[rows]
            sharded = kind == "sharded"
            weight.grad = distribute_tensor(gradient, mesh, [Shard(0)]) if sharded else gradient
            optimizer.sparse_step()
        found[f"{kind}.weight"] = whole(weight).detach()
        for key, tensor in optimizer.state[weight].items():
            found[f"{kind}.{key}"] = whole(tensor)
    return found


def main(folder: Path) -> None:
    losses = {}
    with Team.from_environment("cpu") as team:
        tensors = optimizer_steps(team)
        if team.is_main:
            save_file(tensors, folder / "optimizer.safetensors")
        for name in ("ddp", "fsdp", "ddp-micro", "fsdp-micro"):
            losses[name] = train(folder, name, name, team).steps
        losses["fsdp-one-to-two"] = train(folder, "fsdp", "one-to-two", team).steps
        for name in ("ddp", "fsdp"):
            train_and_stop(folder, name, f"{name}-resumed", team)
            if team.is_main:
                shutil.copytree(folder / f"{name}-resumed", folder / f"{name}-two-to-one")
            losses[f"{name}-resumed"] = train(folder, name, f"{name}-resumed", team).steps
        if team.is_main:
            (folder / "losses.json").write_text(json.dumps(losses))
        else:
            assert not any(losses.values())
        team.end_process()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
