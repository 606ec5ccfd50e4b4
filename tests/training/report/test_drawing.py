"""What matplotlib draws: the chart's own values, the same bytes every time, nothing active."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.patches import Rectangle

from training.report.chart import MOST_POINTS, Chart, HeatMap, Point, Series, format_percent
from training.report.drawing import draw, line_figure

XLINK = 'xmlns:xlink="http://www.w3.org/1999/xlink"'


def chart(points: list[Point], **options: object) -> Chart:
    return Chart("t", "x", [Series("s", points, "#ff0000")], **options)  # type: ignore[arg-type]


def parsed(svg: str) -> ET.Element:
    """The drawing as a tree; fails if it is not well formed."""
    return ET.fromstring(svg.replace("<svg", f"<svg {XLINK}", 1))


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()).strip() for element in parsed(svg).iter("text")]


def test_lines_bands_and_marks_stand_where_the_chart_has_them() -> None:
    points: list[Point] = [(0, 1.0), (1, 2.0), (2, None), (3, 5.0), (4, None), (5, 1.0), (6, 1.0)]
    bands = [(1.0, 3.0, "sparse"), (3.0, 6.0, "mixed"), (0.0, 1.0, "unknown")]
    (axes,) = line_figure(
        chart(points, bands=bands, marks=[1.0], x_range=(0.0, 6.0), y_zero=True)
    ).axes
    mark, line = axes.lines
    rectangles = [p for p in axes.patches if isinstance(p, Rectangle)]
    assert len(rectangles) == len(axes.patches)
    assert list(mark.get_xdata()) == [1.0, 1.0]
    xy: Any = line.get_xydata()
    found = [(x, None if math.isnan(y) else y) for x, y in xy]
    assert found == points
    assert line.get_markevery() == [3]  # alone between gaps: without a dot it could not be seen
    assert [(p.get_x(), p.get_x() + p.get_width()) for p in rectangles] == [(1, 3), (3, 6)]
    assert axes.get_xlim() == (0.0, 6.0)
    assert axes.get_ylim()[0] == 0.0


def test_dots_mark_every_known_point_and_styles_differ() -> None:
    points: list[Point] = [(0, 1.0), (1, None), (2, 3.0)]
    series = [
        Series("a", points, "#ff0000", dots=True),
        Series("b", points, "#00ff00", faint=True, dashed=True),
    ]
    first, second = line_figure(Chart("t", "x", series)).axes[0].lines
    assert first.get_markevery() == [0, 2]
    assert (first.get_color(), first.get_linestyle(), first.get_alpha()) == ("#ff0000", "-", 1.0)
    assert (second.get_linestyle(), second.get_alpha()) == ("--", 0.4)
    assert second.get_linewidth() < first.get_linewidth()


def test_ticks_are_written_by_the_chart() -> None:
    shares: list[Point] = [(0.0625, 100.0), (0.25, 900.0), (0.5, 1100.0)]
    svg = draw(
        chart(shares, log_x=True, log_y=True, x_ticks=[0.0625, 0.25, 1.0], x_format=format_percent)
    )
    assert {"6.25%", "25%", "100%", "100", "200", "500", "x"} <= set(texts(svg))
    narrow = texts(draw(chart([(0, 60.0), (1, 95.0)], log_y=True)))
    assert {"60", "70", "80", "90"} <= set(narrow)


def test_a_drawing_is_plain_svg_for_a_page() -> None:
    svg = draw(chart([(0, 1.0), (1, 2.0)]))
    assert svg.startswith("<svg")
    assert not re.search(r"https?:|<script|<metadata|xmlns", svg)
    other = draw(Chart("u", "x", chart([(0, 1.0), (1, 2.0)]).series))
    identifiers = [set(re.findall(r' id="([^"]*)"', text)) for text in (svg, other)]
    assert identifiers[0]
    assert not identifiers[0] & identifiers[1]
    for reference in re.findall(r'url\(#([^)]*)\)|href="#([^"]*)"', svg):
        assert "".join(reference) in identifiers[0]


def test_drawing_twice_gives_the_same_bytes() -> None:
    """In another process too, where hashes have another seed."""
    drawn = chart([(0, 1.0), (1, 2.0)], x_range=(0.0, 1.0))
    assert draw(drawn) == draw(drawn)
    program = (
        "from training.report.chart import Chart, Series\n"
        "from training.report.drawing import draw\n"
        "series = [Series('s', [(0, 1.0), (1, 2.0)], '#ff0000')]\n"
        "print(draw(Chart('t', 'x', series, x_range=(0.0, 1.0))), end='')"
    )
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stdout == draw(drawn), found.stderr


def test_matplotlib_is_imported_only_to_draw() -> None:
    program = (
        "import sys, training.trainer, training.report.training_page\n"
        "sys.exit('matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("points", [[(3.0, 2.0)], [(3.0, 0.0)], [(0.0, -5.0), (0.0, -5.0)]])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("zero", [False, True])
def test_one_value_alone_is_drawn(points: list[Point], log: bool, zero: bool) -> None:
    log = log and all(y is not None and y > 0 for _, y in points)
    parsed(draw(chart(points, log_y=log, y_zero=zero, x_range=(0, 0))))


finite = st.floats(-1e100, 1e100)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1e9), st.one_of(st.none(), finite)), max_size=60))
@example([(0.0, 5e-324)])
@example([(0.0, 1e100), (1.0, -1e100)])
def test_whatever_the_values_something_well_formed_is_drawn(points: list[Point]) -> None:
    drawn = chart(sorted(points, key=lambda p: p[0]))
    if drawn.drawn:
        svg = draw(drawn)
        parsed(svg)
        assert not re.search(r"\b(nan|inf)\b", svg)


def test_text_is_escaped_and_is_no_formula() -> None:
    evil = "<script>$x^2$"
    svg = draw(Chart(evil, evil, chart([(0, 1.0), (1, 2.0)]).series, y_format=lambda _: evil))
    assert "<script" not in svg
    assert evil in texts(svg)
    assert evil in texts(draw(HeatMap(evil, [(evil, [1.0, 0.0])], 3.0, "expert", [])))


def test_a_heat_map_has_its_rows_and_columns() -> None:
    rows = [("layer 0", [0.0, 1.5, 9.0]), ("layer 1", [3.0, 0.75, 0.0])]
    svg = draw(HeatMap("load", rows, 3.0, "expert", []))
    assert {"layer 0", "layer 1", "expert", "0", "1", "2"} <= set(texts(svg))
    assert svg.count("<image") == 1
    assert svg == draw(HeatMap("load", rows, 3.0, "expert", []))


def test_large_charts_stay_small_in_bytes() -> None:
    cells = [(f"layer {i}", [1.0] * 256) for i in range(48)]
    assert len(draw(HeatMap("load", cells, 3.0, "expert", []))) < 60_000
    points: list[Point] = [(i, math.sin(i)) for i in range(20_000)]
    (line,) = line_figure(chart(points)).axes[0].lines
    assert len(line.get_xdata()) <= MOST_POINTS + 1
    assert len(draw(chart(points))) < 60_000
