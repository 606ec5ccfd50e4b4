"""How many replicas a load needs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.ray.scaling import DEMAND, ScalingPolicy, demand

COUNTS = st.integers(0, 500)


def test_demand() -> None:
    assert demand(16, 0, 64, 0.1) == 0.25  # by places
    assert demand(16, 0, 64, 0.9) == 0.9  # by memory
    assert demand(64, 64, 64, 0.5) == 2.0  # as many wait as run
    assert demand(8, 8, 64, 0.99) == 2.0  # 8 long prompts fill it, and 8 more wait
    assert demand(0, 3, 64, 0.0) == 3.0


@given(COUNTS, COUNTS, st.floats(0, 1))
def test_what_waits_always_asks_for_more(running: int, waiting: int, used: float) -> None:
    running = min(running, 64)
    used = used if running else 0.0  # what runs owns the blocks
    now, then = (demand(running, waiting + i, 64, used) for i in (0, 1))
    assert then > now
    assert (now > 1) == (waiting > 0) or now <= 1


def test_the_policy() -> None:
    policy = ScalingPolicy(0.8)
    assert policy.replicas({}, 2) is None
    assert policy.replicas({"a": 0.0}, 1) == 1
    assert policy.replicas({"a": 0.8, "b": 0.8}, 2) == 2
    assert policy.replicas({"a": 1.6, "b": 1.6}, 2) == 4
    assert policy.replicas({"a": 0.1, "b": 0.1}, 2) == 1
    assert policy.replicas({"a": 1.6}, 2) == 4  # the second has only just started


def test_the_policy_as_serve_calls_it() -> None:
    policy = ScalingPolicy()
    context = SimpleNamespace(
        aggregated_metrics={DEMAND: {"a": 1.6}}, current_num_replicas=1, target_num_replicas=1
    )
    assert policy(context) == (2, {})
    context.aggregated_metrics = None
    assert policy(context) == (1, {})
    with pytest.raises(ValueError, match="target must be above 0"):
        ScalingPolicy(0)
