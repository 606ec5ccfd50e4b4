"""The report: what it draws is what the log says, whatever state the run is in."""

from __future__ import annotations

import html.parser
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from engine.errors import CheckpointError
from training.config import TrainConfig
from training.errors import TrainingError
from training.experts.study import ActivationStudy, LayerStudy
from training.report import charts
from training.report.chart import Chart, Point
from training.report.history import RunHistory, parse_record
from training.report.training_page import render, write_report
from training.trainer import Trainer

STEPS = 400
FLOPS, SECONDS = 2e12, 0.5  # of a dense step; sparse steps cost half


def layer(active: float, coverage: float | None) -> LayerStudy:
    load = (2.0, 1.0, 1.0, 0.0) if coverage is not None else ()
    return LayerStudy(active, 0.01, (0.4, 0.5, 0.7), 0.8, coverage, load, 0.3, 0.1)


def phase_of(step: int) -> str:
    return "dense" if step < 100 else "sparse" if step < 300 else "mixed"


def log_lines() -> list[dict[str, Any]]:
    """A run of 400 steps: dense, sparse from 100, mixed from 300."""
    lines: list[dict[str, Any]] = []
    flops = seconds = 0.0
    for step in range(STEPS):
        if step in (100, 300):
            reason = "activations settled: similarity 0.712 >= 0.7"
            switch = {"step": step, "phase": phase_of(step), "reason": reason, "cluster": True}
            lines.append({"step": step, "switch": switch})
        if step % 50 == 0 and step:
            routed = 0.7 if step >= 100 else None
            study = ActivationStudy(1024, 2, (layer(0.5 - step / 1000, routed), layer(0.1, routed)))
            settled, drift = 0.5 + step / 1000, 0.9 if step >= 100 else None
            probe = study.to_dict()
            lines.append({"step": step, "probe": probe, "settled": settled, "drift": drift})
        dense = phase_of(step) == "dense"
        flops += FLOPS if dense else FLOPS / 2
        seconds += SECONDS if dense else SECONDS / 2
        if step % 10 == 0:
            lines.append(
                {
                    "step": step,
                    "phase": phase_of(step),
                    "loss": 3 + 5 * math.exp(-step / 80) + 0.01 * (step % 7),
                    "outside": None if dense else 0.25,
                    "top_k": None if dense else 8,
                    "lr": 1e-3,
                    "grad_norm": 0.5,
                    "tokens_per_second": 1000.0 + step,
                    "flops": flops,
                    "seconds": seconds,
                }
            )
        if step % 100 == 0 and step:
            lines.append(
                {"step": step, "valid": {"dense": 100.0 - step / 10, "8": 110 - step / 10}}
            )
    return lines


def quality(perplexity: float, share: float) -> dict[str, Any]:
    return {
        "policy": "p",
        "perplexity": perplexity,
        "activated_ratio": share,
        "coverage": 0.9,
    }


def training_report() -> dict[str, Any]:
    return {
        "command": "ambidex train --preset starter",
        "config": {"steps": STEPS, "preset": "starter", "switch": {"settled": 0.7, "stale": 0.65}},
        "corpus": {"description": "text", "fingerprint": "ab", "train_tokens": 3_199_235},
        "tokens_seen": 4_096_000,
        "seconds": 125.0,
        "device": "cpu",
        "threads": 2,
        "versions": {"torch": "2.13.0"},
        "flops": {"training": 5e14, "dense": 8e14, "per_token": {"dense": 1.25e7}},
        "evaluation": {
            "dense": quality(60.0, 1.0),
            "routed": {"4": quality(66.0, 0.0625), "16": quality(60.3, 0.25)},
            "oracle": {"4": quality(63.0, 0.0625), "16": quality(60.1, 0.25)},
        },
    }


def write_run(run: Path, lines: list[Any], report: Any = None) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    text = "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines)
    (run / "log.jsonl").write_text(text)
    if report is not None:
        (run / "checkpoint").mkdir(exist_ok=True)
        (run / "checkpoint" / "training_report.json").write_text(json.dumps(report))
    return run


class Page(html.parser.HTMLParser):
    """Charts, tables and text of a page; fails on unbalanced or active content."""

    VOID = ("meta", "br", "hr", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: dict[str, list[str]] = {}  # the legend of each chart
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.open: list[str] = []
        self._legend: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.check(tag, attrs)

    def check(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe", "object", "foreignobject")
        for name, value in attrs:
            assert not name.startswith("on")
            assert name not in ("src", "href")
            assert value is not None
            assert "href" not in name or value.startswith(("#", "data:image/png;"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.check(tag, attrs)
        named = {name: value or "" for name, value in attrs}
        if tag not in self.VOID:
            self.open.append(tag)
        if named.get("class") == "chart":
            self._legend = self.figures[named["aria-label"]] = []
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or "style" in self.open:
            return
        self.text += data
        if self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif self.open[-1] == "li":
            self._legend.append(data)


def page_of(run: Path, against: Path | None = None) -> Page:
    return Page(write_report(run, against=against).read_text(encoding="utf-8"))


def values(chart: Chart, name: str) -> list[Point]:
    """The known points of one line."""
    (series,) = [s for s in chart.series if s.name == name]
    return [(x, y) for x, y in series.points if y is not None]


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    return write_run(tmp_path / "ssd", log_lines(), training_report())


def test_the_loss_drawn_is_the_loss_logged(finished: Path) -> None:
    chart = charts.loss(RunHistory.read(finished), None)
    logged = [(line["step"], line["loss"]) for line in log_lines() if "loss" in line]
    assert len(logged) == 40
    assert values(chart, "each logged step") == logged
    assert chart.bands == [(100, 300, "sparse"), (300, 400, "mixed")]
    assert chart.marks == [100, 300]
    assert page_of(finished).figures[chart.title] == [
        *("each logged step", "running mean", "mixed phase", "sparse phase")
    ]


def test_probes_are_drawn_layer_by_layer(finished: Path) -> None:
    history = RunHistory.read(finished)
    active = charts.activity(history)
    drawn = values(active, "layer 0")
    assert [x for x, _ in drawn] == [50 * i for i in range(1, 8)]
    assert [y for _, y in drawn] == pytest.approx([0.5 - 0.05 * i for i in range(1, 8)])
    assert len(active.series) == 2
    mass = charts.concentration(history)
    assert [y for _, y in values(mass, "router, on the probe")] == pytest.approx([0.7] * 6)
    assert [y for _, y in values(mass, "oracle, on the probe")] == pytest.approx([0.8] * 7)
    inside = values(mass, "in training's own sparse steps")
    assert [y for _, y in inside] == pytest.approx([0.75] * 30)
    similarity = charts.similarity(history)
    assert values(similarity, "settled: to the previous probe")[2] == (150, 0.65)
    drift = values(similarity, "drift: to the clustering's birth")
    assert [y for _, y in drift] == pytest.approx([0.9] * 6)
    assert values(similarity, "bound: stale 0.65") == [(0, 0.65), (400, 0.65)]
    load = charts.load(history)
    assert [y for _, y in values(load, "fullest expert of any layer")] == [2.0] * 6
    assert [y for _, y in values(load, "emptiest expert, mean of layers")] == [0.0] * 6
    cells = charts.load_map(history.probes[-1])
    assert cells is not None
    assert cells.title == "Load of every expert at step 350"
    assert cells.rows == [(f"layer {i}", (2.0, 1.0, 1.0, 0.0)) for i in range(2)]
    assert page_of(finished).figures[cells.title] == [
        *("never chosen", "3 times the uniform load or more")
    ]


def test_validation_and_quality_are_drawn_with_their_values(finished: Path) -> None:
    history = RunHistory.read(finished)
    valid = charts.validation(history, None)
    assert values(valid, "dense") == [(100, 90), (200, 80), (300, 70)]
    assert values(valid, "8 experts") == [(100, 100), (200, 90), (300, 80)]
    quality = charts.quality(history.report["evaluation"])
    assert values(quality, "routed") == [(0.0625, 66), (0.25, 60.3)]
    assert values(quality, "oracle") == [(0.0625, 63), (0.25, 60.1)]
    assert values(quality, "dense") == [(0.0625, 60), (1.0, 60)]
    page = page_of(finished)
    assert page.figures[quality.title] == ["dense", "routed", "oracle"]
    table = next(t for t in page.tables if t[0][0] == "experts")
    assert table[2] == ["4", "6.25%", "66.000", "+10.00%", "+5.00%", "90.0%", "90.0%"]


def test_cost_is_drawn_beside_all_dense_training(finished: Path, tmp_path: Path) -> None:
    dense_lines = [
        {**line, "phase": "dense", "flops": FLOPS * (line["step"] + 1), "seconds": line["step"]}
        for line in log_lines()
        if "loss" in line
    ]
    dense = write_run(tmp_path / "dense", dense_lines)
    flops, time = charts.cost(RunHistory.read(finished), RunHistory.read(dense))
    last = pytest.approx((390, 391 * FLOPS))
    assert values(flops, "dense run")[-1] == last
    assert values(flops, "this run's steps all dense")[-1] == last
    assert values(flops, "this run")[-1] == pytest.approx((390, (100 + 291 / 2) * FLOPS))
    estimate = values(time, "estimate from this run's dense steps")
    assert estimate[-1] == pytest.approx((390, 391 * SECONDS))
    page = page_of(finished, dense)
    assert {flops.title, time.title} <= page.figures.keys()
    assert page.figures["Training loss against training FLOPs"] == ["this run", "dense run"]
    assert page.figures["Training loss against training seconds"] == ["this run", "dense run"]
    assert "compared with" in page.text
    assert "all dense would take 1.60 times as many" in page.text  # 8e14 / 5e14, from the report


def test_the_page_has_the_decisions_the_facts_and_the_numbers(finished: Path) -> None:
    page = page_of(finished)
    switches = next(t for t in page.tables if t[0][0] == "step")
    assert switches[1][:2] == ["100", "sparse"]
    assert switches[1][3] == "yes"
    facts = dict(row for row in page.tables[-1] if len(row) == 2)
    assert facts["command"] == "ambidex train --preset starter"
    assert facts["switch.settled"] == "0.7"
    assert facts["tokens seen"] == "4,096,000"
    assert facts["version: torch"] == "2.13.0"
    assert facts["FLOPs a token: dense"] == "12,500,000"
    assert "finished, 400 steps" in page.text
    assert "of the experts (16): +0.50% perplexity" in page.text


def test_an_unfinished_run_has_a_report(tmp_path: Path) -> None:
    lines: list[Any] = [line for line in log_lines() if line["step"] < 230]
    page = page_of(write_run(tmp_path / "run", [*lines, '{"step": 230, "loss": 3.']))
    assert "not finished, sparse at step 220" in page.text
    assert "Measured when the run is finished." in page.text
    # at step 220: 221 dense steps over 100 dense ones and 121 at half the cost
    assert "all dense would take 1.38 times as many" in page.text
    facts = dict(row for row in page.tables[-1] if len(row) == 2)
    assert facts["lines of the log not understood"] == "1"


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_run_that_just_began_has_a_report(count: int, tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", log_lines()[:count]))
    if count == 0:
        assert "nothing has been logged yet" in page.text
        assert not page.figures
    else:
        assert page.figures["Training loss, nats per token"] == ["each logged step", "running mean"]
    assert "No change of phase so far." in page.text


def test_values_that_are_not_finite_are_gaps(tmp_path: Path) -> None:
    lines = log_lines()[:5]
    lines[2]["loss"] = float("nan")
    lines[3]["grad_norm"] = float("inf")
    text = write_report(write_run(tmp_path / "run", lines)).read_text()
    drawn = re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    assert not re.search(r"\b(nan|inf)\b", drawn.lower())
    assert "Training loss, nats per token" in Page(text).figures
    chart = charts.loss(RunHistory.read(tmp_path / "run"), None)
    assert [y is None for _, y in chart.series[0].points].count(True) == 1


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    evil = '<script>alert("x")</script><img src=x onerror=y>&\'"'
    lines = log_lines()
    lines += [
        {"step": 391, "switch": {"step": 391, "phase": evil, "reason": evil, "cluster": True}},
        {**lines[0], "step": 392, "phase": evil},
        {"step": 393, "valid": {evil: 3.0, "dense": evil}},
    ]
    report = training_report()
    report |= {"command": evil, "device": evil, "versions": {evil: evil}, "corpus": {evil: [evil]}}
    report["config"][evil] = {evil: evil}
    run = write_run(tmp_path / "<b>run&", lines, report)
    page = page_of(run)  # which fails on a script, an image, a handler, or unbalanced tags
    assert page.text.count(evil) >= 8
    assert "<b>run&" in page.text


def test_damaged_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    good = log_lines()
    bad = ["", "[]", "3", "{}", '{"step": -1, "loss": 1}', '{"step": 1, "probe": {"layers": 3}}']
    bad += ['{"step": true, "loss": 1}', '{"step": 5, "what": 1}', "[" * 100_000]
    history = RunHistory.read(write_run(tmp_path / "run", [*good, *bad]))
    assert history.skipped == len(bad) - 1  # an empty line is no record
    assert len(history.steps) == 40


def test_of_a_resumed_run_the_line_written_last_counts(tmp_path: Path) -> None:
    lines = log_lines()[:3]
    again = {**lines[1], "loss": 9.5}
    history = RunHistory.read(write_run(tmp_path / "run", [*lines, again]))
    assert [r.loss for r in history.steps][1] == 9.5
    assert len(history.steps) == 3


def test_wrong_kinds_of_values_do_not_stop_the_report(tmp_path: Path) -> None:
    line = {"step": 3, "loss": "x", "phase": 7, "top_k": "8", "flops": [1], "lr": True}
    record = parse_record(json.dumps(line))
    assert record is not None
    report: dict[str, Any] = {"evaluation": [], "flops": 3, "config": "x", "corpus": None}
    page = page_of(write_run(tmp_path / "run", [line, *log_lines()], report))
    assert "Training loss, nats per token" in page.figures
    render(RunHistory.read(write_run(tmp_path / "b", [line])))


def test_the_page_is_self_contained_and_replaced_whole(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text("old")
    assert write_report(finished, out) == out
    text = out.read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|url\((?!#)|@import|<script|<link", text)
    assert 'name="viewport"' in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.html", "ssd"]
    assert len(text) < 300_000


def test_a_long_run_gives_a_small_page(tmp_path: Path) -> None:
    line = log_lines()[0]
    lines = [{**line, "step": 10 * i, "loss": 3 + math.sin(i)} for i in range(20_000)]
    assert write_report(write_run(tmp_path / "run", lines)).stat().st_size < 600_000


def test_what_is_no_run_is_refused_in_a_sentence(tmp_path: Path, finished: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(TrainingError, match="holds no training run"):
            write_report(path)
    with pytest.raises(TrainingError, match="holds no training run"):
        write_report(finished, against=tmp_path)
    for out in (tmp_path / "no" / "page.html", tmp_path):
        with pytest.raises(TrainingError, match="--out must name a file"):
            write_report(finished, out)
    (finished / "checkpoint" / "training_report.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        write_report(finished)


def test_dense_estimates_come_from_dense_stretches_alone(finished: Path) -> None:
    history = RunHistory.read(finished)
    assert charts.dense_rate(history, lambda r: r.flops) == pytest.approx(FLOPS)
    assert charts.dense_seconds(history) == pytest.approx(SECONDS)
    assert charts.dense_flops(history) == pytest.approx(8e14 / STEPS)


def test_the_log_of_a_real_run_is_understood(
    micro: TrainConfig, corpus: Path, tmp_path: Path
) -> None:
    Trainer(micro, tmp_path / "run", [corpus], command="ambidex train").train()
    history = RunHistory.read(tmp_path / "run")
    assert history.total_steps == 20
    assert [s.phase for s in history.switches][-1] == "mixed"
    page = page_of(tmp_path / "run")
    assert "Training loss, nats per token" in page.figures
    assert "Held-out perplexity by share of the experts" in page.figures
