"""The charts of a run's report: from a run's history to lines; `drawing.py` draws them.

Steps are on the x axis unless said otherwise. Dense is always the same colour, experts per token
and layers go through a ramp of hues from few to many.
"""

from __future__ import annotations

import colorsys
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final

from training.report.chart import (
    DENSE,
    ORACLE,
    OTHER,
    ROUTED,
    Chart,
    HeatMap,
    Point,
    Series,
    format_number,
    format_percent,
    smooth,
)
from training.report.drawing import NEVER
from training.report.history import ProbeRecord, RunHistory, StepRecord, dig, number

_FULL_LOAD: Final = 3.0  # times the uniform load at which a cell of the heat map is full
_SMOOTH_POINTS: Final = 60
_LOG_RATIO: Final = 5.0


def ramp(index: int, count: int) -> str:
    """The colour of one of `count` ordered things, from blue over green to orange."""
    hue = 240 - 215 * (index / (count - 1) if count > 1 else 0.0)
    red, green, blue = (round(255 * c) for c in colorsys.hls_to_rgb(hue / 360, 0.44, 0.62))
    return f"#{red:02x}{green:02x}{blue:02x}"


def whole(value: float) -> str:
    """A step number."""
    return f"{value:,.0f}"


def _chart(history: RunHistory, title: str, series: Sequence[Series], **options: object) -> Chart:
    """A chart over the run's steps with its phases shaded and its switches marked."""
    return Chart(
        title=title,
        x_label="step",
        series=series,
        bands=[(a, b, phase) for a, b, phase in history.phases if phase != "dense"],
        marks=[s.step for s in history.switches],
        x_range=(0.0, float(history.end)),
        x_format=whole,
        **options,  # type: ignore[arg-type]  # fields of Chart, by name
    )


def _over_steps(history: RunHistory, value: Callable[[StepRecord], float | None]) -> list[Point]:
    return [(record.step, value(record)) for record in history.steps]


def _smoothed(points: list[Point]) -> list[Point]:
    return smooth(points, max(1, len(points) // _SMOOTH_POINTS))


def _is_wide(series: Sequence[Series]) -> bool:
    """Whether the values, all positive, span so much that a logarithmic axis is better."""
    values = [y for s in series for _, y in s.points if y is not None]
    return bool(values) and min(values) > 0 and max(values) / min(values) > _LOG_RATIO


def loss(history: RunHistory, dense: RunHistory | None) -> Chart:
    """Training loss, every logged step and its running mean; beside it the dense run's."""
    raw = _over_steps(history, lambda r: r.loss)
    series = [
        Series("each logged step", raw, ROUTED, faint=True),
        Series("running mean", _smoothed(raw), ROUTED),
    ]
    if dense is not None:
        mean = _smoothed(_over_steps(dense, lambda r: r.loss))
        series.append(Series("dense run, running mean", mean, DENSE, dashed=True))
    return _chart(history, "Training loss, nats per token", series)


def validation(history: RunHistory, dense: RunHistory | None) -> Chart:
    """Held-out perplexity over the run: dense, and at each k that was measured."""
    names = {name for record in history.valids for name in record.perplexity}
    ks = sorted(int(name) for name in names if name != "dense")

    def points(run: RunHistory, name: str) -> list[Point]:
        found = ((r.step, r.perplexity.get(name)) for r in run.valids)
        return [(step, value) for step, value in found if value is not None]

    series = [Series("dense", points(history, "dense"), DENSE, dots=True)] if names else []
    for i, k in enumerate(ks):
        name = f"{k} expert{'s' * (k != 1)}"
        series.append(Series(name, points(history, str(k)), ramp(i, len(ks)), dots=True))
    if dense is not None:
        series.append(Series("dense run", points(dense, "dense"), OTHER, dots=True, dashed=True))
    return _chart(history, "Held-out perplexity", series, log_y=_is_wide(series))


def activity(history: RunHistory) -> Chart:
    """Share of active neurons of every layer, from the probes."""
    layers = max((len(p.study.layers) for p in history.probes), default=0)
    series = [
        Series(
            f"layer {i}",
            [(p.step, p.study.layers[i].active) for p in history.probes if i < len(p.study.layers)],
            ramp(i, layers),
        )
        for i in range(layers)
    ]
    return _chart(history, "Active neurons", series, y_zero=True, y_format=format_percent)


def concentration(history: RunHistory) -> Chart:
    """Share of the true activation mass that a few experts hold, mean over layers."""

    def mean(value: Callable[[ProbeRecord], list[float | None]]) -> list[Point]:
        points: list[Point] = []
        for probe in history.probes:
            known = [v for v in value(probe) if v is not None]
            points.append((probe.step, statistics.fmean(known) if known else None))
        return points

    inside = _over_steps(history, lambda r: None if r.outside is None else 1 - r.outside)
    routed = mean(lambda p: [layer.coverage for layer in p.study.layers])
    oracle = mean(lambda p: [layer.oracle for layer in p.study.layers])
    series = [
        Series("in training's own sparse steps", inside, ROUTED, faint=True),
        Series("router, on the probe", routed, ROUTED),
        Series("oracle, on the probe", oracle, ORACLE, dashed=True),
    ]
    title = "Activation mass inside the chosen experts"
    return _chart(history, title, series, y_format=format_percent)


def similarity(history: RunHistory) -> Chart:
    """The similarities of activation patterns that the switching decides by."""
    series = [
        Series(
            "settled: to the previous probe",
            [(p.step, p.settled) for p in history.probes],
            ROUTED,
            dots=len(history.probes) <= 100,
        ),
        Series(
            "drift: to the clustering's birth",
            [(p.step, p.drift) for p in history.probes],
            ORACLE,
            dots=len(history.probes) <= 100,
        ),
    ]
    limits = dig(history.report, "config", "switch")
    for name, colour in (("settled", ROUTED), ("stale", ORACLE)):
        bound = number(dig(limits, name))
        if bound is not None and history.probes:
            ends: list[Point] = [(0.0, bound), (float(history.end), bound)]
            series.append(Series(f"bound: {name} {bound:g}", ends, colour, faint=True, dashed=True))
    return _chart(history, "Similarity of activation patterns", series)


def load(history: RunHistory) -> Chart:
    """How unevenly the router spreads the probe's tokens: expert load over the uniform one."""
    routed = [(p.step, [x.load for x in p.study.layers if x.load]) for p in history.probes]

    def points(value: Callable[[list[tuple[float, ...]]], float]) -> list[Point]:
        return [(step, value(loads) if loads else None) for step, loads in routed]

    series = [
        Series("fullest expert of any layer", points(lambda x: max(map(max, x))), ORACLE),
        Series(
            "fullest expert, mean of layers",
            points(lambda x: statistics.fmean(map(max, x))),
            ROUTED,
        ),
        Series(
            "emptiest expert, mean of layers",
            points(lambda x: statistics.fmean(map(min, x))),
            DENSE,
        ),
    ]
    title = "Expert load, times the uniform load"
    return _chart(history, title, series, y_zero=True)


def load_map(probe: ProbeRecord) -> HeatMap | None:
    """The load of every expert of every layer at a probe; None where the layers differ."""
    layers = [(f"layer {i}", x.load) for i, x in enumerate(probe.study.layers) if x.load]
    if not layers or len({len(load) for _, load in layers}) != 1:
        return None
    full = f"{_FULL_LOAD:g} times the uniform load or more"
    legend = [("never chosen", NEVER, "area"), (full, ROUTED, "area")]
    title = f"Load of every expert at step {probe.step:,}"
    return HeatMap(title, layers, _FULL_LOAD, "expert", legend)


def quality(evaluation: object) -> Chart:
    """Perplexity against the share of the experts, from a report's `evaluation`."""
    series = []
    shares: list[float] = []
    for name, colour in (("routed", ROUTED), ("oracle", ORACLE), ("random", OTHER)):
        found = dig(evaluation, name)
        results = list(found.values()) if isinstance(found, dict) else []
        pairs = [(number(dig(r, "activated_ratio")), number(dig(r, "perplexity"))) for r in results]
        points: list[Point] = sorted((x, y) for x, y in pairs if x and y is not None)
        shares += [x for x, _ in points]
        if not points:
            continue
        series.append(Series(name, points, colour, dots=True, dashed=name != "routed"))
    dense = number(dig(evaluation, "dense", "perplexity"))
    if dense is not None and shares:
        line: list[Point] = [(min(shares), dense), (1.0, dense)]
        series.insert(0, Series("dense", line, DENSE))
    return Chart(
        "Held-out perplexity by share of the experts",
        "share of the experts per token",
        series,
        x_range=(min(shares) * 0.9, 1.0) if shares else None,
        log_x=True,
        log_y=_is_wide(series),
        x_ticks=sorted({*shares, 1.0}) if shares else (),
        x_format=format_percent,
    )


def dense_rate(history: RunHistory, value: Callable[[StepRecord], float | None]) -> float | None:
    """How much one dense step adds to a running total: the median of the run's dense stretches."""
    rates = []
    for a, b in pairwise(history.steps):
        first, second = value(a), value(b)
        if a.phase == b.phase == "dense" and first is not None and second is not None:
            rates.append((second - first) / (b.step - a.step))
    return statistics.median(rates) if rates else None


def dense_flops(history: RunHistory) -> float | None:
    """FLOPs of one dense step: the report's, or for a run in progress its dense steps'."""
    total, steps = number(dig(history.report, "flops", "dense")), history.total_steps
    if total is not None and steps:
        return total / steps
    return dense_rate(history, lambda r: r.flops)


def dense_seconds(history: RunHistory) -> float | None:
    """Seconds of one dense step, as this run's own dense steps took."""
    return dense_rate(history, lambda r: r.seconds)


def cost(history: RunHistory, dense: RunHistory | None) -> list[Chart]:
    """Training FLOPs and wall clock so far, beside all-dense training of as many steps."""
    kinds: tuple[tuple[str, Callable[[StepRecord], float | None], float | None, str], ...] = (
        ("Training FLOPs", lambda r: r.flops, dense_flops(history), "this run's steps all dense"),
        (
            "Training time, seconds",
            lambda r: r.seconds,
            dense_seconds(history),
            "estimate from this run's dense steps",
        ),
    )
    charts = []
    for title, value, rate, name in kinds:
        series = [Series("this run", _over_steps(history, value), ROUTED)]
        if dense is not None:
            shown = [p for p in _over_steps(dense, value) if p[0] <= history.end]
            series.append(Series("dense run", shown, OTHER))
        if rate is not None:
            line: list[Point] = [(r.step, rate * (r.step + 1)) for r in history.steps]
            series.append(Series(name, line, DENSE, dashed=True))
        charts.append(_chart(history, title, series, y_zero=True))
    return charts


def loss_by_cost(history: RunHistory, dense: RunHistory) -> list[Chart]:
    """Loss against FLOPs and against time, this run beside the dense run."""
    kinds: tuple[tuple[str, Callable[[StepRecord], float | None]], ...] = (
        ("training FLOPs", lambda r: r.flops),
        ("training seconds", lambda r: r.seconds),
    )
    charts = []
    for label, value in kinds:
        series = [
            Series(name, _loss_by(run, value), colour)
            for name, run, colour in (("this run", history, ROUTED), ("dense run", dense, OTHER))
        ]
        charts.append(Chart(f"Training loss against {label}", label, series))
    return charts


def _loss_by(run: RunHistory, value: Callable[[StepRecord], float | None]) -> list[Point]:
    """Smoothed loss by what had been spent."""
    smoothed = _smoothed(_over_steps(run, lambda r: r.loss))
    spent = [value(r) for r in run.steps]
    pairs = zip(spent, smoothed, strict=True)
    return sorted(((x, y) for x, (_, y) in pairs if x is not None), key=lambda point: point[0])


def machine(history: RunHistory) -> list[Chart]:
    """Speed, learning rate and gradient norm."""
    speed = _over_steps(history, lambda r: r.tokens_per_second)
    norm = _over_steps(history, lambda r: r.grad_norm)
    return [
        _chart(
            history,
            "Speed, tokens per second",
            [
                Series("each logged step", speed, ROUTED, faint=True),
                Series("running mean", _smoothed(speed), ROUTED),
            ],
            y_zero=True,
        ),
        _chart(
            history,
            "Learning rate",
            [Series("learning rate", _over_steps(history, lambda r: r.lr), ROUTED)],
            y_zero=True,
        ),
        _chart(
            history,
            "Gradient norm before clipping",
            [
                Series("each logged step", norm, ROUTED, faint=True),
                Series("running mean", _smoothed(norm), ROUTED),
            ],
            y_zero=True,
            y_format=format_number,
        ),
    ]
