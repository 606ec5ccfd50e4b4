"""The engine against the naive `generate`, and its promises under any traffic."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.errors import ConfigError, InvalidRequest, Overloaded
from engine.model.decoder import Decoder, generate
from engine.policy import ExpertPolicy
from engine.serving.engine import Engine
from engine.serving.output import StopMatcher
from engine.serving.request import Request, SamplingParams, TokenEvent
from tests.engine.conftest import serve

MakeEngine = Callable[..., Engine]

POLICIES = [
    ExpertPolicy.dense(),
    ExpertPolicy.top_k(1),
    ExpertPolicy.top_k(3),
    ExpertPolicy.top_k(8),
    ExpertPolicy.mass(0.5),
    ExpertPolicy.mass(0.9),
]
DENSE = ExpertPolicy.dense()


def check_events(request: Request, events: Sequence[TokenEvent]) -> None:
    """Exactly one terminal event, the last; indices count up; usage agrees."""
    assert [event.finish_reason is not None for event in events[:-1]] == [False] * (len(events) - 1)
    last = events[-1]
    assert last.finish_reason is not None
    assert last.usage is not None
    tokens = [event for event in events if event.token is not None]
    assert [event.index for event in tokens] == list(range(len(tokens)))
    assert [event.token.token_id for event in tokens if event.token] == request.output_ids
    assert last.usage.generated_tokens == len(tokens)
    assert last.usage.prompt_tokens == request.prompt_len
    assert all(event.usage is None for event in events[:-1])


def text_of(events: Sequence[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def random_prompt(chance: random.Random, length: int) -> list[int]:
    return [chance.randrange(1, 300) for _ in range(length)]


# --- equal to the naive generate ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "config"),
    [
        (0, {"max_num_batched_tokens": 512}),
        (60, {"max_num_batched_tokens": 13, "max_num_seqs": 8}),
        (15, {"max_num_batched_tokens": 64, "max_num_seqs": 32, "block_size": 4}),
    ],
    ids=["roomy", "small chunks", "preempting"],
)
def test_equals_the_naive_generate(
    make_engine: MakeEngine, reference: Decoder, blocks: int, config: dict[str, int]
) -> None:
    """32 requests of every policy, arriving at different steps, token for token."""
    chance = random.Random(7)
    engine = make_engine(blocks, **config)
    arrivals = [
        (
            chance.randrange(25),
            engine.make_request(
                random_prompt(chance, chance.choice([1, 2, 4, 5, 13, 30])),
                SamplingParams(max_new_tokens=chance.randrange(1, 21)),
                POLICIES[number % len(POLICIES)],
            ),
        )
        for number in range(32)
    ]
    events = serve(engine, arrivals)
    for _, request in arrivals:
        check_events(request, events[request.request_id])
        expected = generate(
            reference, request.prompt_ids, request.sampling.max_new_tokens, request.policy
        )
        assert request.output_ids == expected
    preempted = sum(request.preemptions for _, request in arrivals)
    assert engine.stats.snapshot().preemptions == preempted
    assert (preempted > 0) == (blocks == 15)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.integers(0, 15),  # arrives at this step
            st.integers(1, 20),  # prompt tokens
            st.integers(1, 10),  # new tokens
            st.sampled_from(POLICIES),
            st.none() | st.integers(0, 25),  # aborted at this step
        ),
        min_size=1,
        max_size=8,
    ),
    st.integers(8, 14),
    st.integers(1, 5),
    st.integers(0, 12),
)
def test_any_traffic_keeps_the_promises(
    make_engine: MakeEngine,
    traffic: list[tuple[int, int, int, ExpertPolicy, int | None]],
    blocks: int,
    seats: int,
    spare: int,
) -> None:
    """Each request ends once; sampled output does not depend on company, chunks, preemption."""
    engine = make_engine(blocks, max_num_seqs=seats, max_num_batched_tokens=seats + spare)
    chance = random.Random(3)
    arrivals, aborts = [], {}
    for number, (at, prompt, new, policy, abort_at) in enumerate(traffic):
        sampling = SamplingParams(max_new_tokens=new, temperature=1.0, top_p=0.9, seed=number)
        request = engine.make_request(random_prompt(chance, prompt), sampling, policy)
        arrivals.append((at, request))
        if abort_at is not None:
            aborts[request.request_id] = abort_at
    events = serve(engine, arrivals, aborts)
    quiet = make_engine()
    finished = engine.stats.snapshot().finished
    assert sum(finished.values()) == len(traffic)
    for _, request in arrivals:
        check_events(request, events[request.request_id])
        alone = quiet.generate([request.prompt_ids], request.sampling, request.policy)[0]
        assert request.output_ids == alone.token_ids[: request.num_output]
        if request.finish_reason != "abort":
            assert request.output_ids == alone.token_ids
            assert text_of(events[request.request_id]) == alone.text


def test_seeds(make_engine: MakeEngine) -> None:
    """The same seed gives the same text, different or drawn ones another; all are reported."""
    engine = make_engine()
    sampling = SamplingParams(max_new_tokens=12, temperature=1.5)
    one, two = engine.generate(["the cat"] * 2, sampling)
    assert one.token_ids != two.token_ids
    for drawn in (one, two):
        assert drawn.usage is not None
        again = dataclasses.replace(sampling, seed=drawn.usage.seed)
        assert engine.generate(["the cat"], again)[0].token_ids == drawn.token_ids
    greedy = engine.generate(["the cat"], SamplingParams(max_new_tokens=1))[0]
    assert greedy.usage is not None
    assert greedy.usage.seed is None


# --- ends -----------------------------------------------------------------------------------------


def test_end_of_text_counts_and_is_silent(checkpoint: Checkpoint, make_engine: MakeEngine) -> None:
    prompt, sampling = "the dog", SamplingParams(max_new_tokens=10)
    free = make_engine().generate([prompt], sampling, DENSE)[0]
    eos = next(t for i, t in enumerate(free.token_ids) if i >= 2 and t not in free.token_ids[:i])
    length = free.token_ids.index(eos) + 1
    config = dataclasses.replace(checkpoint.config, eos_token_id=eos)
    engine = Engine(dataclasses.replace(checkpoint, config=config), EngineConfig())
    ended = engine.generate([prompt], sampling, DENSE)[0]
    assert (ended.finish_reason, ended.token_ids) == ("eos_token", free.token_ids[:length])
    assert ended.text == engine.tokenizer.decode(free.token_ids[: length - 1])
    ignoring = dataclasses.replace(sampling, ignore_eos=True)
    on = engine.generate([prompt], ignoring, DENSE)[0]
    assert (on.finish_reason, on.token_ids) == ("length", free.token_ids)


def test_length_flushes_half_a_character(make_engine: MakeEngine) -> None:
    engine = make_engine()
    results = engine.generate(
        [[i] for i in range(1, 120)], SamplingParams(max_new_tokens=3, ignore_eos=True), DENSE
    )
    half = 0
    for result in results:
        whole = engine.tokenizer.decode(result.prompt_ids + result.token_ids)
        assert whole.endswith(result.text)
        half += result.text.endswith("\ufffd")
    assert half, "no output of this model ends inside a character"


def reference_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Character by character: the text up to the first moment at which a stop string ends it."""
    for end in range(1, len(text) + 1):
        if any(text[:end].endswith(stop) for stop in stops):
            return text[:end], True
    return text, False


@settings(max_examples=300)
@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
)
def test_stop_matcher(pieces: list[str], stops: list[str]) -> None:
    matcher, emitted, stopped = StopMatcher(stops), "", False
    expected, expected_stop = reference_stop("".join(pieces), stops)
    for number, piece in enumerate(pieces):
        text, stopped = matcher.push(piece)
        emitted += text
        assert expected.startswith(emitted), "text was shown that is cut later"
        if stopped:
            assert any(text.endswith(stop) for stop in stops), "the stop string came in parts"
            break
        so_far = "".join(pieces[: number + 1])
        held = so_far[len(emitted) :]
        assert all(len(held) < len(stop) for stop in stops if stop.startswith(held)) or not held
        assert not held or any(stop.startswith(held) for stop in stops), "held without a reason"
    emitted += matcher.flush()
    assert (emitted, stopped) == (expected, expected_stop)


def test_stop_strings_across_tokens(make_engine: MakeEngine) -> None:
    """A stop string that begins in one token and ends inside another."""
    engine = make_engine()
    prompt, sampling = "the cat sat", SamplingParams(max_new_tokens=12)
    free = engine.generate([prompt], sampling, DENSE)[0]
    tokens = [token.text for token in free.tokens]
    checked = 0
    for first in range(len(free.text) - 3):
        stop = free.text[first : first + 4]
        request = engine.make_request(prompt, dataclasses.replace(sampling, stop=(stop,)), DENSE)
        events = list(engine.run([request]))
        check_events(request, events)
        assert events[-1].finish_reason == "stop_sequence"
        assert text_of(events) == free.text[: free.text.find(stop) + 4]
        assert events[-1].text.endswith(stop)
        checked += sum(stop in token for token in tokens) == 0
    assert checked, "every stop string lay inside one token"


def test_stop_tokens_end_without_text(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompt, sampling = "the dog", SamplingParams(max_new_tokens=10)
    free = engine.generate([prompt], sampling, DENSE)[0]
    stop = next(t for i, t in enumerate(free.token_ids) if i >= 2 and t not in free.token_ids[:i])
    length = free.token_ids.index(stop) + 1
    ending = dataclasses.replace(sampling, stop_token_ids=(299, stop), ignore_eos=True)
    request = engine.make_request(prompt, ending, DENSE)
    events = list(engine.run([request]))
    check_events(request, events)
    assert events[-1].finish_reason == "stop_sequence"
    assert request.output_ids == free.token_ids[:length]
    assert text_of(events) == engine.tokenizer.decode(free.token_ids[: length - 1])


def test_the_end_of_text_as_a_stop_token(make_engine: MakeEngine) -> None:
    """It ends the output even of who ignores it otherwise, then as a stop token."""
    sampling = SamplingParams(max_new_tokens=9, logit_bias=((0, 100.0),))
    for stop, ignore, reason, length in [
        ((), False, "eos_token", 1),
        ((0,), False, "eos_token", 1),
        ((0,), True, "stop_sequence", 1),
        ((), True, "length", 9),
    ]:
        asked = dataclasses.replace(sampling, stop_token_ids=stop, ignore_eos=ignore)
        result = make_engine().generate(["the"], asked, DENSE)[0]
        assert (result.finish_reason, result.token_ids, result.text) == (reason, [0] * length, "")


@pytest.mark.parametrize("min_tokens", [0, 1, 5, 12])
def test_nothing_ends_the_output_early(make_engine: MakeEngine, min_tokens: int) -> None:
    """Neither stop strings nor tokens that end it, although all of them are likely."""
    stops = SamplingParams(
        max_new_tokens=12,
        min_tokens=min_tokens,
        temperature=2.0,
        logit_bias=((0, 8.0), (5, 8.0)),
        stop_token_ids=(5,),
        stop=("a", "e", "t"),
    )
    engine, reasons = make_engine(), set()
    for seed in range(12):
        result = engine.generate(["the cat"], dataclasses.replace(stops, seed=seed), DENSE)[0]
        reasons.add(result.finish_reason)
        assert len(result.token_ids) > min_tokens or result.finish_reason == "length"
        assert not {0, 5} & set(result.token_ids[:min_tokens])
        if result.finish_reason == "length":
            assert len(result.token_ids) == 12
        before = engine.tokenizer.decode(result.token_ids[:min_tokens])
        assert result.text.startswith(before.rstrip("\ufffd"))
    assert (reasons == {"length"}) == (min_tokens == 12)


def test_text_before_min_tokens_is_no_part_of_a_stop_string(make_engine: MakeEngine) -> None:
    engine = make_engine()
    letters = set(engine.tokenizer.encode("a b c d e f g h i j k l m n o p q r s t u v w x y z"))
    biases = tuple((token_id, 50.0) for token_id in letters)
    sampling = SamplingParams(max_new_tokens=6, temperature=2.0, logit_bias=biases, seed=1)
    free = engine.generate(["the cat sat"], sampling, DENSE)[0]
    stop = free.tokens[0].text + free.tokens[1].text
    assert free.text.count(stop) == 1
    for min_tokens, text, reason in [(0, stop, "stop_sequence"), (1, free.text, "length")]:
        asked = dataclasses.replace(sampling, stop=(stop,), min_tokens=min_tokens)
        result = engine.generate(["the cat sat"], asked, DENSE)[0]
        assert (result.text, result.finish_reason) == (text, reason)


def test_a_stop_string_that_never_completes_is_shown(make_engine: MakeEngine) -> None:
    engine = make_engine()
    sampling = SamplingParams(max_new_tokens=6)
    free = engine.generate(["the mat"], sampling, DENSE)[0]
    stop = free.text[-2:] + "\x00"
    held = engine.generate(["the mat"], dataclasses.replace(sampling, stop=(stop,)), DENSE)[0]
    assert (held.text, held.finish_reason) == (free.text, "length")


def test_abort(make_engine: MakeEngine) -> None:
    """Waiting, running and unknown requests; text that was held back comes with the last event."""
    engine = make_engine(max_num_seqs=1)
    running = engine.make_request("the", SamplingParams(max_new_tokens=50), DENSE)
    waiting = engine.make_request("the", SamplingParams(max_new_tokens=50), DENSE)
    engine.add(running)
    engine.add(waiting)
    first = engine.step()
    assert engine.abort(running.request_id)
    assert engine.abort(waiting.request_id)
    assert not engine.abort(waiting.request_id)
    assert not engine.abort("nobody")
    assert engine.has_work()
    last = engine.step()
    assert [event.finish_reason for event in last] == ["abort", "abort"]
    assert [event.index for event in last] == [1, 0]
    assert [event.token for event in last] == [None, None]
    check_events(running, [*first, last[0]])
    check_events(waiting, [last[1]])
    assert not engine.has_work()
    assert engine.stats.snapshot().aborts == 2


def test_a_failing_step_loses_no_request(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events that were made before the failure are still owed after it."""
    engine = make_engine()
    requests = [engine.make_request("the", SamplingParams(max_new_tokens=1), DENSE) for _ in "abc"]
    for request in requests:
        engine.add(request)
    take_token = engine._take_token
    calls = iter([True, False])

    def fail_second(*args: object) -> TokenEvent:
        if next(calls):
            return take_token(*args)  # type: ignore[arg-type]  # passed on as they came
        raise RuntimeError("boom")

    monkeypatch.setattr(engine, "_take_token", fail_second)
    with pytest.raises(RuntimeError, match="boom"):
        engine.step()
    events = engine.end_all("error", "it failed")
    assert [event.finish_reason for event in events] == ["length", "error", "error"]
    assert [event.request_id for event in events] == [request.request_id for request in requests]
    assert [event.error for event in events] == [None, "it failed", "it failed"]
    engine.check_integrity()
    assert engine.allocator.num_used == 0


# --- numbers that come with tokens ----------------------------------------------------------------


@pytest.mark.parametrize("batched", [3, 7, 512])
@pytest.mark.parametrize("prompt_len", [1, 2, 11])
def test_prompt_logprobs(
    make_engine: MakeEngine, reference: Decoder, batched: int, prompt_len: int
) -> None:
    """Equal to log-softmax of the model's logits, however the prompt is cut."""
    chance = random.Random(prompt_len)
    engine = make_engine(max_num_batched_tokens=batched, max_num_seqs=2)
    prompt = random_prompt(chance, prompt_len)
    policy = ExpertPolicy.top_k(3)
    sampling = SamplingParams(
        max_new_tokens=3, prompt_logprobs=True, prompt_top_n=3, top_n_tokens=2
    )
    other = engine.make_request(random_prompt(chance, 5), SamplingParams(), DENSE)
    request = engine.make_request(prompt, sampling, policy)
    events = serve(engine, [(0, other), (2, request)])[request.request_id]
    ids = torch.tensor([request.token_ids])
    with torch.inference_mode():
        logprobs_LV = reference.logits(ids, policy)[0].log_softmax(-1)
    assert [token.token_id for token in events[0].prompt] == prompt
    assert events[0].prompt[0].logprob is None
    for position, token in enumerate(events[0].prompt[1:]):
        assert token.logprob == pytest.approx(
            float(logprobs_LV[position, token.token_id]), abs=1e-4
        )
    assert all(event.prompt == event.prompt_top == () for event in events[1:])
    assert events[0].prompt_top[0] == ()
    for position, tokens in enumerate(events[0].prompt_top[1:]):
        best = logprobs_LV[position].topk(3)
        assert [token.token_id for token in tokens] == best.indices.tolist()
        logprobs = [token.logprob for token in tokens]
        assert logprobs == pytest.approx(best.values.tolist(), abs=1e-4)
    assert len(events[0].prompt_top) == prompt_len
    for number, event in enumerate(events):
        assert event.token is not None
        row_V = logprobs_LV[prompt_len - 1 + number]
        assert event.token.logprob == pytest.approx(float(row_V.max()), abs=1e-4)
        assert [t.token_id for t in event.top_tokens] == row_V.topk(2).indices.tolist()


def test_prompt_logprobs_survive_preemption(make_engine: MakeEngine) -> None:
    engine = make_engine(12, max_num_batched_tokens=6, max_num_seqs=4)
    chance = random.Random(0)
    older = engine.make_request(
        random_prompt(chance, 4), SamplingParams(max_new_tokens=40, ignore_eos=True), DENSE
    )
    sampling = SamplingParams(
        max_new_tokens=10, prompt_logprobs=True, prompt_top_n=2, ignore_eos=True
    )
    younger = engine.make_request(random_prompt(chance, 25), sampling, DENSE)
    events = serve(engine, [(0, older), (1, younger)])[younger.request_id]
    assert younger.preemptions
    quiet = make_engine().generate([younger.prompt_ids], sampling, DENSE)[0]
    assert len(events[0].prompt) == 25
    for ours, theirs in zip(events[0].prompt[1:], quiet.prompt[1:], strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    assert sum(bool(event.prompt) for event in events) == 1
    for our_top, their_top in zip(events[0].prompt_top, quiet.prompt_top, strict=True):
        assert [token.token_id for token in our_top] == [token.token_id for token in their_top]


@pytest.mark.parametrize(
    ("policy", "ratio"), [(DENSE, 1.0), (ExpertPolicy.top_k(2), 0.25), (ExpertPolicy.auto(), 0.5)]
)
def test_activated_ratio(make_engine: MakeEngine, policy: ExpertPolicy, ratio: float) -> None:
    engine = make_engine()
    request = engine.make_request("the cat sat on", SamplingParams(max_new_tokens=3), policy)
    events = list(engine.run([request]))
    assert [event.activated_ratio for event in events] == [ratio] * 3
    usage = events[-1].usage
    assert usage is not None
    tokens = request.prompt_len + 2  # the last token is drawn, not computed
    assert usage.experts_available == tokens * 2 * 8
    assert usage.activated_ratio == ratio


def test_experts_are_counted_per_request_in_a_mixed_batch(make_engine: MakeEngine) -> None:
    engine = make_engine()
    sampling = SamplingParams(max_new_tokens=4, ignore_eos=True)
    prompts = ["the cat", "on the log", "a", "mat"]
    requests = [
        engine.make_request(prompt, sampling, policy)
        for prompt, policy in zip(prompts, POLICIES[:4], strict=True)
    ]
    events = serve(engine, [(0, request) for request in requests])
    for request, share in zip(requests, [1, 1 / 8, 3 / 8, 1], strict=True):
        assert request.activated_ratio == pytest.approx(share)
        assert [e.activated_ratio for e in events[request.request_id]] == [share] * 4
    numbers = engine.stats.snapshot()
    total = sum(request.experts_activated for request in requests)
    assert sum(numbers.experts_activated) == total
    assert sum(numbers.experts_available) == sum(r.experts_available for r in requests)
    assert numbers.experts_loaded == [8 * numbers.steps] * 2  # a dense request loads all


def test_union_counts_distinct_experts(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.generate(["a"], SamplingParams(max_new_tokens=5), ExpertPolicy.top_k(2))
    numbers = engine.stats.snapshot()
    assert numbers.experts_loaded == numbers.experts_activated == [2 * numbers.steps] * 2


def test_stats(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.generate(["the", "cat"], SamplingParams(max_new_tokens=5, ignore_eos=True), DENSE)
    numbers = engine.stats.snapshot()
    assert numbers.generated_tokens == 10
    assert numbers.prompt_tokens == sum(len(engine.tokenizer.encode(p)) for p in ("the", "cat"))
    assert dict(numbers.finished) == {"length": 2}
    assert (numbers.running, numbers.waiting, numbers.kv_blocks_used) == (0, 0, 0)
    assert numbers.kv_blocks_total == engine.num_blocks
    assert numbers.inter_token_seconds.count == 8
    assert numbers.first_token_seconds.count == numbers.queue_seconds.count == 2
    assert numbers.prefill_seconds.count == numbers.decode_seconds.count == 2
    assert numbers.request_seconds.count == numbers.activated_ratio.count == 2
    assert numbers.request_generated_tokens.sum == 10
    assert numbers.batch_tokens.count == numbers.steps == 5
    numbers.first_token_seconds.observe(1.0)
    assert engine.stats.snapshot().first_token_seconds.count == 2, "a snapshot is a copy"


def test_histogram_buckets_include_their_bound(make_engine: MakeEngine) -> None:
    histogram = make_engine().stats.snapshot().batch_tokens
    for value in (1, 2, 3, 1 << 20):
        histogram.observe(value)
    assert histogram.counts[:3] == [1, 1, 1]
    assert histogram.counts[-1] == 1
    assert (histogram.count, histogram.sum) == (4, 6 + (1 << 20))


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", []])
def test_empty_prompts_are_refused(make_engine: MakeEngine, prompt: str | list[int]) -> None:
    engine = make_engine()
    with pytest.raises(InvalidRequest, match="inputs must have at least 1 token"):
        engine.make_request(prompt, SamplingParams(), DENSE)
    assert engine.stats.snapshot().rejected["invalid"] == 1


@pytest.mark.parametrize("bad", [-1, 300])
def test_token_ids_out_of_the_vocabulary_are_refused(make_engine: MakeEngine, bad: int) -> None:
    with pytest.raises(InvalidRequest, match="from 0 to 299"):
        make_engine().make_request([1, bad], SamplingParams(), DENSE)


@pytest.mark.parametrize("bad", [-1, 300])
def test_tokens_of_parameters_are_checked(make_engine: MakeEngine, bad: int) -> None:
    engine = make_engine()
    for name, sampling in [
        ("logit_bias", SamplingParams(logit_bias=((5, 1.0), (bad, 1.0)))),
        ("stop_token_ids", SamplingParams(stop_token_ids=(5, bad))),
    ]:
        with pytest.raises(InvalidRequest, match=f"token ids of {name} must be from 0 to 299"):
            engine.make_request("a", sampling, DENSE)
    assert engine.stats.snapshot().rejected["invalid"] == 2


def test_completions_of_one_prompt(make_engine: MakeEngine) -> None:
    """They differ, the first is what a single request gives, and the seed repeats them all."""
    engine = make_engine()
    sampling = SamplingParams(max_new_tokens=8, temperature=1.5, seed=3, ignore_eos=True)

    def outputs(requests: list[Request]) -> list[list[int]]:
        list(engine.run(requests))
        return [request.output_ids for request in requests]

    four = engine.make_requests("the cat", sampling, DENSE, 4, request_id="r", truncate=1)
    assert [request.request_id for request in four] == ["r-0", "r-1", "r-2", "r-3"]
    assert all(request.prompt_ids == four[0].prompt_ids[-1:] for request in four)
    drawn = outputs(four)
    assert len({tuple(output) for output in drawn}) == 4
    assert outputs([engine.make_request("the cat", sampling, DENSE, truncate=1)]) == drawn[:1]
    two = engine.make_requests("the cat", sampling, DENSE, 2, truncate=1)
    assert outputs(two) == drawn[:2]
    assert not {request.request_id for request in two} & {"r-0", "r-1"}
    # Without a seed, all are drawn anew.
    free = dataclasses.replace(sampling, seed=None)
    seeds = [
        request.seed for _ in range(2) for request in engine.make_requests("a", free, DENSE, 3)
    ]
    assert len(set(seeds)) == 6


@pytest.mark.parametrize("n", [0, 129])
def test_the_number_of_completions_is_bounded(make_engine: MakeEngine, n: int) -> None:
    engine = make_engine()
    with pytest.raises(InvalidRequest, match=f"n must be between 1 and 128, got {n}"):
        engine.make_requests("a", SamplingParams(), DENSE, n)
    assert engine.stats.snapshot().rejected["invalid"] == 1
    assert len(engine.make_requests("a", SamplingParams(), DENSE, 128)) == 128


def test_lengths_are_bounded(make_engine: MakeEngine) -> None:
    engine = make_engine()
    assert engine.max_model_len == 128
    with pytest.raises(InvalidRequest, match="at most 128, got 28 \\+ 101"):
        engine.make_request([1] * 28, SamplingParams(max_new_tokens=101), DENSE)
    engine.make_request([1] * 28, SamplingParams(max_new_tokens=100), DENSE)
    assert make_engine(5, block_size=4).max_model_len == 20


def test_the_longest_request_runs(make_engine: MakeEngine) -> None:
    for engine in (make_engine(max_num_seqs=1), make_engine(5, block_size=4)):
        new = engine.max_model_len - 1
        sampling = SamplingParams(max_new_tokens=new, ignore_eos=True)
        assert len(engine.generate([[1]], sampling, DENSE)[0].token_ids) == new


def test_sampling_may_depend_on_the_room_that_the_prompt_leaves(make_engine: MakeEngine) -> None:
    engine = make_engine()
    rooms: list[int] = []

    def sampling(room: int) -> SamplingParams:
        rooms.append(room)
        return SamplingParams(max_new_tokens=room)

    request = engine.make_request([1, 2, 3, 4], sampling, DENSE, truncate=3)
    assert rooms == [125]
    assert request.max_len == engine.scheduler.max_request_len == 128


def test_errors_name_the_prompt_as_the_caller_does(make_engine: MakeEngine) -> None:
    engine = make_engine()
    for prompt, problem in ([], "must have at least 1 token"), ([300], "must be from 0 to 299"):
        with pytest.raises(InvalidRequest, match=rf"prompt\[2\] {problem}"):
            engine.make_requests(prompt, SamplingParams(), DENSE, 2, name="prompt[2]")


def test_truncation_keeps_the_end(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request = engine.make_request([1, 2, 3, 4], SamplingParams(), DENSE, truncate=2)
    assert request.prompt_ids == [3, 4]
    assert engine.make_request([1], SamplingParams(), DENSE, truncate=9).prompt_ids == [1]
    with pytest.raises(InvalidRequest, match="truncate must be at least 1"):
        engine.make_request([1], SamplingParams(), DENSE, truncate=0)


def test_policies_are_resolved_and_validated(make_engine: MakeEngine) -> None:
    engine = make_engine()
    assert str(engine.make_request("a", SamplingParams(), ExpertPolicy.auto()).policy) == "top_k:4"
    with pytest.raises(InvalidRequest, match="oracle is for evaluation only"):
        engine.make_request("a", SamplingParams(), ExpertPolicy.oracle(2))
    with pytest.raises(InvalidRequest, match="between 1 and 8, got 9"):
        engine.make_request("a", SamplingParams(), ExpertPolicy.top_k(9))
    with pytest.raises(InvalidRequest, match=r"experts\.mass"):
        engine.make_request("a", SamplingParams(), ExpertPolicy.mass(math.nan))


def test_a_full_queue_is_counted(make_engine: MakeEngine) -> None:
    engine = make_engine(max_waiting=1)
    engine.add(engine.make_request("a", SamplingParams(), DENSE))
    with pytest.raises(Overloaded):
        engine.add(engine.make_request("a", SamplingParams(), DENSE))
    assert engine.stats.snapshot().rejected["overloaded"] == 1


def test_offline_generation_waits_for_the_queue(make_engine: MakeEngine) -> None:
    engine = make_engine(max_waiting=2, max_num_seqs=1)
    results = engine.generate(["a"] * 7, SamplingParams(max_new_tokens=2), DENSE)
    assert len({tuple(result.token_ids) for result in results}) == 1
    numbers = engine.stats.snapshot()
    assert (numbers.finished.total(), numbers.rejected.total()) == (7, 0)


def test_leaving_offline_generation_aborts(make_engine: MakeEngine) -> None:
    engine = make_engine()
    run = engine.run([engine.make_request("a", SamplingParams(), DENSE) for _ in "ab"])
    next(run)
    run.close()
    assert not engine.has_work()
    assert engine.stats.snapshot().aborts == 2
    assert engine.allocator.num_used == 0


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"kv_cache_bytes": 1 << 10, "block_size": 16}, "kv_cache_bytes must be at least 4096"),
        ({"kv_cache_bytes": 1 << 13, "max_model_len": 64}, "kv_cache_bytes must be at least 16384"),
        ({"max_model_len": 129}, "max_model_len must be at most 128"),
    ],
)
def test_impossible_configurations(
    checkpoint: Checkpoint, config: dict[str, int], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Engine(checkpoint, EngineConfig(**config))  # type: ignore[arg-type]  # ints alone


def test_the_cache_is_no_larger_than_it_can_be_used(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=3, block_size=16)
    assert engine.num_blocks == 3 * 128 // 16
