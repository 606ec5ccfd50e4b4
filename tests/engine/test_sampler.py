"""The sampler against plain references that treat one row at a time."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.request import ExpertPolicy, Request, SamplingParams
from engine.sampler import (
    Sampled,
    draw,
    filter_logits,
    penalize,
    sample,
    token_logprobs,
    uniform,
)

VOCABULARY = 40


def request(
    prompt: list[int] | None = None, output: list[int] | None = None, **sampling: object
) -> Request:
    made = Request(
        "r",
        prompt or [1, 2, 3],
        SamplingParams(**sampling),  # type: ignore[arg-type]  # checked by SamplingParams
        ExpertPolicy.dense(),
        seed=int(str(sampling.get("seed", 0))),
    )
    made.token_ids += output or []
    return made


def random_logits(rows: int, seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


# --- references: one row, plain Python ------------------------------------------------------------


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]


def kept_reference(row: list[float], params: SamplingParams) -> set[int]:
    """Tokens that the filters keep; no ties."""
    row = [value / params.temperature for value in row]
    kept = set(range(len(row)))

    def probabilities() -> dict[int, float]:
        order = sorted(kept)
        return dict(zip(order, softmax([row[i] for i in order]), strict=True))

    def until(order: list[int], mass: float) -> set[int]:
        probs, total, chosen = probabilities(), 0.0, set()
        for token in order:
            if total >= mass:
                break
            chosen.add(token)
            total += probs[token]
        return chosen

    if params.top_k:
        kept = set(sorted(kept, key=lambda i: -row[i])[: params.top_k])
    if params.top_p < 1:
        kept = until(sorted(kept, key=lambda i: -row[i]), params.top_p)
    if params.min_p > 0:
        probs = probabilities()
        kept = {i for i in kept if probs[i] >= params.min_p * max(probs.values())}
    if params.typical_p < 1:
        probs = probabilities()
        entropy = -sum(p * math.log(p) for p in probs.values())
        kept = until(
            sorted(kept, key=lambda i: abs(-math.log(probs[i]) - entropy)), params.typical_p
        )
    return kept


FILTERS = st.builds(
    SamplingParams,
    temperature=st.floats(0.2, 3.0),
    top_k=st.sampled_from([0, 1, 2, 7, VOCABULARY, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.35, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    typical_p=st.sampled_from([1.0, 0.9, 0.3]),
)


@settings(max_examples=150)
@given(st.lists(FILTERS, min_size=1, max_size=5), st.integers(0, 1000))
def test_filters_keep_what_the_reference_keeps(params: list[SamplingParams], seed: int) -> None:
    logits_BV = random_logits(len(params), seed)
    filtered_BV = filter_logits(logits_BV, params)
    for row, row_params in enumerate(params):
        kept = set(filtered_BV[row].isfinite().nonzero().flatten().tolist())
        assert kept == kept_reference(logits_BV[row].double().tolist(), row_params)
        # What is kept, is kept in proportion.
        scaled = logits_BV[row] / row_params.temperature
        difference = (filtered_BV[row] - scaled)[sorted(kept)]
        assert float(difference.max() - difference.min()) < 1e-4


@settings(max_examples=60)
@given(st.lists(FILTERS, min_size=2, max_size=6))
def test_filters_of_one_row_do_not_touch_another(params: list[SamplingParams]) -> None:
    logits_BV = random_logits(len(params))
    together = filter_logits(logits_BV, params)
    for row, row_params in enumerate(params):
        alone = filter_logits(logits_BV[row : row + 1], [row_params])
        assert torch.equal(together[row], alone[0])


def test_top_k_keeps_ties_with_the_last() -> None:
    filtered = filter_logits(
        torch.tensor([[1.0, 2.0, 2.0, 3.0]]), [SamplingParams(temperature=1.0, top_k=2)]
    )
    assert filtered[0].isfinite().tolist() == [False, True, True, True]


def test_top_p_of_one_keeps_all_of_a_large_vocabulary() -> None:
    """Although rounded probabilities may sum to more than 1 before the last."""
    logits_BV = random_logits(8, vocabulary=50_000)
    params = [SamplingParams(temperature=1.0, top_p=1.0)] * 7
    filtered_BV = filter_logits(logits_BV, [*params, SamplingParams(temperature=1.0, top_p=0.5)])
    assert bool(filtered_BV[:7].isfinite().all())


@pytest.mark.parametrize("temperature", [1e-45, 1e-300, 1e-7])
def test_tiny_temperatures_are_greedy_not_nan(temperature: float) -> None:
    logits = random_logits(1)
    params = SamplingParams(temperature=temperature, top_p=0.9, typical_p=0.9)
    filtered = filter_logits(logits, [params])
    assert draw(filtered, [0.999]).tolist() == logits.argmax(-1).tolist()


@settings(max_examples=100)
@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=8), st.integers(0, 1000))
def test_draw_inverts_the_cumulative_distribution(numbers: list[float], seed: int) -> None:
    logits_BV = random_logits(len(numbers), seed)
    logits_BV[:, ::3] = -math.inf
    for row, (number, token) in enumerate(
        zip(numbers, draw(logits_BV, numbers).tolist(), strict=True)
    ):
        probs = softmax(logits_BV[row].double().tolist())
        before = sum(probs[:token])
        assert probs[token] > 0
        assert before - 1e-6 <= number <= before + probs[token] + 1e-6


def test_draw_stays_inside_at_both_ends() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]])
    assert draw(logits, [0.0]).tolist() == [1]
    assert draw(logits, [1 - 2**-52]).tolist() == [2]


def test_uniform_is_uniform_and_fixed() -> None:
    numbers = [uniform(seed, index) for seed in range(50) for index in range(100)]
    assert all(0 <= number < 1 for number in numbers)
    tenths = Counter(int(number * 10) for number in numbers)
    assert all(abs(tenths[i] - 500) < 100 for i in range(10))  # 4.7 standard deviations
    assert len(set(numbers)) == len(numbers)
    # Published output depends on these: they must not change between versions or machines.
    assert uniform(0, 0) == 0.0564663990004608
    assert uniform((1 << 63) - 1, 7) == 0.6488729395303772


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=10),
    st.lists(st.integers(0, VOCABULARY - 1), max_size=10),
    st.sampled_from([1.0, 0.5, 1.3]),
    st.sampled_from([0.0, -1.5, 0.7]),
    st.sampled_from([0.0, -0.4, 2.0]),
)
def test_penalties(
    prompt: list[int], output: list[int], repetition: float, frequency: float, presence: float
) -> None:
    plain = request()
    penalised = request(
        prompt,
        output,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
    )
    logits_BV = random_logits(2)
    before_BV = logits_BV.clone()
    adjusted_BV = penalize(logits_BV, [plain, penalised])
    assert torch.equal(logits_BV, before_BV)
    assert torch.equal(adjusted_BV[0], logits_BV[0])
    for token, logit in enumerate(logits_BV[1].tolist()):
        if token in prompt or token in output:
            logit = logit / repetition if logit > 0 else logit * repetition
        logit -= frequency * output.count(token) + presence * (token in output)
        assert float(adjusted_BV[1, token]) == pytest.approx(logit, abs=1e-5)


def test_greedy_takes_the_largest_after_penalties() -> None:
    logits_BV = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    plain, penalised = request([0]), request([0], [1], presence_penalty=1.5)
    assert [s.token_id for s in sample(logits_BV, [plain, penalised])] == [1, 2]


def test_reported_logprobs_are_the_models() -> None:
    logits_BV = random_logits(3)
    requests = [
        request(top_n_tokens=2),
        request(temperature=0.1, top_k=2, seed=3, repetition_penalty=5.0, top_n_tokens=5),
        request(),
    ]
    logprobs_BV = logits_BV.log_softmax(-1)
    for row, (drawn, made) in enumerate(zip(sample(logits_BV, requests), requests, strict=True)):
        assert drawn.logprob == pytest.approx(float(logprobs_BV[row, drawn.token_id]), abs=1e-5)
        best = logprobs_BV[row].topk(made.sampling.top_n_tokens)
        assert [token for token, _ in drawn.top] == best.indices.tolist()
        assert [value for _, value in drawn.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_top_n_may_exceed_the_vocabulary() -> None:
    drawn = sample(random_logits(1, vocabulary=3), [request(top_n_tokens=20)])
    assert len(drawn[0].top) == 3


def test_nothing_to_sample() -> None:
    assert sample(torch.empty(0, VOCABULARY), []) == []


def test_a_draw_does_not_depend_on_the_company() -> None:
    logits_BV = random_logits(6)
    requests = [
        request(temperature=1.0, seed=11),
        request(),
        request(temperature=0.7, top_k=5, seed=12),
        request(temperature=1.5, top_p=0.5, seed=11),
        request(temperature=1.0, typical_p=0.4, seed=13, frequency_penalty=1.0),
        request(temperature=1.0, seed=11),
    ]
    together = sample(logits_BV, requests)
    alone = [sample(logits_BV[i : i + 1], [made])[0] for i, made in enumerate(requests)]
    assert [s.token_id for s in together] == [s.token_id for s in alone]


def test_draws_follow_the_distribution() -> None:
    logits_V = torch.tensor([0.0, 1.0, 2.0, -1.0])
    count = 4000
    requests = [request(temperature=1.0, seed=seed) for seed in range(count)]
    drawn = Counter(s.token_id for s in sample(logits_V.expand(count, -1), requests))
    for token, share in enumerate(logits_V.softmax(-1).tolist()):
        deviation = math.sqrt(share * (1 - share) / count)
        assert abs(drawn[token] / count - share) < 4.5 * deviation


def test_the_number_of_a_token_is_its_own() -> None:
    """Each output index draws anew, and the same index draws the same."""
    logits_BV = torch.zeros(1, 1000)

    def token(output: int) -> Sampled:
        return sample(logits_BV, [request(output=[0] * output, temperature=1.0, seed=5)])[0]

    assert len({token(output).token_id for output in range(20)}) > 15
    assert token(7) == token(7)


def test_token_logprobs_in_parts() -> None:
    logits_NV = random_logits(150)
    targets = [i % VOCABULARY for i in range(150)]
    expected = logits_NV.log_softmax(-1)[torch.arange(150), torch.tensor(targets)]
    assert token_logprobs(logits_NV, targets) == pytest.approx(expected.tolist(), abs=1e-5)
