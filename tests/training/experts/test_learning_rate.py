"""Both schedules as pure functions of the step."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.config import OptimizerConfig, TrainConfig
from training.experts.optimizer import learning_rate


def rates(config: TrainConfig) -> list[float]:
    return [learning_rate(config, step) for step in range(config.steps)]


def config_of(steps: int = 1000, **optimizer: float | str) -> TrainConfig:
    return TrainConfig(steps=steps, optimizer=OptimizerConfig(**optimizer))  # type: ignore[arg-type]


def test_cosine_passes_through_known_points() -> None:
    config = config_of(learning_rate=0.01, warmup_share=0.1, min_lr_share=0.2)
    assert learning_rate(config, 0) == pytest.approx(0.01 / 100)
    assert learning_rate(config, 49) == pytest.approx(0.005)
    assert learning_rate(config, 99) == learning_rate(config, 100) == 0.01
    quarter = 100 + 899 / 4
    between = 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4))
    assert learning_rate(config, round(quarter)) == pytest.approx(0.01 * between, rel=1e-3)
    assert learning_rate(config, 999) == pytest.approx(0.002)


def test_wsd_is_flat_then_linear() -> None:
    config = config_of(
        schedule="wsd", learning_rate=0.01, warmup_share=0.1, min_lr_share=0.2, decay_share=0.4
    )
    found = rates(config)
    assert found[49] == pytest.approx(0.005)
    assert set(found[99:600]) == {0.01}
    assert found[600] < 0.01
    assert found[799] == pytest.approx(0.01 * (0.2 + 0.8 * 0.5))
    assert found[999] == pytest.approx(0.002)
    falls = [a - b for a, b in itertools.pairwise(found[599:])]
    assert falls == pytest.approx([falls[0]] * 400)


settings = st.builds(
    config_of,
    steps=st.integers(3, 300),
    schedule=st.sampled_from(["cosine", "wsd"]),
    learning_rate=st.floats(1e-5, 1.0),
    min_lr_share=st.floats(0, 1),
    warmup_share=st.floats(0, 0.5),
    decay_share=st.floats(0, 1),
)


@given(settings)
def test_every_schedule_climbs_once_to_the_peak_and_falls_to_the_floor(config: TrainConfig) -> None:
    found, peak = rates(config), config.optimizer.learning_rate
    floor = peak * config.optimizer.min_lr_share
    warmup = max(1, round(config.optimizer.warmup_share * config.steps))
    assert found[0] == pytest.approx(peak / warmup)
    assert found[warmup - 1] == pytest.approx(peak)
    assert found[warmup] == pytest.approx(peak) or warmup == config.steps - 1
    assert max(found) == pytest.approx(peak)
    if warmup < config.steps - 1:
        assert found[-1] == pytest.approx(floor)
    assert all(a < b for a, b in itertools.pairwise(found[:warmup]))
    slack = 1e-12 * peak
    assert all(a >= b - slack for a, b in itertools.pairwise(found[warmup:]))
    assert all(rate >= floor - slack for rate in found[warmup:])


@given(settings, st.integers(0, 299))
def test_no_step_falls_further_than_its_schedule_can(config: TrainConfig, step: int) -> None:
    """No jumps after the warm-up: a fall lasts as long as it was given."""
    warmup = max(1, round(config.optimizer.warmup_share * config.steps))
    if not warmup <= step < config.steps - 1:
        return
    length = max(1, config.steps - 1 - warmup)
    if config.optimizer.schedule == "wsd":
        length = max(1, min(round(config.optimizer.decay_share * config.steps), length))
    steepest = math.pi / 2 if config.optimizer.schedule == "cosine" else 1.0
    height = config.optimizer.learning_rate * (1 - config.optimizer.min_lr_share)
    fall = learning_rate(config, step) - learning_rate(config, step + 1)
    assert fall <= height * steepest / length * (1 + 1e-9) + 1e-15


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_shortest_runs_have_a_rate(schedule: str, steps: int) -> None:
    assert all(0 < rate <= 2e-3 for rate in rates(config_of(steps, schedule=schedule)))
