"""A GELU model becomes a ReLU one: what the swap breaks, and what a short training repairs.

    python -m benchmarks.training.relufy --data PATH [--valid PATH] [--minutes 5]
        [--steps 200] [--json FILE]

Trains a small OPT with GELU (transformers' own class, 4.3 M parameters) in the plain, dense way,
then does what `ambidex train --relufy --from` does: all weights stay, ReLU takes GELU's place, and
training goes on for some steps. Held-out perplexity: with GELU, with ReLU at once, and at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import Record, write_records
from benchmarks.training.import_quality import train_opt
from engine.checkpoint import read_json
from engine.config import check_range
from training.importing.start import read_start
from training.report.progress import ProgressMonitor
from training.trainer import Trainer


def relufied(
    model: Path, run: Path, data: Sequence[Path], valid: Sequence[Path], steps: int
) -> dict[str, Any]:
    """The report of a run of so many steps that begins with the smooth model."""
    start = read_start(model, relufy=True)
    config = dataclasses.replace(start.base(), steps=steps)
    with ProgressMonitor(steps) as monitor:
        trainer = Trainer(config, run, data, monitor, valid_paths=valid, start=start)
        return read_json(trainer.train() / "training_report.json")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train unless that was done, relufy, print; with --json, keep the records."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, action="append", required=True, help="to train on")
    parser.add_argument("--valid", type=Path, action="append", default=[], help="to measure on")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training with GELU")
    parser.add_argument("--steps", type=int, default=200, help="of training with ReLU")
    parser.add_argument("--work", type=Path, default=Path("runs/relufy"))
    parser.add_argument("--json", type=Path, help="write the records to this file")
    given = parser.parse_args(arguments)
    check_range("minutes", given.minutes, 0.01, 600.0)
    check_range("steps", given.steps, 1, 1 << 20)
    kept = given.work / "trained.json"
    if not kept.is_file():
        trained = train_opt(given.data, given.work / "model", given.minutes, "gelu")
        text = json.dumps({**trained, "minutes": given.minutes}) + "\n"
        kept.write_text(text, encoding="utf-8")
    run = given.work / "run"
    report = relufied(given.work / "model", run, given.data, given.valid, given.steps)
    start, evaluation = report["start"], report["evaluation"]
    params = {
        **json.loads(kept.read_text(encoding="utf-8")),
        "relu_steps": given.steps,
        "relu_tokens": report["tokens_seen"],
        "held_out_tokens": report["corpus"]["held_out_tokens"],
    }
    before, after = start["before"], evaluation["dense"]["perplexity"]
    named = {"GELU": before, "ReLU at once": start["swapped"], "ReLU, trained": after}
    records = []
    for name, value in named.items():
        print(f"{name:>14}{value:>10.2f}{value / before - 1:>+10.2%}")
        which = {**params, "model": name}
        records.append(Record("relufy_perplexity", which, value, "perplexity", before))
    active = sum(report["active_neurons"]) / len(report["active_neurons"])
    print(f"{active:.1%} of the neurons fire")
    records.append(Record("relufy_active", params, active, "share"))
    if given.json is not None:
        write_records(given.json, records)


if __name__ == "__main__":
    main()
