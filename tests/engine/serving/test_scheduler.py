"""The scheduler against a simulated model: order, budgets, preemption, conservation of blocks, and
what each request would find in the cache."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.errors import InvalidRequest, Overloaded
from engine.policy import ExpertPolicy
from engine.serving.kv_blocks import BlockAllocator
from engine.serving.request import Request, SamplingParams, Status
from engine.serving.scheduler import Plan, Scheduler

DENSE, SPARSE = ExpertPolicy.dense(), ExpertPolicy.top_k(1)


def request(name: str, prompt: int = 4, new: int = 4, priority: int = 0) -> Request:
    """A request whose prompt no other has."""
    token = int.from_bytes(name.encode()[:6], "big")
    sampling = SamplingParams(max_new_tokens=new)
    return Request(name, [token] * prompt, sampling, DENSE, priority=priority)


def sharing(name: str, prompt: list[int], policy: ExpertPolicy = DENSE, new: int = 4) -> Request:
    return Request(name, list(prompt), SamplingParams(max_new_tokens=new), policy)


class Clock:
    """Time that stands still until it is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def scheduler(
    blocks: int = 100, clock: Callable[[], float] | None = None, **config: float
) -> Scheduler:
    defaults = EngineConfig(block_size=4, max_num_batched_tokens=64)
    engine_config = dataclasses.replace(defaults, **config)  # type: ignore[arg-type]  # numbers
    allocator = BlockAllocator(blocks, engine_config.block_size)
    return Scheduler(engine_config, allocator, 1 << 20, clock or Clock())


def next_token(token_ids: list[int]) -> int:
    """What the simulated model says: equal prefixes go on equally."""
    return 1 + sum(token_ids) % 3


def step(line: Scheduler) -> Plan:
    """One step of a model that always answers; finishes requests that are complete."""
    plan = line.schedule()
    line.check_integrity()
    line.advance(plan)
    for scheduled in plan:
        done = scheduled.request
        if not done.num_uncomputed:
            done.token_ids.append(next_token(done.token_ids))
            if len(done.token_ids) == done.max_len:
                line.finish(done)
    line.check_integrity()
    return plan


def run_until_idle(line: Scheduler) -> list[list[tuple[str, int]]]:
    plans = []
    while line.has_work:
        plans.append(shape(step(line)))
        assert len(plans) < 5000, "no progress"
    return plans


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


def test_without_prefix_caching_a_preempted_request_computes_its_output_again() -> None:
    line = scheduler(blocks=5, prefix_caching=False)
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


def test_requests_that_can_never_fit_are_refused_alone() -> None:
    line = scheduler(blocks=2)
    line.add(request("fits", 4, 4))
    step(line)
    with pytest.raises(InvalidRequest, match="at most 8, got 5 \\+ 4"):
        line.add(request("long", 5, 4))
    assert "long" not in line
    assert run_until_idle(line) == [[("fits", 1)]] * 3


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


# --- fairness -------------------------------------------------------------------------------------


def test_a_flood_of_short_requests_does_not_starve_a_long_prompt() -> None:
    """It gets what decodes leave of the budget before any later prompt does: 1 token at least."""
    line = scheduler(max_num_seqs=4, max_num_batched_tokens=4)
    long = request("long", 40, 1)
    for number in range(3):
        line.add(request(f"s{number}", 1, 6))
    line.add(long)
    for number in range(3, 200):
        before = long.num_computed
        line.add(request(f"s{number}", 1, 6))
        step(line)
        if long.status is Status.RUNNING:
            assert long.num_computed > before
        if long.status is Status.FINISHED:
            break
    assert long.status is Status.FINISHED
    assert line.waiting, "the flood ended first"


def test_a_long_prompt_does_not_stall_decodes() -> None:
    """Every decoding request is in every plan, and no plan exceeds the budget."""
    line = scheduler(max_num_seqs=8, max_num_batched_tokens=10)
    decoding = [request(name, 1, 30) for name in "abc"]
    for added in decoding:
        line.add(added)
    step(line)
    line.add(request("long", 100, 1))
    for _ in range(15):
        plan = shape(step(line))
        assert plan == [("a", 1), ("b", 1), ("c", 1), ("long", plan[-1][1])]
        assert plan[-1][1] in (7, 100 % 7)


# --- priorities -----------------------------------------------------------------------------------


def test_lower_values_come_first_and_equals_in_order_of_arrival() -> None:
    line = scheduler(max_num_seqs=1)
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -5), ("e", 0)):
        line.add(request(name, 1, 1, priority))
    assert [name for [(name, _)] in run_until_idle(line)] == ["d", "b", "e", "a", "c"]


@pytest.mark.parametrize("priority", [-129, 128])
def test_priorities_are_bounded(priority: int) -> None:
    with pytest.raises(InvalidRequest, match=f"priority must be from -128 to 127, got {priority}"):
        request("a", priority=priority)


def test_waiting_outweighs_priority() -> None:
    """An endless flood of important requests overtakes for a bounded time."""
    clock = Clock()
    line = scheduler(clock=clock, max_num_seqs=1, priority_age_seconds=10.0)
    line.add(request("low", 1, 1, 5))
    served = []
    for second in range(100):
        clock.now = float(second)
        line.add(request(f"f{second}", 1, 1, 0))
        served += [name for name, _ in shape(step(line))]
    assert served.index("low") == 50  # five steps of priority are worth 50 seconds
    assert served[:50] == [f"f{second}" for second in range(50)]


def test_the_last_in_line_yields_not_the_youngest() -> None:
    line = scheduler(blocks=5)
    low, high = request("low", 4, 14, 1), request("high", 4, 14, 0)
    line.add(low)
    step(line)
    line.add(high)
    while not line.preemptions:
        step(line)
    assert (low.preemptions, high.preemptions) == (1, 0)
    run_until_idle(line)
    assert high.preemptions == 0


def test_an_important_request_takes_the_seat_of_the_last() -> None:
    line = scheduler(max_num_seqs=2)
    for name, priority in (("a", 0), ("b", 1)):
        line.add(request(name, 8, 20, priority))
    step(line)
    line.add(request("c", 1, 2, 0))
    assert shape(step(line)) == [("a", 1), ("c", 1)]
    assert [waiting.request_id for waiting in line.waiting] == ["b"]
    step(line)
    assert shape(step(line)) == [("a", 1), ("b", 1)]  # its 8 tokens were still in the cache


def test_an_important_request_takes_the_blocks_of_the_last() -> None:
    line = scheduler(blocks=10)
    for name, priority in (("a", 2), ("b", 3), ("c", 1)):
        line.add(request(name, 8, 8, priority))
    step(line)
    line.add(request("d", 12, 1, 0))
    assert shape(step(line)) == [("c", 1), ("a", 1), ("d", 12)]
    assert [waiting.request_id for waiting in line.waiting] == ["b"]


def test_nobody_yields_to_an_equal_or_in_vain() -> None:
    line = scheduler(blocks=10, max_num_seqs=2)
    for name, priority in (("a", -1), ("b", 1)):
        line.add(request(name, 16, 8, priority))
    step(line)
    line.add(request("equal", 1, 1, 1))
    line.add(request("big", 24, 1, 0))  # with b's blocks there would be 6 for its 6, and 1 for a
    for _ in range(3):
        assert shape(step(line)) == [("a", 1), ("b", 1)]
    assert line.preemptions == 0


# --- prefix caching -------------------------------------------------------------------------------


def test_a_known_prefix_is_not_computed_again() -> None:
    line = scheduler()
    line.add(sharing("a", [1, 2, 3, 4, 5, 6, 7, 8, 9]))
    step(line)
    line.add(sharing("b", [1, 2, 3, 4, 5, 6, 7, 8, 10, 11]))
    line.add(sharing("c", [1, 2, 3, 4, 5, 6, 7, 9, 9, 9]))
    line.add(sharing("d", [0, 2, 3, 4, 5, 6, 7, 8]))
    line.add(sharing("e", [1, 2, 3, 4, 5, 6, 7, 8], SPARSE))
    plan = step(line)
    assert shape(plan) == [("a", 1), ("b", 2), ("c", 6), ("d", 8), ("e", 8)]
    a, b, c = (entry.request.blocks for entry in plan[:3])
    assert (b[:2], c[:1]) == (a[:2], a[:1])
    assert len({*a, *b, *c}) == len(a + b + c) - 3
    assert [entry.request.cached_prompt_tokens for entry in plan] == [0, 8, 4, 0, 0]
    assert (line.prefix_hit_tokens, line.prefix_queried_tokens) == (12, 9 + 10 + 10 + 8 + 8)


def test_a_finished_request_s_output_is_known_too() -> None:
    line = scheduler()
    first = sharing("a", [1, 2, 3], new=6)
    line.add(first)
    run_until_idle(line)
    line.add(sharing("b", [*first.token_ids, 5]))
    assert shape(step(line)) == [("b", 2)]  # 8 of its 10 tokens are two full blocks


def test_one_token_is_always_computed() -> None:
    line = scheduler()
    for name in "ab":
        line.add(sharing(name, [1] * 8))
        run_until_idle(line)
    line.add(sharing("c", [1] * 8))
    assert shape(step(line)) == [("c", 4)]


def test_blocks_are_known_after_their_step_not_before() -> None:
    line = scheduler()
    line.add(sharing("a", [1] * 9))
    line.add(sharing("b", [1] * 9))
    plan = step(line)
    assert shape(plan) == [("a", 9), ("b", 9)]
    assert not {*plan[0].request.blocks} & {*plan[1].request.blocks}


def test_prompts_whose_logits_are_wanted_are_computed() -> None:
    line = scheduler(blocks=8)
    line.add(sharing("a", [1] * 9))
    run_until_idle(line)
    sampling = SamplingParams(max_new_tokens=8, prompt_logprobs=True)
    wanting = Request("b", [1] * 9, sampling, DENSE)
    line.add(wanting)
    assert shape(step(line)) == [("b", 9)]
    line._preempt(wanting)
    assert shape(step(line)) == [("b", 2)], "its prompt's are known by now"
    assert line.prefix_queried_tokens == 9, "only a's was looked up"
    run_until_idle(line)


def test_prefix_caching_can_be_switched_off() -> None:
    line = scheduler(prefix_caching=False)
    for name in "ab":
        line.add(sharing(name, [1] * 9))
        assert run_until_idle(line)[0] == [(name, 9)]
    assert (line.allocator.num_cached, line.prefix_queried_tokens) == (0, 0)


def test_a_preempted_request_finds_its_blocks_again() -> None:
    """Unless they were taken meanwhile."""
    line = scheduler(blocks=6)
    first, second = request("a", 4, 13), request("b", 4, 13)
    line.add(first)
    line.add(second)
    while not second.preemptions:
        step(line)
    known = len(second.token_ids)
    assert known == 13  # 3 full blocks, of which a took one
    line.abort("a")
    assert shape(step(line)) == [("b", known - 8)]
    assert (second.cached_prompt_tokens, line.prefix_hit_tokens) == (0, 0), "counted once, at first"


def test_hashes_are_computed_once() -> None:
    line = scheduler(blocks=12)
    made = request("a", 17, 6)
    line.add(made)
    step(line)
    keys = list(made.block_keys)
    assert len(keys) == 4
    line._preempt(made)
    step(line)
    assert [id(key) for key in made.block_keys[:4]] == [id(key) for key in keys]
    run_until_idle(line)
    assert len(made.block_keys) == 22 // 4


# --- any traffic ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """A request of the traffic: a shared prefix, cut somewhere, and tokens of its own."""

    at: int
    prefix: int
    cut: int
    own: list[int]
    new: int
    policy: ExpertPolicy
    priority: int
    prompt_logprobs: bool
    abort_at: int | None

    def request(self, name: str) -> Request:
        prompt = ([self.prefix] * self.cut + self.own) or [self.prefix]
        sampling = SamplingParams(max_new_tokens=self.new, prompt_logprobs=self.prompt_logprobs)
        return Request(name, prompt, sampling, self.policy, priority=self.priority)


arrivals = st.lists(
    st.builds(
        Arrival,
        at=st.integers(0, 15),
        prefix=st.integers(0, 1),
        cut=st.integers(0, 20),
        own=st.lists(st.integers(0, 1), max_size=4),
        new=st.integers(1, 12),
        policy=st.sampled_from([DENSE, SPARSE]),
        priority=st.sampled_from([0, 0, 0, -1, 1, -128, 127]),
        prompt_logprobs=st.sampled_from([False, False, False, True]),
        abort_at=st.none() | st.integers(0, 40),
    ),
    min_size=1,
    max_size=12,
)

LONGEST = 20 + 4 + 12

Slot = tuple[ExpertPolicy, tuple[int, ...]]


@dataclass
class SimulatedCache:
    """What a model would have written where: policy and tokens of the sequence up to that slot."""

    block_size: int
    slots: dict[tuple[int, int], Slot] = field(default_factory=dict)
    computed: Counter[str] = field(default_factory=Counter)  # tokens, since the last admission

    def run(self, plan: Plan) -> None:
        """Compute a plan: read every context before the step's writes, and again after them."""
        for running, _ in plan:
            self.read(running, running.num_computed)
        for running, tokens in plan:
            self.write(running, tokens)
        for running, tokens in plan:
            self.read(running, running.num_computed + tokens)

    def write(self, running: Request, tokens: int) -> None:
        name, first = running.request_id, running.num_computed
        for position in range(first, first + tokens):
            content = running.policy, tuple(running.token_ids[: position + 1])
            self.slots[self.place(running, position)] = content
        self.computed[name] = tokens + (self.computed[name] if first else 0)
        if running.sampling.prompt_logprobs and not running.num_output:
            assert self.computed[name] == first + tokens, "logits of the prompt are missing"

    def read(self, running: Request, context: int) -> None:
        for position in range(context):
            content = running.policy, tuple(running.token_ids[: position + 1])
            assert self.slots[self.place(running, position)] == content, "not its own prefix"

    def place(self, running: Request, position: int) -> tuple[int, int]:
        return running.blocks[position // self.block_size], position % self.block_size


def check_sharing(running: list[Request], block_size: int) -> None:
    """A block has several owners only as the same full block of the same sequence."""
    contents: defaultdict[int, list[Slot]] = defaultdict(list)
    for owner in running:
        for index, block in enumerate(owner.blocks):
            known = tuple(owner.token_ids[: (index + 1) * block_size])
            contents[block].append((owner.policy, known))
    for shared in contents.values():
        if len(shared) > 1:
            assert len(set(shared)) == 1
            assert len(shared[0][1]) % block_size == 0


@settings(max_examples=200)
@given(
    arrivals,
    st.integers(0, 30),
    st.integers(1, 6),
    st.integers(0, 20),
    st.integers(1, 5),
    st.booleans(),
)
def test_any_traffic_ends(
    traffic: list[Arrival],
    spare_blocks: int,
    seats: int,
    spare: int,
    block_size: int,
    caching: bool,
) -> None:
    """Every request ends once, with all its tokens, in bounded time, on keys and values of its own
    prefix alone; the first in line always advances, and the budget is kept."""
    clock, cache = Clock(), SimulatedCache(block_size)
    line = scheduler(
        -(-LONGEST // block_size) + spare_blocks,
        clock,
        max_num_seqs=seats,
        max_num_batched_tokens=seats + spare,
        block_size=block_size,
        prefix_caching=caching,
        priority_age_seconds=3.0,
    )
    requests = [arrival.request(str(i)) for i, arrival in enumerate(traffic)]
    ends: Counter[str] = Counter()
    aborted: set[str] = set()
    while clock.now <= 40 or line.has_work:
        for made, arrival in zip(requests, traffic, strict=True):
            if arrival.at == clock.now:
                line.add(made)
            if arrival.abort_at == clock.now and line.abort(made.request_id):
                aborted.add(made.request_id)
                ends[made.request_id] += 1
        first = min((*line.running, *line.waiting), key=lambda r: r.rank, default=None)
        decoding = [r for r in line.running if r.num_uncomputed == 1]
        plan = line.schedule()
        line.check_integrity()
        check_sharing(line.running, block_size)
        planned = {entry.request.request_id: entry.num_tokens for entry in plan}
        assert len(planned) == len(plan)
        assert first is None or first.request_id in planned, "the first in line stands still"
        assert all(r.request_id in planned for r in decoding if r.status is Status.RUNNING)
        assert sum(planned.values()) <= seats + spare
        assert len(line.running) <= seats
        assert min(planned.values(), default=1) >= 1
        cache.run(plan)
        line.advance(plan)
        for done, _ in plan:
            if not done.num_uncomputed:
                done.token_ids.append(next_token(done.token_ids))
                if len(done.token_ids) == done.max_len:
                    line.finish(done)
                    ends[done.request_id] += 1
        line.check_integrity()
        clock.now += 1
        assert clock.now < 5000, "no progress"
    assert ends == Counter(made.request_id for made in requests)
    for made in requests:
        assert made.status is Status.FINISHED
        assert made.request_id in aborted or len(made.token_ids) == made.max_len
    assert line.allocator.num_used == 0
    if not caching:
        assert line.prefix_hit_tokens == 0


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
