"""Prefix caching and priorities in the whole engine: the output stays the naive generate's."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError, InvalidRequest
from engine.model.decoder import Decoder, generate
from engine.policy import ExpertPolicy
from engine.serving.engine import Engine
from engine.serving.request import Request, SamplingParams, Usage
from tests.engine.conftest import serve

MakeEngine = Callable[..., Engine]
Oracle = Callable[[Request], list[int]]

POLICIES = [ExpertPolicy.dense(), ExpertPolicy.top_k(2), ExpertPolicy.mass(0.7)]
DENSE = POLICIES[0]


@pytest.fixture(scope="session")
def oracle(reference: Decoder) -> Oracle:
    """The naive continuation of a request, each computed once."""
    known: dict[tuple[ExpertPolicy, tuple[int, ...]], list[int]] = {}

    def continuation(request: Request) -> list[int]:
        key = request.policy, tuple(request.prompt_ids)
        new = request.sampling.max_new_tokens
        if len(known.get(key, [])) < new:
            known[key] = generate(reference, request.prompt_ids, new, request.policy)
        return known[key][:new]

    return continuation


def usages(
    engine: Engine, arrivals: Iterable[tuple[int, Request]], aborts: dict[str, int] | None = None
) -> dict[str, Usage]:
    """`serve`; the usage of each request, reported exactly once."""
    found = {
        name: [event.usage for event in events if event.usage]
        for name, events in serve(engine, arrivals, aborts).items()
    }
    assert all(len(usage) == 1 for usage in found.values())
    return {name: usage for name, [usage] in found.items()}


def test_a_conversation_computes_each_turn_once(make_engine: MakeEngine, oracle: Oracle) -> None:
    """Turns that repeat what was said, in three policies by turns that share nothing."""
    engine, chance = make_engine(max_num_batched_tokens=9, max_num_seqs=4), random.Random(5)
    for policy in POLICIES:
        said = [chance.randrange(1, 300) for _ in range(21)]
        computed = 0
        for turn in range(4):
            request = engine.make_request(said, SamplingParams(max_new_tokens=6), policy)
            usage = usages(engine, [(0, request)])[request.request_id]
            assert request.output_ids == oracle(request)
            # All computed tokens so far, in whole blocks: the last drawn one never was.
            assert usage.cached_prompt_tokens == computed // 4 * 4
            tokens = len(request.token_ids) - 1 - usage.cached_prompt_tokens
            assert usage.experts_available == tokens * 2 * 8
            computed = len(request.token_ids) - 1
            said = request.token_ids + [chance.randrange(1, 300) for _ in range(turn)]
    numbers = engine.stats.snapshot()
    assert 0 < numbers.prefix_hit_tokens < numbers.prefix_queried_tokens


def test_a_shared_output_stays_out_of_the_cache(make_engine: MakeEngine) -> None:
    """Its prompt is that of `top_k`, and found as such; its output came from its company."""
    shared, own = ExpertPolicy.shared(3), ExpertPolicy.top_k(3)
    said, sampling = [chance % 290 + 1 for chance in range(7, 300, 17)], SamplingParams(14)
    assert len(said) == 18

    def cached(engine: Engine, prompt: list[int], policy: ExpertPolicy) -> int:
        request = engine.make_request(prompt, sampling, policy)
        usage = usages(engine, [(0, request)])[request.request_id]
        return usage.cached_prompt_tokens

    engine = make_engine()
    first = engine.make_request(said, sampling, shared)
    usages(engine, [(0, first)])
    assert len(first.token_ids) == 32
    assert cached(engine, first.token_ids, ExpertPolicy.dense()) == 0
    assert cached(engine, first.token_ids, own) == 16
    # Now that top_k computed the same tokens, they are there for both.
    assert cached(engine, first.token_ids, shared) == 28

    engine = make_engine()
    usages(engine, [(0, engine.make_request(said, sampling, shared))])
    assert cached(engine, first.token_ids, shared) == 16


def test_sampled_tokens_do_not_depend_on_the_cache(make_engine: MakeEngine) -> None:
    engine, prompt = make_engine(), list(range(10, 40))
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, seed=4)
    cold, warm = (engine.generate([prompt], sampling, DENSE)[0] for _ in range(2))
    assert cold.usage is not None
    assert warm.usage is not None
    assert (cold.usage.cached_prompt_tokens, warm.usage.cached_prompt_tokens) == (0, 28)
    assert warm.token_ids == cold.token_ids
    for ours, theirs in zip(warm.tokens, cold.tokens, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_prompt_logprobs_are_complete_with_a_warm_cache(make_engine: MakeEngine) -> None:
    engine, prompt = make_engine(), list(range(10, 40))
    sampling = SamplingParams(max_new_tokens=2, prompt_logprobs=True)
    cold, warm = (engine.generate([prompt], sampling, DENSE)[0] for _ in range(2))
    assert warm.usage is not None
    assert warm.usage.cached_prompt_tokens == 0
    for ours, theirs in zip(warm.prompt[1:], cold.prompt[1:], strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_priorities_reach_the_scheduler(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1)
    sampling = SamplingParams(max_new_tokens=1)
    requests = [
        engine.make_request("the cat", sampling, DENSE, request_id=str(priority), priority=priority)
        for priority in (127, 0, -128)
    ]
    assert list(usages(engine, [(0, request) for request in requests])) == ["-128", "0", "127"]
    with pytest.raises(InvalidRequest, match="priority must be from -128 to 127, got 128"):
        engine.make_request("the cat", sampling, DENSE, priority=128)
    assert engine.stats.snapshot().rejected["invalid"] == 1


def test_an_important_request_interrupts_without_a_trace(
    make_engine: MakeEngine, oracle: Oracle
) -> None:
    engine = make_engine(max_num_seqs=1)
    sampling = SamplingParams(max_new_tokens=12)
    low = engine.make_request("the cat sat on the mat", sampling, DENSE, priority=1)
    high = engine.make_request("the dog", sampling, DENSE)
    usages(engine, [(0, low), (5, high)])
    assert (low.preemptions, high.preemptions) == (1, 0)
    assert high.last_token is not None
    assert low.last_token is not None
    assert high.last_token < low.last_token
    assert (low.output_ids, high.output_ids) == (oracle(low), oracle(high))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"prefix_caching": "no"}, "prefix_caching must be true or false, got 'no'"),
        ({"priority_age_seconds": 0.0}, "priority_age_seconds must be between 0.001 and 86400"),
        ({"priority_age_seconds": float("nan")}, "priority_age_seconds must be between"),
    ],
)
def test_settings_are_checked(
    make_engine: MakeEngine, values: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make_engine(**values)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.integers(0, 20),  # arrives at this step
            st.integers(0, 1),  # begins with this shared prefix
            st.integers(0, 18),  # cut here
            st.integers(1, 3),  # tokens of its own: one of three, so that these are shared too
            st.sampled_from([1, 4, 8]),  # new tokens
            st.sampled_from(POLICIES),
            st.sampled_from([0, 0, -1, 5]),  # priority
            st.none() | st.none() | st.integers(0, 25),  # aborted at this step
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(8, 16),
    st.integers(1, 5),
    st.integers(0, 12),
)
def test_any_traffic_equals_the_naive_generate(
    make_engine: MakeEngine,
    oracle: Oracle,
    traffic: list[tuple[int, int, int, int, int, ExpertPolicy, int, int | None]],
    blocks: int,
    seats: int,
    spare: int,
) -> None:
    """Token for token, with shared prefixes, mixed policies, preemptions and aborts."""
    engine = make_engine(blocks, max_num_seqs=seats, max_num_batched_tokens=seats + spare)
    arrivals, aborts = [], {}
    for at, prefix, cut, own, new, policy, priority, abort_at in traffic:
        chance = random.Random(prefix)
        prompt = [chance.randrange(1, 300) for _ in range(18)][:cut] + [own] * own
        sampling = SamplingParams(max_new_tokens=new)
        request = engine.make_request(prompt, sampling, policy, priority=priority)
        arrivals.append((at, request))
        if abort_at is not None:
            aborts[request.request_id] = abort_at
    found = usages(engine, arrivals, aborts)
    assert len(found) == len(traffic)
    for _, request in arrivals:
        expected = oracle(request)
        if request.finish_reason == "abort":
            assert request.output_ids == expected[: request.num_output]
        else:
            assert request.output_ids == expected
    first = sum(usage.cached_prompt_tokens for usage in found.values())
    assert engine.stats.snapshot().prefix_hit_tokens == first
