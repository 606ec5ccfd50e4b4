"""The controller: bounds hold, measurements decide inside them, and its state is JSON."""

from __future__ import annotations

import itertools
import json

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


def test_the_mixed_phase_takes_turns() -> None:
    controller = SwitchController(CONFIG, Phase.MIXED, 80)
    ks = [controller.step_top_k(step) for step in range(80, 88)]
    assert ks == [None, 4, None, 8, None, 4, None, 8]
    assert SwitchController(CONFIG, Phase.SPARSE).step_top_k(3) == CONFIG.switch.top_k
    assert SwitchController(CONFIG).step_top_k(3) is None
