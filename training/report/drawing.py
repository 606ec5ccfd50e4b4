"""Charts drawn by matplotlib, as SVG that stands in a page.

The same chart gives the same text every time: nothing in it depends on the clock or on chance, so
an import that was interrupted writes the same page. matplotlib takes a second to import, so it is
imported only when something is drawn.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from typing import TYPE_CHECKING, Any, Final

from training.report.chart import PHASES, ROUTED, Chart, HeatMap, Series, thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEVER: Final = "#d6204e"  # cells of a heat map that are zero
_INK, _RULE = "#5c6675", "#dde2e9"
_WIDTH, _HEIGHT = 6.4, 3.0  # inches
_STYLE: Final = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the reader's font
    "svg.hashsalt": "ambidex",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.solid_joinstyle": "round",
}
_IDENTIFIER: Final = re.compile(r'( id="|xlink:href="#|url\(#)')
_NAMESPACE: Final = re.compile(r' xmlns(:\w+)?="[^"]*"')


def draw(chart: Chart | HeatMap) -> str:
    """The chart as one <svg> element for an HTML page; it must have something to draw."""
    from matplotlib import rc_context

    with rc_context(_STYLE):
        figure = _heat_map(chart) if isinstance(chart, HeatMap) else line_figure(chart)
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    # HTML knows the namespaces. Identifiers must differ from those of the page's other charts.
    svg = _NAMESPACE.sub("", svg[svg.index("<svg") :])
    prefix = hashlib.sha256(chart.title.encode()).hexdigest()[:8]
    return _IDENTIFIER.sub(rf"\g<1>c{prefix}-", svg)


def line_figure(chart: Chart) -> Figure:
    """The lines of a chart, on its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(axis="y", color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    for start, end, phase in chart.bands:
        if phase in PHASES:
            axes.axvspan(start, end, color=PHASES[phase], linewidth=0, zorder=0)
    for at in chart.marks:
        axes.axvline(at, color=_INK, linewidth=0.8, linestyle=(0, (2, 3)))
    for series in chart.drawn:
        _plot(axes, series)
    axes.set_xlabel(chart.x_label)
    _scale(axes, chart)
    return figure


def _plot(axes: Axes, series: Series) -> None:
    """One line; a point that stands alone between gaps is marked, or nothing of it would show."""
    points = thin(series.points)
    known = [False, *(y is not None for _, y in points), False]
    marked = [
        i
        for i in range(len(points))
        if known[i + 1] and (series.dots or not (known[i] or known[i + 2]))
    ]
    axes.plot(
        [x for x, _ in points],
        [math.nan if y is None else y for _, y in points],
        color=series.colour,
        alpha=0.4 if series.faint else 1.0,
        linewidth=0.8 if series.faint else 1.6,
        linestyle="--" if series.dashed else "-",
        marker="o",
        markersize=4,
        markevery=marked,
    )


def _scale(axes: Axes, chart: Chart) -> None:
    """Limits, ticks and the way that numbers are written."""
    if chart.log_x:
        axes.set_xscale("log")
    if chart.log_y:
        axes.set_yscale("log")
    if chart.x_range is not None and chart.x_range[1] > chart.x_range[0]:
        axes.set_xlim(*chart.x_range)
    if chart.y_zero and not chart.log_y:
        axes.set_ylim(bottom=min(0.0, axes.dataLim.y0))
    _ticks(axes.xaxis, chart.x_format, chart.log_x)
    _ticks(axes.yaxis, chart.y_format, chart.log_y)
    if chart.x_ticks:
        axes.set_xticks(list(chart.x_ticks))


def _ticks(axis: Any, written: Any, log: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    # Between two powers of ten a logarithmic locator finds too few round values.
    wide = log and high > 10 * low
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(6, steps=[1, 2, 5]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: written(value)))


def _heat_map(chart: HeatMap) -> Figure:
    """Cells from white to the full colour; those of value 0 in a colour of their own."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = len(chart.rows)
    figure = Figure(figsize=(_WIDTH, 0.8 + min(4.5, 0.28 * rows)), layout="constrained")
    axes = figure.add_subplot()
    shades = LinearSegmentedColormap.from_list("load", ["#ffffff", ROUTED])
    colours = shades.with_extremes(bad=NEVER)
    cells = [[value if value > 0 else math.nan for value in values] for _, values in chart.rows]
    axes.imshow(cells, cmap=colours, vmin=0, vmax=chart.most, aspect="auto", interpolation="none")
    axes.set_yticks(range(rows), [label for label, _ in chart.rows])
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_xlabel(chart.x_label)
    return figure
