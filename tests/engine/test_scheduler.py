"""The scheduler against a simulated model: order, budgets, preemption, conservation of blocks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.errors import InvalidRequest, Overloaded
from engine.kv_blocks import BlockAllocator
from engine.request import ExpertPolicy, Request, SamplingParams, Status
from engine.scheduler import Plan, Scheduler


def request(name: str, prompt: int = 4, new: int = 4) -> Request:
    sampling = SamplingParams(max_new_tokens=new)
    return Request(name, [1] * prompt, sampling, ExpertPolicy.dense())


def scheduler(blocks: int = 100, **config: int) -> Scheduler:
    defaults = EngineConfig(block_size=4, max_num_batched_tokens=64)
    engine_config = dataclasses.replace(defaults, **config)  # type: ignore[arg-type]  # ints alone
    return Scheduler(engine_config, BlockAllocator(blocks, engine_config.block_size), 1 << 20)


def step(line: Scheduler) -> Plan:
    """One step of a model that always answers; finishes requests that are complete."""
    plan = line.schedule()
    line.check_integrity()
    line.advance(plan)
    for scheduled in plan:
        done = scheduled.request
        if not done.num_uncomputed:
            done.token_ids.append(2)
            if len(done.token_ids) == done.max_len:
                line.finish(done)
    line.check_integrity()
    return plan


def shape(plan: Plan) -> list[tuple[str, int]]:
    return [(entry.request.request_id, entry.num_tokens) for entry in plan]


def test_decodes_come_first_then_running_chunks_then_admissions() -> None:
    line = scheduler(max_num_batched_tokens=10, max_num_seqs=10)
    line.add(request("a", 4))
    assert shape(step(line)) == [("a", 4)]
    line.add(request("b", 15))
    line.add(request("c", 3))
    assert shape(step(line)) == [("a", 1), ("b", 9)]
    assert shape(step(line)) == [("a", 1), ("b", 6), ("c", 3)]
    assert shape(step(line)) == [("a", 1), ("b", 1), ("c", 1)]


def test_seats_are_limited() -> None:
    line = scheduler(max_num_seqs=2)
    for name in "abc":
        line.add(request(name, 1, 2))
    assert [name for name, _ in shape(step(line))] == ["a", "b"]
    step(line)
    assert [name for name, _ in shape(step(line))] == ["c"]


def test_nobody_overtakes_a_request_that_waits_for_blocks() -> None:
    line = scheduler(blocks=6)
    line.add(request("a", 8, 8))
    step(line)
    line.add(request("big", 16, 1))
    line.add(request("small", 1, 1))
    assert shape(step(line)) == [("a", 1)]
    assert [waiting.request_id for waiting in line.waiting] == ["big", "small"]


def test_admission_leaves_running_requests_room_to_grow() -> None:
    line = scheduler(blocks=4)
    line.add(request("a", 8, 8))
    line.add(request("b", 8, 1))  # would fit exactly, and be thrown out at once
    assert shape(step(line)) == [("a", 8)]


def test_the_youngest_yields_and_returns_to_the_head_of_the_line() -> None:
    line = scheduler(blocks=5)
    first, second, third = request("a", 4, 14), request("b", 4, 8), request("c", 4, 4)
    for added in (first, second, third):
        line.add(added)
    while not second.preemptions:
        step(line)
    assert line.running == [first]
    assert [waiting.request_id for waiting in line.waiting] == ["b", "c"]
    assert (second.num_computed, second.blocks, second.status) == (0, [], Status.WAITING)
    assert line.preemptions == 2  # c, the youngest, went before b
    while line.has_work:
        step(line)
    assert second.num_output == 8


def test_a_preempted_request_computes_its_output_again() -> None:
    line = scheduler(blocks=5)
    first, second = request("a", 4, 14), request("b", 4, 8)
    line.add(first)
    line.add(second)
    while not second.preemptions:
        step(line)
    known = len(second.token_ids)
    assert known > second.prompt_len
    while second.status is Status.WAITING:
        plan = step(line)
    assert ("b", known) in shape(plan)


def test_requests_that_can_never_fit_are_refused() -> None:
    line = scheduler(blocks=2)
    line.add(request("fits", 4, 4))
    with pytest.raises(InvalidRequest, match="at most 8, got 5 \\+ 4"):
        line.add(request("long", 5, 4))


def test_an_id_in_use_is_refused() -> None:
    line = scheduler()
    line.add(request("a"))
    with pytest.raises(InvalidRequest, match="'a' is already in use"):
        line.add(request("a"))


def test_the_queue_is_bounded_by_requests() -> None:
    line = scheduler(max_waiting=2)
    line.add(request("a"))
    line.add(request("b"))
    with pytest.raises(Overloaded, match="2 requests are waiting, at most 2 may"):
        line.add(request("c"))
    step(line)
    line.add(request("c"))


def test_the_queue_is_bounded_by_prompt_tokens() -> None:
    line = scheduler(max_waiting_tokens=10)
    line.add(request("a", 6))
    with pytest.raises(Overloaded, match="6 prompt tokens are waiting; 5 more"):
        line.add(request("b", 5))
    line.add(request("c", 4))
    line.abort("a")
    line.abort("c")
    line.add(request("larger than the bound", 11))


def test_preempted_requests_do_not_fill_the_queue() -> None:
    line = scheduler(blocks=5, max_waiting=1)
    first, second = request("a", 4, 14), request("b", 4, 8)
    line.add(first)
    step(line)
    line.add(second)
    while not second.preemptions:
        step(line)
    line.add(request("c"))
    assert (line.num_queued, line.queued_tokens, len(line.waiting)) == (1, 4, 2)


def test_abort_frees_waiting_running_and_unknown_requests() -> None:
    line = scheduler(max_num_seqs=1)
    running, waiting = request("a"), request("b")
    line.add(running)
    line.add(waiting)
    step(line)
    assert line.abort("a") is running
    assert line.abort("b") is waiting
    assert line.abort("a") is None
    assert running.status is waiting.status is Status.FINISHED
    assert line.allocator.num_used == 0
    assert not line.has_work
    assert line.schedule() == []


@dataclass(frozen=True)
class Arrival:
    at: int
    prompt: int
    new: int
    abort_at: int | None


arrivals = st.lists(
    st.builds(
        Arrival,
        at=st.integers(0, 30),
        prompt=st.integers(1, 24),
        new=st.integers(1, 12),
        abort_at=st.none() | st.integers(0, 40),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150)
@given(arrivals, st.integers(9, 24), st.integers(1, 6), st.integers(0, 20), st.integers(1, 5))
def test_any_traffic_ends(
    traffic: list[Arrival], blocks: int, seats: int, spare: int, block_size: int
) -> None:
    """Every request ends once, with all its tokens, in bounded time; the budget is kept."""
    line = scheduler(
        blocks * 4, max_num_seqs=seats, max_num_batched_tokens=seats + spare, block_size=block_size
    )
    requests = [request(str(i), a.prompt, a.new) for i, a in enumerate(traffic)]
    aborted: set[str] = set()
    now = 0
    while now <= 40 or line.has_work:
        for made, arrival in zip(requests, traffic, strict=True):
            if arrival.at == now:
                line.add(made)
            if arrival.abort_at == now and line.abort(made.request_id):
                aborted.add(made.request_id)
        had_work = line.has_work
        plan = step(line)
        assert bool(plan) == had_work, "work is left, yet the plan is empty"
        assert sum(tokens for _, tokens in plan) <= seats + spare
        assert len({entry.request.request_id for entry in plan}) == len(plan)
        assert len(line.running) <= seats
        assert all(tokens >= 1 for _, tokens in plan)
        now += 1
        assert now < 5000, "no progress"
    for made in requests:
        assert made.status is Status.FINISHED
        assert made.request_id in aborted or len(made.token_ids) == made.max_len
    assert line.allocator.num_used == 0


@settings(max_examples=50)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=8), st.integers(9, 14))
def test_first_come_first_served(prompts: list[int], blocks: int) -> None:
    """With outputs of equal length, first tokens come in order of arrival."""
    line = scheduler(blocks, max_num_seqs=8, max_num_batched_tokens=9)
    requests = [request(str(i), prompt, 10) for i, prompt in enumerate(prompts)]
    for made in requests:
        line.add(made)
    first_tokens: list[str] = []
    while line.has_work:
        for entry in step(line):
            name = entry.request.request_id
            if entry.request.num_output and name not in first_tokens:
                first_tokens.append(name)
    assert first_tokens == [made.request_id for made in requests]
