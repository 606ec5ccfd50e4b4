"""Charts as data: lines of points, axes and a legend; and numbers written for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

MOST_POINTS: Final = 1000
# The colours of the page's charts; phases are shaded lightly behind the lines.
DENSE, ROUTED, ORACLE, OTHER = "#3b4a63", "#1769d2", "#c2570c", "#c2187a"
PHASES: Final = {"sparse": "#e2ecf9", "mixed": "#f7e9df"}
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
        name: what the legend says.
        points: (x, y) in order of x; a y of None is a gap.
        colour: as "#rrggbb".
        dots: whether every point is marked as well.
        faint: thin and half transparent, for values that another series smooths.
        dashed: for estimates and references.
    """

    name: str
    points: Sequence[Point]
    colour: str
    dots: bool = False
    faint: bool = False
    dashed: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to draw."""
        return all(y is None for _, y in self.points)


@dataclass(frozen=True)
class Chart:
    """A line chart.

    Attributes:
        title: what the chart shows; the caption and what a screen reader says.
        x_label: what the x axis counts.
        series: the lines.
        bands: shaded stretches of x: (start, end, name of a phase in PHASES).
        marks: where vertical lines stand.
        x_range: limits of x; None takes those of the points.
        y_zero: whether the y axis starts at 0.
        log_x, log_y: logarithmic axes; every value on them must be above 0.
        x_ticks: where ticks stand; none leaves the choice to the axis.
        x_format, y_format: how a value is written.
    """

    title: str
    x_label: str
    series: Sequence[Series]
    bands: Sequence[tuple[float, float, str]] = ()
    marks: Sequence[float] = ()
    x_range: tuple[float, float] | None = None
    y_zero: bool = False
    log_x: bool = False
    log_y: bool = False
    x_ticks: Sequence[float] = ()
    x_format: Callable[[float], str] = format_number
    y_format: Callable[[float], str] = format_number

    @property
    def drawn(self) -> list[Series]:
        """The series that have something to draw."""
        return [series for series in self.series if not series.is_empty]

    @property
    def legend(self) -> list[tuple[str, str, str]]:
        """(name, colour, CSS classes) of every line and of every kind of shading."""
        lines = [
            (s.name, s.colour, " ".join(["dashed"] * s.dashed + ["faint"] * s.faint))
            for s in self.drawn
        ]
        shaded = sorted({phase for _, _, phase in self.bands} & PHASES.keys())
        return lines + [(f"{phase} phase", PHASES[phase], "area") for phase in shaded]


@dataclass(frozen=True)
class HeatMap:
    """A table of shaded cells; zeros stand out.

    Attributes:
        title: what it shows.
        rows: (label, values from 0 up), all of one length.
        most: the value that is shaded in full; higher ones look the same.
        x_label: what the columns count.
        legend: as `Chart.legend`.
    """

    title: str
    rows: Sequence[tuple[str, Sequence[float]]]
    most: float
    x_label: str
    legend: Sequence[tuple[str, str, str]]


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
    """The centred mean over `window` points (fewer at the ends); gaps stay and count nowhere."""
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
