"""The report of a training run: one HTML page with its charts, self-contained and without scripts.

It is drawn from the run's log, so it can be made while the run goes on; what only the end of a run
knows (quality by share of experts, configuration) appears once it is there. Everything that comes
from the run's files is escaped.
"""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from typing import Final

from engine.errors import require
from training.errors import TrainingError
from training.report import charts
from training.report.history import ProbeRecord, RunHistory, dig, number
from training.report.page import (
    Tile,
    duration,
    facts,
    flat,
    grid,
    items_of,
    legend_item,
    page,
    plain,
    section,
    table,
    tile_row,
)
from training.report.svg import format_number, format_percent, heat_map

NAME: Final = "report.html"
_FULL_LOAD: Final = 3.0  # times the uniform load at which a cell of the heat map is full


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
    """The page as text."""
    name = history.run.resolve().name
    sections = [
        section("Loss", grid([charts.loss(history, dense), charts.validation(history, dense)])),
        section("Sparsity", _sparsity(history)),
        section("Switching", grid([charts.similarity(history)], _switches(history))),
        section("Experts", _experts(history)),
        section("Quality by share of the experts", _quality(history)),
        section("Cost", _cost(history, dense)),
        section("Optimisation and speed", grid(charts.machine(history))),
        section("The run", _facts(history, dense)),
    ]
    return page(f"{name}: training report", name, _status(history), _tiles(history), sections)


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


def _tiles(history: RunHistory) -> str:
    """The run in a few numbers."""
    tiles = [_loss_tile(history), _perplexity_tile(history), _sparsity_tile(history)]
    tiles += [_flops_tile(history), _time_tile(history)]
    return tile_row(tile for tile in tiles if tile is not None)


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


def _sparsity(history: RunHistory) -> str:
    return grid([charts.activity(history), charts.concentration(history)])


def _switches(history: RunHistory) -> str:
    if not history.switches:
        return '<p class="note">No change of phase so far.</p>'
    rows = [
        [f"{s.step:,}", s.phase, s.reason, "yes" if s.cluster else "no"] for s in history.switches
    ]
    return table(["step", "to", "why", "clustered anew"], rows, "words")


def _experts(history: RunHistory) -> str:
    drawn = [charts.load(history)]
    if not history.probes:
        return grid(drawn)
    probe = history.probes[-1]
    return f"{grid(drawn, _heat_map(probe))}\n{_layers(probe)}"


def _heat_map(probe: ProbeRecord) -> str:
    """Load of every expert of every layer at the last probe."""
    layers = [(f"layer {i}", x.load) for i, x in enumerate(probe.study.layers) if x.load]
    if not layers or len({len(load) for _, load in layers}) != 1:
        return ""
    title = f"Load of every expert at step {probe.step:,}"
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>\n"
        f"{heat_map(title, layers, _FULL_LOAD)}\n"
        f'<ul class="legend">{legend_item("never chosen", "var(--dead)", "area")}'
        f"{legend_item(f'{_FULL_LOAD:g} times the uniform load or more', 'var(--routed)', 'area')}"
        f"</ul></figure>"
    )


def _layers(probe: ProbeRecord) -> str:
    """The last probe, layer by layer."""
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
    return (
        f'<p class="note">The probe at step {probe.step:,}, {probe.study.tokens:,} tokens: neurons '
        f"that fire, and that never do; activation mass in the best 1/16, 1/8 and 1/4 of the "
        f"experts, in the best {k} and in the router's {k}; load of the fullest expert over the "
        f"uniform one, entropy of the load (1 is even), experts never chosen. Cohesion: how many "
        f"times likelier a neuron fires when one of its own expert does than when one of another "
        f"expert does.</p>\n{table(head, rows)}"
    )


def _quality(history: RunHistory) -> str:
    if not history.report:
        return '<p class="note">Measured when the run is finished.</p>'
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
    return grid([charts.quality(dig(history.report, "evaluation"))], table(head, rows))


def _cost(history: RunHistory, dense: RunHistory | None) -> str:
    drawn = charts.cost(history, dense)
    if dense is not None:
        drawn += charts.loss_by_cost(history, dense)
    return grid(drawn)


def _facts(history: RunHistory, dense: RunHistory | None) -> str:
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
    return facts(rows)
