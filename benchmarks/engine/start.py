"""Starting an engine on the CPU: how long it takes, and what it keeps in memory.

    ambidex bench start [--shape opt-1.3b] [--json FILE]

Writes a checkpoint of random weights, bfloat16, into a temporary directory. Then processes of their
own, one after the other, each load it and generate one token; the operating system has the files in
its cache, as after a restart of the server. Resident memory is Linux's count (proc(5), VmRSS) after
that token, VmHWM the most that there was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.models import model_config, random_checkpoint, shape_named
from benchmarks.records import MACHINE, VERSIONS, Record, write_records
from engine.checkpoint import load, save
from engine.config import EngineConfig, check_range
from engine.policy import ExpertPolicy
from engine.serving.engine import Engine
from engine.serving.request import SamplingParams

EXPERTS: Final = 32
PHASES: Final = ("load", "engine", "first token")
MEMORY: Final = ("VmRSS", "VmHWM")
MIB: Final = 1 << 20
WAIT: Final = 600.0  # seconds for one start


def start(path: Path) -> dict[str, Any]:
    """Start an engine in this process; seconds by phase, bytes by kind."""
    before = _memory()["VmRSS"]
    times = [time.perf_counter()]
    checkpoint = load(path)
    weights = sum(t.nbytes for t in checkpoint.model.state_dict().values())
    times.append(time.perf_counter())
    config = EngineConfig()
    engine = Engine(checkpoint, config)
    times.append(time.perf_counter())
    engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=1), ExpertPolicy.dense())
    times.append(time.perf_counter())
    seconds = [end - begin for begin, end in itertools.pairwise(times)]
    return {
        "seconds": dict(zip(PHASES, seconds, strict=True)),
        "weights": weights,
        "kv": config.kv_cache_bytes,
        "before": before,
        **_memory(),
    }


def _memory() -> dict[str, int]:
    """Bytes of this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    entries = dict(line.split(":", 1) for line in status.splitlines())
    return {name: int(entries[name].split()[0]) << 10 for name in MEMORY}


def started(path: Path) -> dict[str, Any]:
    """`start` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.engine.start", "--worker", str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=WAIT, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def records(shape: str, rounds: int) -> Iterator[Record]:
    """Medians over the rounds."""
    config = model_config(shape_named(shape), EXPERTS, torch.bfloat16)
    with tempfile.TemporaryDirectory(prefix="ambidex-start-") as directory:
        path = Path(directory) / "checkpoint"
        made = random_checkpoint(config)
        save(path, made.model, made.tokenizer, {})
        del made
        runs = [started(path) for _ in range(rounds)]
    params = {"shape": shape, "dtype": "bfloat16", "rounds": rounds}
    for phase in PHASES:
        median = statistics.median(run["seconds"][phase] for run in runs)
        yield Record("engine_start", {**params, "phase": phase}, median, "s")
    total = statistics.median(sum(run["seconds"].values()) for run in runs)
    yield Record("engine_start", {**params, "phase": "all"}, total, "s")
    needed = runs[0]["weights"] + runs[0]["kv"]
    parts = {name: runs[0][name] for name in ("weights", "kv")}
    for name in MEMORY:
        taken = int(statistics.median(run[name] for run in runs))
        details = {**params, **parts, "kind": name, "before": runs[0]["before"]}
        yield Record("engine_memory", details, taken, "bytes", needed, taken / needed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; with --json, keep the records."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="opt-1.3b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the records to this file")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker is not None:
        print(json.dumps(start(given.worker)))
        return
    check_range("rounds", given.rounds, 1, 100)
    print(f"{MACHINE}, torch {VERSIONS['torch']}, {given.shape} shape, bfloat16")
    kept = []
    for record in records(given.shape, given.rounds):
        kept.append(record)
        if record.name == "engine_start":
            print(f"{record.params['phase']:>12}{record.value:>8.2f} s")
        else:
            print(
                f"{record.params['kind']:>12}{record.value / MIB:>8.0f} MiB, {record.ratio:.2f} of "
                f"weights and KV cache; {record.params['before'] / MIB:.0f} MiB before loading"
            )
    if given.json is not None:
        write_records(given.json, kept)


if __name__ == "__main__":
    main()
