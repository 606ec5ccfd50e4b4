"""SSD against dense training and against a static mixture of experts: quality, FLOPs, time.

    python -m benchmarks.training.ssd_vs_dense --data TEXT [--valid TEXT] [--preset gpt-5m]
        [--seeds 1 2 3] [--modes dense ssd static] [--device cpu] [--out runs/ssd_vs_dense]
        [--json FILE]

Trains, from the same weights, tokens and schedule: `dense`, clustered when it ends; `ssd`; and
`static`, converted once, early, and never back. Every run has its own directory below --out; one
that is interrupted goes on when the command is repeated, a finished one is only read. So several
commands may share the work, each with its seeds or modes, and a last one prints the whole table.

Perplexities are of held-out text, FLOPs are counted (training/experts/flops.py, penalty and probes
included), seconds are training time without evaluation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.records import MACHINE, VERSIONS, Record, write_records
from training.config import TrainConfig
from training.presets import preset, with_settings
from training.report.history import RunHistory, StepRecord
from training.report.progress import ProgressMonitor
from training.report.training_page import write_report
from training.trainer import Trainer

MODES: Final = ("dense", "ssd", "static")
_WIDTH: Final = 180


@dataclass(frozen=True)
class Result:
    """What one finished run reached.

    Attributes:
        dense: held-out perplexity of the dense mode.
        relative: by share of the experts, perplexity over the dense mode's, minus 1.
        flops: counted.
        seconds: of training.
        dense_step, sparse_step: median seconds of such steps; None if there were none.
    """

    mode: str
    seed: int
    dense: float
    relative: dict[str, float]
    flops: float
    seconds: float
    dense_step: float | None
    sparse_step: float | None


def train(config: TrainConfig, run: Path, options: argparse.Namespace) -> None:
    """Train one run to its end, unless its directory holds it already."""
    report = run / "checkpoint" / "training_report.json"
    if report.exists():
        found = json.loads(report.read_text(encoding="utf-8"))["config"]
        wanted = json.loads(json.dumps(dataclasses.asdict(config)))
        if found == wanted:
            return
    with ProgressMonitor(config.steps) as monitor:
        monitor.message(f"{run.name}: {config.preset}, seed {config.seed}")
        Trainer(
            config,
            run,
            options.data,
            monitor,
            f"python -m benchmarks.training.ssd_vs_dense --preset {config.preset}",
            device=options.device,
            fresh=report.exists(),
            valid_paths=options.valid,
        ).train()


def read_result(run: Path, mode: str, seed: int) -> Result:
    """The result of a finished run."""
    report = json.loads((run / "checkpoint" / "training_report.json").read_text(encoding="utf-8"))
    evaluation, experts = report["evaluation"], report["config"]["model"]["num_experts"]
    dense = evaluation["dense"]["perplexity"]
    tokens = report["config"]["batch_size"] * report["config"]["sequence_length"]
    steps = RunHistory.read(run).steps

    def seconds(chosen: Sequence[StepRecord]) -> float | None:
        speeds = [step.tokens_per_second for step in chosen if step.tokens_per_second]
        return tokens / statistics.median(speeds) if speeds else None

    return Result(
        mode,
        seed,
        dense,
        {
            f"{int(k) / experts:.2%}": value["perplexity"] / dense - 1
            for k, value in evaluation["routed"].items()
        },
        report["flops"]["training"],
        report["seconds"],
        seconds([step for step in steps if step.top_k is None]),
        seconds([step for step in steps if step.top_k is not None]),
    )


def records(results: Sequence[Result], params: dict[str, Any]) -> list[Record]:
    """One record a figure, beside the dense run of the same seed."""
    dense = {result.seed: result for result in results if result.mode == "dense"}
    found = []
    for result in results:
        peer = dense.get(result.seed)
        about = {**params, "mode": result.mode, "seed": result.seed}
        for name, unit in (("dense", "perplexity"), ("flops", "FLOP"), ("seconds", "s")):
            other = getattr(peer, name) if peer else None
            found.append(_record(name, about, getattr(result, name), other, unit))
        for share, relative in result.relative.items():
            at = {**about, "experts": share}
            other = peer.relative.get(share) if peer else None
            found.append(Record("against own dense mode", at, relative, "share", other))
        for name in ("dense_step", "sparse_step"):
            value = getattr(result, name)
            if value is not None:
                found.append(_record(name, about, value, result.dense_step, "s"))
    return found


def _record(
    name: str, params: dict[str, Any], value: float, peer: float | None, unit: str
) -> Record:
    return Record(name, params, value, unit, peer, peer / value if peer else None)


def table(results: Sequence[Result]) -> Table:
    """Means over seeds, with the range where there are several."""
    shares = sorted({s for r in results for s in r.relative}, key=lambda s: float(s[:-1]))
    columns = ["dense mode", "against dense", *shares, "FLOPs saved", "time saved", "sparse step"]
    drawn = Table("mode", "seeds", *columns, title="perplexity; shares against the own dense mode")
    dense = {result.seed: result for result in results if result.mode == "dense"}
    for mode in MODES:
        runs = [result for result in results if result.mode == mode]
        if not runs:
            continue
        pairs = [(run, dense[run.seed]) for run in runs if run.seed in dense]
        drawn.add_row(
            mode,
            ", ".join(str(run.seed) for run in runs),
            spread([run.dense for run in runs], "{:.2f}"),
            spread([100 * (run.dense / peer.dense - 1) for run, peer in pairs], "{:+.2f}%"),
            *(spread([100 * run.relative[s] for run in runs], "{:+.2f}%") for s in shares),
            spread([peer.flops / run.flops for run, peer in pairs], "{:.2f}x"),
            spread([peer.seconds / run.seconds for run, peer in pairs], "{:.2f}x"),
            spread(
                [r.dense_step / r.sparse_step for r in runs if r.dense_step and r.sparse_step],
                "{:.2f}x",
            ),
        )
    return drawn


def spread(values: Sequence[float], form: str) -> str:
    """Mean, and the range of several values."""
    if not values:
        return "-"
    mean = form.format(statistics.mean(values))
    if len(values) == 1:
        return mean
    return f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", default="gpt-5m")
    parser.add_argument("--data", type=Path, action="append", default=[])
    parser.add_argument("--valid", type=Path, action="append", default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path("runs/ssd_vs_dense"))
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument(
        "--report", type=Path, help="write an HTML report of ssd against dense here"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    base = with_settings(preset(options.preset), options.settings)
    results = []
    for seed in options.seeds:
        for mode in options.modes:
            switch = dataclasses.replace(base.switch, mode=mode)
            config = dataclasses.replace(base, seed=seed, switch=switch)
            run = options.out / f"{base.preset}-{mode}-{seed}"
            train(config, run, options)
            results.append(read_result(run, mode, seed))
    Console(width=_WIDTH).print(table(results))
    if options.json:
        tokens = base.steps * base.batch_tokens
        write_records(options.json, records(results, {"preset": base.preset, "tokens": tokens}))
    if options.report and {"dense", "ssd"} <= set(options.modes):
        first = options.seeds[0]
        write_report(
            options.out / f"{base.preset}-ssd-{first}",
            options.report,
            options.out / f"{base.preset}-dense-{first}",
        )
    print(f"{MACHINE}; " + ", ".join(f"{name} {version}" for name, version in VERSIONS.items()))


if __name__ == "__main__":
    main()
