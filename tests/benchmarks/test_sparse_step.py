"""The benchmark of training steps times real steps, and its records say what they are."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from benchmarks.records import write_records
from benchmarks.training import sparse_step


@pytest.fixture
def subject() -> sparse_step.Subject:
    return sparse_step.Subject(128, 64, layers=1, length=32)


@pytest.mark.parametrize("top_k", [None, sparse_step.CHOSEN])
def test_what_is_timed_changes_every_parameter_a_little(
    subject: sparse_step.Subject, top_k: int | None
) -> None:
    before = copy.deepcopy(subject.model.state_dict())
    times = subject.step(top_k)
    assert times.wall > 0
    assert times.cpu > 0
    for name, parameter in subject.model.named_parameters():
        change = (parameter.detach() - before[name]).abs()
        assert 0 < float(change.max()) < 1e-4, name


def test_random_tokens_spread_over_the_experts(subject: sparse_step.Subject) -> None:
    subject.step(sparse_step.CHOSEN)
    (ffn,) = subject.model.ffns()
    assert ffn.down.grad is not None
    used = ffn.down.grad.view(sparse_step.EXPERTS, -1).any(1)
    assert float(used.float().mean()) > 0.9


def test_records_hold_both_clocks_and_their_ratio(tmp_path: Path) -> None:
    ((wall, cpu),) = sparse_step.rows([(128, 64)], layers=1, length=32, seconds=0.0)
    assert (wall.name, cpu.name) == ("train_step", "train_step_cpu_time")
    for record in (wall, cpu):
        assert record.peer_value is not None
        assert record.ratio is not None
        assert record.ratio == pytest.approx(record.peer_value / record.value, rel=1.0)
        assert record.params["rounds"] == sparse_step.MIN_ROUNDS
        assert record.params["threads"] == torch.get_num_threads()
    write_records(tmp_path / "r.json", [wall, cpu])
    kept = json.loads((tmp_path / "r.json").read_text())
    assert [r["value"] for r in kept] == [wall.value, cpu.value]
    assert kept[0].keys() >= {"params", "unit", "peer_value", "ratio", "versions", "machine"}
