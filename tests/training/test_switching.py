"""The controller: bounds hold, measurements decide inside them, and its state is JSON."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.config import ModelShape, SwitchConfig, TrainConfig
from training.switching import Decision, Phase, SwitchController

CONFIG = TrainConfig(
    steps=100,
    model=ModelShape(num_experts=64),
    switch=SwitchConfig(
        settled=0.7,
        stale=0.5,
        min_dense_share=0.1,
        max_dense_share=0.3,
        min_sparse_share=0.1,
        max_sparse_share=0.25,
        mixed_share=0.2,
        mixed_top_k=(4, 8),
    ),
)


def run(settled: list[float], drift: list[float]) -> list[Decision]:
    """Feed one pair of similarities a step, through a JSON round trip of the state each step."""
    controller = SwitchController(CONFIG)
    decisions = []
    for step in range(CONFIG.steps):
        if controller.wants_probe(step):
            controller.observe(settled[step], drift[step])
        decision = controller.decide(step)
        if decision is not None:
            decisions.append(decision)
        state = json.loads(json.dumps(controller.to_dict()))
        controller = SwitchController.from_dict(CONFIG, state)
    return decisions


def test_settled_activations_switch_to_sparse_at_once_after_the_minimum() -> None:
    first = run([0.9] * 100, [0.9] * 100)[0]
    assert (first.step, first.phase, first.cluster) == (10, Phase.SPARSE, True)
    assert "settled" in first.reason


def test_without_settling_the_bounds_decide() -> None:
    decisions = run([0.1] * 100, [0.9] * 100)
    assert [(d.step, d.phase) for d in decisions] == [
        (30, Phase.SPARSE),
        (55, Phase.DENSE),
        (80, Phase.MIXED),
    ]


def test_a_stale_clustering_ends_the_sparse_phase() -> None:
    decisions = run([0.9] * 100, [0.2] * 100)
    assert decisions[1].phase is Phase.DENSE
    assert decisions[1].step == 20
    assert "stale" in decisions[1].reason


def test_mixed_clusters_anew_only_after_dense() -> None:
    after_dense = run([0.1] * 100, [0.9] * 100)[-1]
    assert after_dense.phase is Phase.MIXED
    assert after_dense.cluster
    after_sparse = run([0.1] * 60 + [0.9] * 40, [0.9] * 100)[-1]
    assert after_sparse.phase is Phase.MIXED
    assert not after_sparse.cluster


similarities = st.lists(st.floats(0, 1), min_size=100, max_size=100)


@given(similarities, similarities)
def test_bounds_hold_whatever_is_measured(settled: list[float], drift: list[float]) -> None:
    decisions = run(settled, drift)
    assert decisions[-1].phase is Phase.MIXED
    assert decisions[-1].step == 80
    starts = [(0, Phase.DENSE), *((d.step, d.phase) for d in decisions)]
    longest = {Phase.DENSE: 30, Phase.SPARSE: 25}
    for (start, phase), (end, following) in itertools.pairwise(starts):
        assert end - start <= longest[phase]
        assert end - start >= 10 or following is Phase.MIXED


def configured(**changes: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, switch=dataclasses.replace(CONFIG.switch, **changes))


def steps_of(
    config: TrainConfig, settled: float = 0.1, drift: float = 0.9
) -> tuple[list[Decision], list[tuple[Phase, int | None]]]:
    """The decisions, and (phase, k) of every step; through a JSON round trip after each step."""
    controller, decisions, taken = SwitchController(config), [], []
    for step in range(config.steps):
        if controller.wants_probe(step):
            controller.observe(settled, drift)
        decision = controller.decide(step)
        decisions += [decision] if decision is not None else []
        taken.append((controller.phase, controller.step_top_k(step)))
        state = json.loads(json.dumps(controller.to_dict()))
        controller = SwitchController.from_dict(config, state)
    return decisions, taken


def runs_of(values: Iterable[int | None]) -> list[tuple[int | None, int]]:
    """(value, how often) of each stretch of one value."""
    return [(value, len(list(group))) for value, group in itertools.groupby(values)]


def test_the_mixed_phase_takes_turns() -> None:
    controller = SwitchController(CONFIG, Phase.MIXED, 80)
    ks = [controller.step_top_k(step) for step in range(80, 88)]
    assert ks == [None, 4, None, 8, None, 4, None, 8]
    assert SwitchController(CONFIG).step_top_k(3) is None


@pytest.mark.parametrize("position", [80, 83, 91])
def test_every_third_step_of_the_mixed_phase_is_dense(position: int) -> None:
    """The ks take turns over the sparse steps alone, wherever the phase began."""
    config = configured(mixed_dense_every=3, mixed_top_k=(4, 8, 16))
    controller = SwitchController(config, Phase.MIXED, position)
    ks = [controller.step_top_k(step) for step in range(position, position + 9)]
    assert ks == [None, 4, 8, None, 16, 4, None, 8, 16]


@given(similarities, similarities)
def test_mode_dense_never_switches(settled: list[float], drift: list[float]) -> None:
    controller = SwitchController(configured(mode="dense"))
    for step in range(100):
        if controller.wants_probe(step):
            controller.observe(settled[step], drift[step])
        assert controller.decide(step) is None
        assert controller.phase is Phase.DENSE
        assert controller.step_top_k(step) is None
    assert controller.wants_probe(98), "a dense run is watched to its end"


@pytest.mark.parametrize(("settled", "start"), [(0.1, 30), (0.9, 10)])
def test_mode_static_clusters_once_and_stays_sparse(settled: float, start: int) -> None:
    """However stale the clustering grows; with no mixed phase, though a share for it is set."""
    config = configured(mode="static", top_k=(16, 8), mixed_share=0.2)
    decisions, taken = steps_of(config, settled, drift=0.0)
    assert [(d.step, d.phase, d.cluster) for d in decisions] == [(start, Phase.SPARSE, True)]
    sparse = (100 - start) // 2
    ks = runs_of(k for _, k in taken)
    assert ks == [(None, start), (16, sparse), (8, sparse)]


def test_the_ks_divide_the_stretch_from_the_first_sparse_step_to_the_mixed_phase() -> None:
    config = configured(top_k=(32, 16, 8), max_sparse_share=1.0)
    _, taken = steps_of(config)
    sparse = [k for phase, k in taken if phase is Phase.SPARSE]
    assert runs_of(sparse) == [(32, 17), (16, 17), (8, 16)]


def test_a_return_to_dense_does_not_start_the_ks_over() -> None:
    """It follows the step, over sparse and dense stretches alike."""
    config = configured(top_k=(32, 16, 8, 4, 2), max_dense_share=0.1, max_sparse_share=0.15)
    decisions, taken = steps_of(config, drift=0.9)
    assert [(d.step, d.phase) for d in decisions] == [
        (10, Phase.SPARSE),
        (25, Phase.DENSE),
        (35, Phase.SPARSE),
        (50, Phase.DENSE),
        (60, Phase.SPARSE),
        (75, Phase.DENSE),
        (80, Phase.MIXED),
    ]
    for step, (phase, k) in enumerate(taken):
        if phase is Phase.SPARSE:
            assert k == (32, 16, 8, 4, 2)[(step - 10) // 14]


def test_the_state_says_when_the_first_sparse_step_was() -> None:
    controller = SwitchController(configured(max_dense_share=0.1, max_sparse_share=0.15))
    assert controller.to_dict()["first_sparse"] is None
    for step in range(40):
        controller.decide(step)
    state = controller.to_dict()
    assert (state["phase"], state["phase_start"], state["first_sparse"]) == ("sparse", 35, 10)
    assert SwitchController.from_dict(controller.config, state) == controller


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_mixed_phase_or_nothing_else(share: float) -> None:
    decisions, taken = steps_of(configured(mixed_share=share))
    phases = {phase for phase, _ in taken}
    assert phases == ({Phase.MIXED} if share else {Phase.DENSE, Phase.SPARSE})
    assert decisions[0].cluster
