"""Small charts as SVG text: pure functions, no dependency, colours left to the page's style sheet.

A chart is drawn in a fixed coordinate system and scaled by its viewBox. Text inherits its size and
every colour is a CSS value, so that one drawing serves phones, print, light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Final

WIDTH: Final = 640
HEIGHT: Final = 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 18, 14, 54
MOST_POINTS: Final = 1000
_MOST_TITLES: Final = 4096
_SUFFIXES: Final = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k"))

Point = tuple[float, float | None]


def format_number(value: float) -> str:
    """Three or four significant digits, with k, M, G, T, P, E from ten thousand up."""
    size = abs(value)
    if size >= 1e21 or 0 < size < 1e-4:
        return f"{value:.3g}"
    for limit, suffix in _SUFFIXES:
        if size >= limit:
            return f"{value / (1e3 if suffix == 'k' else limit):.4g}{suffix}"
    return f"{value:.4g}"


def format_percent(value: float) -> str:
    """A share as a percentage of up to three significant digits."""
    return f"{100 * value:.3g}%"


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: for the legend.
        points: (x, y) in order of x; None is a gap.
        colour: any CSS colour.
        dots: also mark every point, with its values as a tooltip.
        faint: thin and half transparent, for what is smoothed by another series.
        dashed: for estimates and references.
    """

    name: str
    points: Sequence[Point]
    colour: str
    dots: bool = False
    faint: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Band:
    """A shaded stretch of the x axis; `kind` is the CSS class, `band-KIND`."""

    start: float
    end: float
    kind: str


@dataclass(frozen=True)
class Chart:
    """A line chart.

    Attributes:
        title: what it shows; the page's caption and what a screen reader says.
        x_label: below the axis.
        series: the lines; those without a finite point are left out.
        bands: shaded stretches of x.
        marks: vertical lines: (x, tooltip).
        x_range: limits of x; None takes those of the points.
        y_zero: the y axis starts at 0.
        log_x, log_y: logarithmic axes; every value on them must be above 0.
        x_ticks: where to put ticks; empty chooses.
        x_format, y_format: how to write a value.
        note: a sentence for below the chart.
    """

    title: str
    x_label: str
    series: Sequence[Series]
    bands: Sequence[Band] = ()
    marks: Sequence[tuple[float, str]] = ()
    x_range: tuple[float, float] | None = None
    y_zero: bool = False
    log_x: bool = False
    log_y: bool = False
    x_ticks: Sequence[float] = ()
    x_format: Callable[[float], str] = field(default=format_number)
    y_format: Callable[[float], str] = field(default=format_number)
    note: str = ""

    @property
    def has_points(self) -> bool:
        """Whether there is anything to draw."""
        return any(y is not None for series in self.series for _, y in series.points)


@dataclass(frozen=True)
class Axis:
    """Maps values between `low` and `high` to pixels between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the limits."""
        return log_ticks(self.low, self.high) if self.log else nice_ticks(self.low, self.high)


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten, within [low, high]."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within [low, high]; over many decades, some of the powers."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = range(first, last + 1, max(1, (last - first) // 6))
    factors = (1, 2, 5) if last - first <= 3 else (1,)
    found = [m * 10.0**d for d in decades for m in factors if low <= m * 10.0**d <= high]
    return found if len(found) >= 3 else nice_ticks(low, high, 4)


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about `most` points: the lowest and the highest of each stretch, in order.

    Unlike every n-th point this keeps spikes. A stretch without a value keeps a gap.
    """
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        values = [(y, i) for i, (_, y) in enumerate(stretch) if y is not None]
        chosen = sorted({min(values)[1], max(values)[1]}) if values else [0]
        kept += [stretch[i] for i in chosen]
    return kept


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Centred mean over `window` points (fewer at the ends), gaps left out of it and kept."""
    half = window // 2
    sums, counts = [0.0], [0]
    for _, y in points:
        sums.append(sums[-1] + (y or 0.0))
        counts.append(counts[-1] + (y is not None))
    smoothed: list[Point] = []
    for i, (x, y) in enumerate(points):
        low, high = max(0, i - half), min(len(points), i + half + 1)
        count = counts[high] - counts[low]
        smoothed.append((x, None if y is None else (sums[high] - sums[low]) / count))
    return smoothed


# Smaller numbers lose their digits.
TINY: Final = 1e-290


def _limits(values: Sequence[float], *, log: bool, zero: bool) -> tuple[float, float]:
    """Limits of an axis that hold all values with a little room."""
    low, high = min(values), max(values)
    if log:
        room = (high / low) ** 0.05 if high > low else 1.1
        return low / room, high * room
    if zero:
        low = min(low, 0.0)
    if high - low < TINY:
        high = low + (abs(low) if abs(low) > TINY else 1.0) * 0.1
        low = low if zero else low - (high - low)
    room = 0.05 * (high - low)
    return low - (0.0 if zero and low == 0 else room), high + room


def _axes(chart: Chart) -> tuple[Axis, Axis]:
    finite = [(x, y) for s in chart.series for x, y in s.points if y is not None]
    if chart.x_range is not None and chart.x_range[1] > chart.x_range[0]:
        x_low, x_high = chart.x_range
    else:
        xs = [x for x, _ in finite]
        x_low, x_high = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, min(xs) + 1)
        if chart.log_x:
            x_low, x_high = _limits(xs, log=True, zero=False)
    y_low, y_high = _limits([y for _, y in finite], log=chart.log_y, zero=chart.y_zero)
    return (
        Axis(x_low, x_high, _LEFT, WIDTH - _RIGHT, chart.log_x),
        Axis(y_low, y_high, HEIGHT - _BOTTOM, _TOP, chart.log_y),
    )


def line_chart(chart: Chart) -> str:
    """The chart as one <svg> element; it must have at least one finite point."""
    x_axis, y_axis = _axes(chart)
    parts = [
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'aria-label="{escape(chart.title)}">'
    ]
    parts += [_band(band, x_axis) for band in chart.bands if band.end > band.start]
    parts += _grid(chart, x_axis, y_axis)
    parts += [_mark(x, text, x_axis) for x, text in chart.marks]
    for series in chart.series:
        parts += _series(series, chart, x_axis, y_axis)
    return "\n".join([*parts, "</svg>"])


def _band(band: Band, x_axis: Axis) -> str:
    left, right = x_axis(band.start), x_axis(band.end)
    return (
        f'<rect class="band band-{escape(band.kind)}" x="{left:.1f}" y="{_TOP}" '
        f'width="{right - left:.1f}" height="{HEIGHT - _TOP - _BOTTOM}">'
        f"<title>{escape(band.kind)}, {band.start:g} to {band.end:g}</title></rect>"
    )


def _mark(x: float, text: str, x_axis: Axis) -> str:
    at = x_axis(x)
    return (
        f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}">'
        f"<title>{escape(text)}</title></line>"
    )


def _grid(chart: Chart, x_axis: Axis, y_axis: Axis) -> list[str]:
    """Grid lines, tick labels and the label of the x axis."""
    parts = []
    for value in y_axis.ticks():
        y = y_axis(value)
        parts.append(f'<path class="rule" d="M{_LEFT},{y:.1f}H{WIDTH - _RIGHT}"/>')
        parts.append(
            f'<text class="tick tick-y" x="{_LEFT - 8}" y="{y:.1f}" dy="0.35em" '
            f'text-anchor="end">{escape(chart.y_format(value))}</text>'
        )
    for value in chart.x_ticks or x_axis.ticks():
        x = x_axis(value)
        parts.append(f'<path class="axis" d="M{x:.1f},{HEIGHT - _BOTTOM}v5"/>')
        parts.append(
            f'<text class="tick tick-x" x="{x:.1f}" y="{HEIGHT - _BOTTOM + 22}" '
            f'text-anchor="middle">{escape(chart.x_format(value))}</text>'
        )
    parts.append(f'<path class="axis" d="M{_LEFT},{HEIGHT - _BOTTOM}H{WIDTH - _RIGHT}"/>')
    parts.append(
        f'<text class="label" x="{(_LEFT + WIDTH - _RIGHT) / 2:.0f}" y="{HEIGHT - 5}" '
        f'text-anchor="middle">{escape(chart.x_label)}</text>'
    )
    return parts


def _series(series: Series, chart: Chart, x_axis: Axis, y_axis: Axis) -> list[str]:
    """One line as a path with its gaps, and its dots; a point alone between gaps gets a dot."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in thin(series.points):
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    runs = [run for run in runs if run]
    if not runs:
        return []
    style = f'style="--c:{escape(series.colour)}"'
    classes = "line" + " faint" * series.faint + " dashed" * series.dashed
    lines = [run for run in runs if len(run) > 1]
    path = "".join(
        "M" + "L".join(f"{x_axis(x):.2f},{y_axis(y):.2f}" for x, y in run) for run in lines
    )
    name = escape(series.name)
    parts = [f'<path class="{classes}" {style} d="{path}"><title>{name}</title></path>'] * bool(
        path
    )
    dotted = [p for run in runs for p in run if series.dots or len(run) == 1]
    for x, y in dotted:
        label = f"{name}: {escape(chart.y_format(y))} at {escape(chart.x_format(x))}"
        parts.append(
            f'<circle class="dot" {style} cx="{x_axis(x):.2f}" cy="{y_axis(y):.2f}" r="3">'
            f"<title>{label}</title></circle>"
        )
    return parts


def heat_map(title: str, rows: Sequence[tuple[str, Sequence[float]]], most: float) -> str:
    """A table of cells as one <svg>: the fuller, the nearer to `most`; zeros stand out.

    Args:
        title: what a screen reader says.
        rows: (label, values from 0 up), all of one length, at least one.
        most: the value that is drawn in full; higher ones look the same.
    """
    height = max(14, min(26, 400 // len(rows)))
    columns = len(rows[0][1])
    cell = (WIDTH - _LEFT - _RIGHT) / columns
    gap = 1 if cell > 4 else 0
    titled = columns * len(rows) <= _MOST_TITLES
    total = _TOP + height * len(rows) + _BOTTOM
    parts = [
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {total}" aria-label="{escape(title)}">'
    ]
    for number, (label, values) in enumerate(rows):
        y = _TOP + number * height
        parts.append(
            f'<text class="tick" x="{_LEFT - 8}" y="{y + height / 2:.1f}" dy="0.35em" '
            f'text-anchor="end">{escape(label)}</text>'
        )
        for column, value in enumerate(values):
            kind = "cell" if value > 0 else "cell dead"
            full = min(value / most, 1.0) if value > 0 else 1.0
            note = f"<title>{escape(label)}, expert {column}: {value:.2f}</title>" * titled
            parts.append(
                f'<rect class="{kind}" x="{_LEFT + column * cell:.2f}" y="{y}" '
                f'width="{cell - gap:.2f}" height="{height - 1}" '
                f'fill-opacity="{full:.3f}">{note}</rect>'
            )
    bottom = _TOP + height * len(rows)
    for value in (v for v in nice_ticks(0, columns, 8) if v == int(v) and v < columns):
        x = _LEFT + (value + 0.5) * cell
        parts.append(
            f'<text class="tick tick-x" x="{x:.1f}" y="{bottom + 22}" '
            f'text-anchor="middle">{value:.0f}</text>'
        )
    parts.append(
        f'<text class="label" x="{(_LEFT + WIDTH - _RIGHT) / 2:.0f}" y="{total - 5}" '
        f'text-anchor="middle">expert</text>'
    )
    return "\n".join([*parts, "</svg>"])
