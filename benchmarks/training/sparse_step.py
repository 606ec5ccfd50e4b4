"""Whole training steps on the CPU: sparse against dense, as the trainer takes them.

    ambidex bench train [--json FILE]

A step is forward pass, loss, backward pass, clipping and optimiser, in float32; the sparse one also
refits the routers and measures the concentration penalty, as every sparse step of training does.
Weights and tokens are random and the learning rate is too small to change them much, so tokens
spread over the experts. Dense and sparse steps alternate. The times are medians over all rounds,
the ratio is the median of the rounds' ratios: a disturbance then spoils one round only. Beside the
wall clock, processor time is taken, which other processes on the machine disturb less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from benchmarks.records import MACHINE, VERSIONS, Record, write_records
from engine.model.decoder import Decoder
from training.config import ModelShape, OptimizerConfig, TrainConfig
from training.experts.conversion import refresh_routers
from training.experts.optimizer import build_optimizer
from training.step import accumulate, objective

SIZES: Final = ((256, 4096), (768, 2048), (768, 4096), (1024, 2048))  # width, tokens a step
LAYERS: Final = 3
LENGTH: Final = 512
EXPERTS: Final = 64
CHOSEN: Final = 8
HEAD_DIM: Final = 64
MIN_ROUNDS, MAX_ROUNDS = 4, 9
SECONDS_PER_ROW: Final = 10.0


@dataclass(frozen=True)
class Times:
    """One step: milliseconds by the clock, and of all threads' processor time."""

    wall: float
    cpu: float


class Subject:
    """A model with its optimiser and one batch, ready to be stepped either way."""

    def __init__(self, width: int, tokens: int, layers: int, length: int) -> None:
        heads = width // HEAD_DIM
        self.config = TrainConfig(
            preset="benchmark",
            batch_size=tokens // length,
            sequence_length=length,
            model=ModelShape(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=heads // 2,
                num_experts=EXPERTS,
            ),
            optimizer=OptimizerConfig(learning_rate=1e-6),
        )
        generator = torch.Generator().manual_seed(0)
        self.model = Decoder(self.config.model.model_config(length, 0, "float32"))
        self.model.initialize(generator)
        self.optimizer = build_optimizer(self.model, self.config)
        shape = (self.config.batch_size, length + 1)
        self.ids_BL: Tensor = torch.randint(
            self.config.model.vocab_size, shape, generator=generator
        )

    def step(self, top_k: int | None) -> Times:
        """One training step, sparse with `top_k` experts or dense; how long it took."""
        wall, cpu = time.perf_counter(), time.process_time()
        refresh_routers(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        accumulate(
            lambda inputs_BL, targets_BL: objective(
                self.model, inputs_BL, targets_BL, top_k, self.config.switch
            ),
            self.ids_BL[:, :-1],
            self.ids_BL[:, 1:],
            self.config,
        )
        torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.config.optimizer.grad_clip
        ).item()
        if top_k is None:
            self.optimizer.step()
        else:
            self.optimizer.sparse_step()
        return Times((time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3)


def measure(subject: Subject, seconds: float) -> list[tuple[Times, Times]]:
    """Rounds of a dense and a sparse step, after a round of warm-up."""
    rounds: list[tuple[Times, Times]] = []
    subject.step(None), subject.step(CHOSEN)
    deadline = time.perf_counter() + seconds
    while len(rounds) < MIN_ROUNDS or (len(rounds) < MAX_ROUNDS and time.perf_counter() < deadline):
        rounds.append((subject.step(None), subject.step(CHOSEN)))
    return rounds


def rows(
    sizes: Sequence[tuple[int, int]] = SIZES,
    layers: int = LAYERS,
    length: int = LENGTH,
    seconds: float = SECONDS_PER_ROW,
) -> Iterator[tuple[Record, Record]]:
    """Records of each width and number of tokens: by the clock, and processor time."""
    for width, tokens in sizes:
        rounds = measure(Subject(width, tokens, layers, length), seconds)
        params = {
            "D": width,
            "F": 4 * width,
            "layers": layers,
            "vocab": ModelShape.vocab_size,
            "E": EXPERTS,
            "k": CHOSEN,
            "tokens": tokens,
            "length": length,
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            "rounds": len(rounds),
        }
        wall = [(dense.wall, sparse.wall) for dense, sparse in rounds]
        cpu = [(dense.cpu, sparse.cpu) for dense, sparse in rounds]
        yield _record("train_step", params, wall), _record("train_step_cpu_time", params, cpu)


def _record(name: str, params: dict[str, object], rounds: list[tuple[float, float]]) -> Record:
    dense, sparse = (statistics.median(times) for times in zip(*rounds, strict=True))
    ratio = statistics.median(d / s for d, s in rounds)
    return Record(name, params, sparse, "ms", dense, ratio)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; with --json, keep the records."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the records to this file")
    path: Path | None = parser.parse_args(arguments).json
    print(f"{MACHINE}, {torch.get_num_threads()} threads, torch {VERSIONS['torch']}")
    print(f"a training step of {LAYERS} layers, {CHOSEN} of {EXPERTS} experts, penalty included;")
    print("milliseconds, and times faster than dense")
    print(f"{'':14}{'by the clock':^30}{'processor time':^30}")
    print(f"{'width':>6}{'tokens':>8}" + f"{'dense':>10}{'sparse':>10}{'':>10}" * 2)
    records: list[Record] = []
    for wall, cpu in rows():
        records += (wall, cpu)
        columns = "".join(
            f"{r.peer_value:>10.0f}{r.value:>10.0f}{r.ratio:>9.2f}x" for r in (wall, cpu)
        )
        print(f"{wall.params['D']:>6}{wall.params['tokens']:>8}{columns}", flush=True)
    if path is not None:
        write_records(path, records)


if __name__ == "__main__":
    main()
