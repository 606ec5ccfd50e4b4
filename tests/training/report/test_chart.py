"""Charts as data: numbers for people, thinning and smoothing, and what the legend says."""

from __future__ import annotations

import math

import pytest

from training.report.chart import (
    MOST_POINTS,
    PHASES,
    Chart,
    Point,
    Series,
    format_number,
    format_percent,
    smooth,
    thin,
)


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


def test_the_legend_names_what_is_drawn_and_what_is_shaded() -> None:
    series = [
        Series("loss", [(0, 1.0)], "#111111", faint=True),
        Series("empty", [(0, None)], "#222222"),
        Series("bound", [(0, 2.0)], "#333333", dashed=True),
    ]
    bands = [(0.0, 1.0, "sparse"), (1.0, 2.0, "mixed"), (2.0, 3.0, "sparse"), (3.0, 4.0, "other")]
    chart = Chart("t", "x", series, bands)
    assert [s.name for s in chart.drawn] == ["loss", "bound"]
    assert chart.legend == [
        ("loss", "#111111", "faint"),
        ("bound", "#333333", "dashed"),
        ("mixed phase", PHASES["mixed"], "area"),
        ("sparse phase", PHASES["sparse"], "area"),
    ]
