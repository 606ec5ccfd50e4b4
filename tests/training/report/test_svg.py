"""The drawing functions: scales, ticks, thinning, and paths without a NaN."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from training.report.svg import (
    HEIGHT,
    MOST_POINTS,
    WIDTH,
    Band,
    Chart,
    Point,
    Series,
    format_number,
    format_percent,
    heat_map,
    line_chart,
    log_ticks,
    nice_ticks,
    smooth,
    thin,
)

NUMBERS = re.compile(r"-?\d+(?:\.\d+)?")


def coordinates(svg: str) -> list[tuple[float, float]]:
    """Every point that a line or a dot of the chart stands at."""
    root = ET.fromstring(svg)
    found = []
    for element in root:
        if element.tag == "path" and "line" in element.attrib["class"].split():
            pairs = re.split("[ML]", element.attrib["d"])[1:]
            found += [(float(x), float(y)) for x, y in (pair.split(",") for pair in pairs)]
        elif element.tag == "circle":
            found.append((float(element.attrib["cx"]), float(element.attrib["cy"])))
    return found


def chart(points: list[Point], **options: object) -> Chart:
    return Chart("t", "x", [Series("s", points, "red")], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (3.14159, "3.142"),
        (9999, "9999"),
        (12_000, "12k"),
        (250_000, "250k"),
        (1_500_000, "1.5M"),
        (-2e9, "-2G"),
        (3e13, "30T"),
        (6.765e16, "67.65P"),
        (4e18, "4E"),
        (1e30, "1e+30"),
        (2e-5, "2e-05"),
        (0.002, "0.002"),
    ],
)
def test_numbers_are_written_for_people(value: float, text: str) -> None:
    assert format_number(value) == text


def test_shares_are_written_as_percentages() -> None:
    assert [format_percent(v) for v in (0, 0.0625, 0.5, 1)] == ["0%", "6.25%", "50%", "100%"]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 3000, [0, 500, 1000, 1500, 2000, 2500, 3000]),
        (2.9, 8.6, [3, 4, 5, 6, 7, 8]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_lie_within_the_limits(low: float, span: float) -> None:
    found = nice_ticks(low, low + span)
    slack = 1e-6 * max(1.0, span)
    assert 2 <= len(found) <= 7
    assert all(low - slack <= value <= low + span + slack for value in found)


def test_logarithmic_ticks() -> None:
    assert log_ticks(18, 400) == pytest.approx([20, 50, 100, 200])
    assert log_ticks(60, 95) == pytest.approx([60, 70, 80, 90])
    assert 3 <= len(log_ticks(1, 1e300)) <= 8


def test_thinning_keeps_spikes_order_and_gaps() -> None:
    points: list[Point] = [(i, math.sin(i / 900)) for i in range(20_000)]
    points[7777] = (7777, 50.0)
    points[15_000:16_000] = [(i, None) for i in range(15_000, 16_000)]
    kept = thin(points)
    assert len(kept) <= MOST_POINTS + 1
    assert (7777, 50.0) in kept
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)
    assert any(y is None for _, y in kept)
    assert thin(points[:MOST_POINTS]) == points[:MOST_POINTS]


def test_smoothing_is_a_centred_mean_that_leaves_gaps_out() -> None:
    points: list[Point] = [(0, 1.0), (1, 4.0), (2, None), (3, 8.0)]
    assert smooth(points, 3) == [(0, 2.5), (1, 2.5), (2, None), (3, 8.0)]
    assert smooth(points, 1) == points
    assert smooth([], 5) == []


def test_a_gap_breaks_the_line_and_a_lonely_point_gets_a_dot() -> None:
    svg = line_chart(
        chart([(0, 1.0), (1, 2.0), (2, None), (3, 5.0), (4, None), (5, 1.0), (6, 1.0)])
    )
    path = next(p for p in ET.fromstring(svg) if p.attrib.get("class") == "line").attrib["d"]
    assert path.count("M") == 2
    assert svg.count("<circle") == 1
    assert len(coordinates(svg)) == 5


@pytest.mark.parametrize("points", [[(3.0, 2.0)], [(3.0, 0.0)], [(0.0, -5.0), (0.0, -5.0)]])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("zero", [False, True])
def test_one_value_alone_is_drawn_inside(points: list[Point], log: bool, zero: bool) -> None:
    log = log and all(y is not None and y > 0 for _, y in points)
    for x, y in coordinates(line_chart(chart(points, log_y=log, y_zero=zero, x_range=(0, 0)))):
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT


finite = st.floats(-1e100, 1e100)


@given(st.lists(st.tuples(st.floats(0, 1e9), st.one_of(st.none(), finite)), max_size=60))
@example([(0.0, 5e-324)])
def test_whatever_the_values_every_coordinate_is_a_number_inside(points: list[Point]) -> None:
    drawn = chart(sorted(points, key=lambda p: p[0]))
    if not drawn.has_points:
        return
    svg = line_chart(drawn)
    assert "nan" not in svg
    assert "inf" not in svg
    for x, y in coordinates(svg):
        assert -0.1 <= x <= WIDTH + 0.1
        assert -0.1 <= y <= HEIGHT + 0.1


def test_text_is_escaped_everywhere() -> None:
    evil = "<script>\"'&"
    svg = line_chart(
        Chart(
            evil,
            evil,
            [Series(evil, [(0, 1.0), (1, 2.0)], 'red"><script>', dots=True)],
            bands=[Band(0, 1, 'x"><script>')],
            marks=[(0.5, evil)],
            x_format=lambda _: evil,
            y_format=lambda _: evil,
        )
    )
    ET.fromstring(svg)
    assert "<script" not in svg
    table = heat_map(evil, [(evil, [1.0, 0.0])], 3.0)
    ET.fromstring(table)
    assert "<script" not in table


def test_a_heat_map_has_a_cell_for_every_value_and_marks_zeros() -> None:
    svg = heat_map("load", [("layer 0", [0.0, 1.5, 9.0]), ("layer 1", [3.0, 0.75, 0.0])], 3.0)
    cells = [e for e in ET.fromstring(svg) if e.tag == "rect"]
    assert [c.attrib["class"] for c in cells].count("cell dead") == 2
    live = [float(c.attrib["fill-opacity"]) for c in cells if c.attrib["class"] == "cell"]
    assert live == [0.5, 1.0, 1.0, 0.25]
    assert cells[1].findtext("title") == "layer 0, expert 1: 1.50"


def test_a_large_heat_map_stays_small_in_bytes() -> None:
    svg = heat_map("load", [(f"layer {i}", [1.0] * 256) for i in range(48)], 3.0)
    assert svg.count("<rect") == 48 * 256
    assert "<title>" not in svg
