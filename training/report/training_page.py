"""The report of a training run: one HTML page with its charts, self-contained and without scripts.

It is made from the run's log, so it can be made while the run goes on; what only the end of a run
knows (quality by share of experts, configuration) appears once it is there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from engine.errors import require
from training.errors import TrainingError
from training.report import charts
from training.report.chart import format_number, format_percent
from training.report.history import ProbeRecord, RunHistory, dig, number
from training.report.page import Table, Tile, duration, flat, items_of, plain, render_page

NAME: Final = "report.html"


def write_report(run: Path, out: Path | None = None, against: Path | None = None) -> Path:
    """Write the report of the run in `run`; returns its path.

    Args:
        run: a run's directory, finished or not.
        out: the page to write; default: report.html in the run's directory.
        against: the directory of another run, usually one trained dense, to draw beside it.

    Raises:
        TrainingError: if a directory holds no run, or the page's folder does not exist.
        CheckpointError: if a finished run's training_report.json is damaged.
    """
    path = out or run / NAME
    history = RunHistory.read(run)
    dense = RunHistory.read(against) if against is not None else None
    require(
        path.parent.is_dir() and not path.is_dir(),
        f"--out must name a file in an existing directory, got {path}",
        TrainingError,
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(render(history, dense), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def render(history: RunHistory, dense: RunHistory | None = None) -> str:
    """The page as text; `dense` is a run to draw beside this one."""
    probe = history.probes[-1] if history.probes else None
    evaluation = dig(history.report, "evaluation")
    by_cost = [] if dense is None else charts.loss_by_cost(history, dense)
    return render_page(
        "training.html",
        kind="training",
        name=history.run.resolve().name,
        status=_status(history),
        tiles=_tiles(history),
        loss=[charts.loss(history, dense), charts.validation(history, dense)],
        sparsity=[charts.activity(history), charts.concentration(history)],
        switching=[charts.similarity(history)],
        switches=_switches(history),
        load=[charts.load(history)],
        load_map=None if probe is None else charts.load_map(probe),
        probe=probe,
        layers=None if probe is None else _layers(probe),
        quality=[charts.quality(evaluation)] if history.report else [],
        quality_table=_quality(history),
        cost=charts.cost(history, dense) + by_cost,
        machine=charts.machine(history),
        facts=_facts(history, dense),
    )


def _status(history: RunHistory) -> str:
    if history.report:
        return f"Ambidex training report; finished, {_count(history.total_steps)} steps."
    if not history.steps:
        return "Ambidex training report; nothing has been logged yet."
    last, phase = history.last_step, history.steps[-1].phase
    return f"Ambidex training report; not finished, {phase} at step {last:,}."


def _count(value: object) -> str:
    found = number(value)
    return "?" if found is None else f"{found:,.0f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _relative(value: float | None, base: float | None) -> str:
    return f"{value / base - 1:+.2%}" if value is not None and base else ""


def _tiles(history: RunHistory) -> list[Tile]:
    """The run in a few figures; those that are not known yet are left out."""
    kinds = (_loss_tile, _perplexity_tile, _sparsity_tile, _flops_tile, _time_tile)
    return [tile for tile in (kind(history) for kind in kinds) if tile is not None]


def _loss_tile(history: RunHistory) -> Tile | None:
    losses = [r.loss for r in history.steps if r.loss is not None]
    if not losses:
        return None
    last = losses[-max(1, len(losses) // 50) :]
    return "training loss", f"{sum(last) / len(last):.3f}", f"mean of the last {len(last)} logged"


def _perplexity_tile(history: RunHistory) -> Tile | None:
    final = number(dig(history.report, "evaluation", "dense", "perplexity"))
    if final is not None:
        return "perplexity, dense mode", f"{final:.2f}", "held out, at the end"
    known = [v for v in history.valids if "dense" in v.perplexity]
    if not known:
        return None
    last = known[-1]
    return "perplexity, dense mode", f"{last.perplexity['dense']:.2f}", f"at step {last.step:,}"


def _sparsity_tile(history: RunHistory) -> Tile | None:
    """The fewest experts whose perplexity is within 1% of dense; before the end, the neurons."""
    results = _routed(history)
    dense = number(dig(history.report, "evaluation", "dense", "perplexity"))
    if dense is not None:
        for k, share, perplexity in results:
            if perplexity <= 1.01 * dense:
                more = f"of the experts ({k}): {_relative(perplexity, dense)} perplexity"
                return "sparse mode", format_percent(share), more
    if not history.probes:
        return None
    probe = history.probes[-1]
    layers = probe.study.layers
    mean = sum(layer.active for layer in layers) / max(1, len(layers))
    return "active neurons", f"{mean:.1%}", f"mean of layers, probe at step {probe.step:,}"


def _routed(history: RunHistory) -> list[tuple[int, float, float]]:
    """(k, share of the experts, perplexity) of the finished run, from few experts to many."""
    found = dig(history.report, "evaluation", "routed")
    rows = []
    for k, result in found.items() if isinstance(found, dict) else ():
        share = number(dig(result, "activated_ratio"))
        perplexity = number(dig(result, "perplexity"))
        if k.isdecimal() and share is not None and perplexity is not None:
            rows.append((int(k), share, perplexity))
    return sorted(rows)


def _flops_tile(history: RunHistory) -> Tile | None:
    spent, dense = _flops(history)
    if spent is None:
        return None
    if dense is None:
        return "training FLOPs", format_number(spent), "no dense steps to compare with yet"
    return (
        "training FLOPs",
        format_number(spent),
        f"all dense would take {dense / spent:.2f} times as many",
    )


def _flops(history: RunHistory) -> tuple[float | None, float | None]:
    """(training FLOPs so far, those of as many dense steps)."""
    final = number(dig(history.report, "flops", "training"))
    dense = number(dig(history.report, "flops", "dense"))
    if final is not None and final > 0:
        return final, dense
    known = [r for r in history.steps if r.flops]
    if not known:
        return None, None
    last, rate = known[-1], charts.dense_flops(history)
    return last.flops, None if rate is None else rate * (last.step + 1)


def _time_tile(history: RunHistory) -> Tile | None:
    known = [r for r in history.steps if r.seconds]
    last = known[-1].seconds if known else None
    spent = number(dig(history.report, "seconds")) or last
    if spent is None:
        return None
    rate = charts.dense_seconds(history)
    if rate is None or not known:
        return "training time", duration(spent), ""
    estimate = rate * (known[-1].step + 1) / (last or spent)
    return "training time", duration(spent), f"all dense would take {estimate:.2f} times as long"


def _switches(history: RunHistory) -> Table:
    rows = [
        [f"{s.step:,}", s.phase, s.reason, "yes" if s.cluster else "no"] for s in history.switches
    ]
    return Table(["step", "to", "why", "clustered anew"], rows)


def _layers(probe: ProbeRecord) -> Table:
    """A probe, layer by layer."""
    k = probe.study.top_k
    head = ["layer", "active", "never fire", "mass in 1/16", "in 1/8", "in 1/4"]
    head += [f"best {k}", f"router's {k}", "fullest", "entropy", "dead", "cohesion"]
    rows = []
    for i, layer in enumerate(probe.study.layers):
        entropy = layer.load_entropy
        row = [str(i), _share(layer.active), _share(layer.never)]
        row += [_share(value) for value in layer.concentration]
        row += [_share(layer.oracle), _share(layer.coverage)]
        row += [f"{max(layer.load):.2f}x" if layer.load else ""]
        row += ["" if entropy is None else f"{entropy:.3f}"]
        row += [str(layer.dead_experts) if layer.load else "", f"{layer.cohesion:.2f}"]
        rows.append(row)
    return Table(head, rows)


def _quality(history: RunHistory) -> Table:
    dense = number(dig(history.report, "evaluation", "dense", "perplexity"))
    rows = [["dense", "100%", "?" if dense is None else f"{dense:.3f}", "", "", "", ""]]
    for k, share, perplexity in _routed(history):
        oracle = dig(history.report, "evaluation", "oracle", str(k))
        routed = dig(history.report, "evaluation", "routed", str(k))
        rows.append(
            [
                str(k),
                format_percent(share),
                f"{perplexity:.3f}",
                _relative(perplexity, dense),
                _relative(number(dig(oracle, "perplexity")), dense),
                _share(number(dig(routed, "coverage"))),
                _share(number(dig(oracle, "coverage"))),
            ]
        )
    head = ["experts", "share", "perplexity", "to dense", "oracle", "mass inside", "oracle"]
    return Table(head, rows)


def _facts(history: RunHistory, dense: RunHistory | None) -> list[tuple[str, str]]:
    """Configuration, data, machine and versions, for the record."""
    report = history.report
    rows = [("directory", str(history.run)), ("last logged step", f"{history.last_step:,}")]
    if dense is not None:
        rows.append(("compared with", f"{dense.run}, {dense.last_step:,} steps logged"))
    named = (("command", "command"), ("device", "device"), ("CPU threads", "threads"))
    rows += [(name, str(report[key])) for name, key in named if key in report]
    corpus = report.get("corpus")
    rows += [(f"corpus: {k}", plain(v)) for k, v in items_of(corpus)]
    if "tokens_seen" in report:
        rows.append(("tokens seen", _count(report["tokens_seen"])))
    rows += [(f"version: {k}", plain(v)) for k, v in items_of(report.get("versions"))]
    rows += [
        (f"FLOPs a token: {k}", plain(v)) for k, v in items_of(dig(report, "flops", "per_token"))
    ]
    rows += flat("", report.get("config"))
    if history.skipped:
        rows.append(("lines of the log not understood", f"{history.skipped:,}"))
    return rows
