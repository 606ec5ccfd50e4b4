"""The sampler against plain references that treat one row at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.policy import ExpertPolicy
from engine.serving import sampler
from engine.serving.columns import Columns
from engine.serving.request import Request, SamplingParams
from engine.serving.sampler import Sampled, completion_seed, token_logprobs, uniform

VOCABULARY = 40
END = 7  # the end-of-text token
CPU = torch.device("cpu")


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


def sample(logits_BV: Tensor, requests: Sequence[Request]) -> list[Sampled]:
    return sampler.sample(logits_BV, requests, END)


def filter_logits(logits_bV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    columns = Columns()
    sampler.pack_filters(columns, params, logits_bV)
    columns.send(CPU)
    return sampler.filter_logits(logits_bV, columns)


def edit_logits(logits_BV: Tensor, requests: Sequence[Request]) -> Tensor:
    columns = Columns()
    sampler.pack_edits(columns, requests, END)
    columns.send(CPU)
    return sampler.edit_logits(logits_BV, columns)


def draw(logits_bV: Tensor, numbers: Sequence[float]) -> Tensor:
    return sampler.draw(logits_bV, torch.tensor(numbers, dtype=torch.float64))


# --- references: one row, plain Python ------------------------------------------------------------


def edited_reference(row: list[float], request: Request) -> list[float]:
    """Bias, then penalties, then the tokens that would end the output too early."""
    params, output = request.sampling, request.output_ids
    edited = []
    for token, value in enumerate(row):
        value += dict(params.logit_bias).get(token, 0.0)
        if token in request.token_ids:
            penalty = params.repetition_penalty
            value = value / penalty if value > 0 else value * penalty
        value -= params.frequency_penalty * output.count(token)
        value -= params.presence_penalty * (token in output)
        ends = token in params.stop_token_ids or (token == END and not params.ignore_eos)
        edited.append(-math.inf if ends and len(output) < params.min_tokens else value)
    return edited


def possible_tokens(row: list[float], request: Request) -> set[int]:
    """The token that the request must draw; two if its number lies on the edge between them."""
    row, params = edited_reference(row, request), request.sampling
    if params.greedy:
        return {row.index(max(row))}
    order = sorted(kept_reference(row, params))
    probs = softmax([row[i] / params.temperature for i in order])
    number, before, possible = uniform(request.seed, request.num_output), 0.0, set()
    for token, prob in zip(order, probs, strict=True):
        if before - 1e-6 <= number < before + prob + 1e-6:
            possible.add(token)
        before += prob
    return possible


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]


def kept_reference(row: list[float], params: SamplingParams) -> set[int]:
    """Tokens that the filters keep; no ties."""
    row = [value / params.temperature for value in row]
    kept = {i for i, value in enumerate(row) if value > -math.inf}

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


TOKENS = st.integers(0, VOCABULARY - 1)
REQUESTS = st.builds(
    request,
    prompt=st.lists(TOKENS, min_size=1, max_size=8),
    output=st.lists(TOKENS, max_size=8),
    temperature=st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 3, 12]),
    top_p=st.sampled_from([1.0, 1.0, 0.9, 0.4]),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
    typical_p=st.sampled_from([1.0, 1.0, 0.7]),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.3]),
    frequency_penalty=st.sampled_from([0.0, -1.5, 0.7]),
    presence_penalty=st.sampled_from([0.0, -0.4, 2.0]),
    logit_bias=st.dictionaries(TOKENS, st.sampled_from([-100.0, -1.5, 2.5, 100.0]), max_size=3).map(
        lambda biases: tuple(biases.items())
    ),
    stop_token_ids=st.lists(TOKENS, max_size=3).map(tuple),
    min_tokens=st.integers(0, 10),
    ignore_eos=st.booleans(),
    seed=st.integers(0, 1 << 62),
    top_n_tokens=st.integers(0, 5),
)


@settings(max_examples=200)
@given(st.lists(REQUESTS, min_size=1, max_size=6), st.integers(0, 1000))
def test_sample_draws_what_the_reference_draws(requests: list[Request], seed: int) -> None:
    """All parameters mixed: each row's token, and the same alone as in company, bit for bit."""
    logits_BV = random_logits(len(requests), seed)
    before_BV = logits_BV.clone()
    together = sample(logits_BV, requests)
    assert torch.equal(logits_BV, before_BV)
    for row, (drawn, made) in enumerate(zip(together, requests, strict=True)):
        assert drawn.token_id in possible_tokens(logits_BV[row].tolist(), made)
        assert drawn == sample(logits_BV[row : row + 1], [made])[0]


@settings(max_examples=100)
@given(st.lists(REQUESTS, min_size=1, max_size=4), st.integers(0, 1000))
def test_edits(requests: list[Request], seed: int) -> None:
    logits_BV = random_logits(len(requests), seed)
    edited_BV = edit_logits(logits_BV, requests)
    for row, made in enumerate(requests):
        expected = edited_reference(logits_BV[row].tolist(), made)
        assert edited_BV[row].tolist() == pytest.approx(expected, abs=1e-4)


def test_nothing_to_edit_copies_nothing() -> None:
    logits_BV = random_logits(2)
    assert edit_logits(logits_BV, [request(), request(temperature=1.0)]) is logits_BV


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


MIXED: list[dict[str, object]] = [
    {"temperature": 1.0, "seed": 11},
    {},
    {"temperature": 0.7, "top_k": 5, "seed": 12, "top_n_tokens": 2},
    {"temperature": 1.5, "top_p": 0.5, "seed": 11},
    {"temperature": 1.0, "top_p": 0.97, "seed": 20, "repetition_penalty": 1.2},
    {"temperature": 5.0, "top_p": 0.9, "top_k": 3000, "seed": 21},
    {"temperature": 3.0, "top_p": 0.99, "seed": 22, "logit_bias": ((3, 5.0), (1, -5.0))},
    {"temperature": 1.0, "typical_p": 0.4, "seed": 13, "frequency_penalty": 1.0},
    {"temperature": 1.0, "min_p": 0.01, "seed": 11, "top_n_tokens": 20},
    {"presence_penalty": 1.0, "min_tokens": 5, "top_n_tokens": 3},
]


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Threads divide a single row differently from many."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("step", [0.0, 0.5], ids=["distinct", "ties"])
@pytest.mark.parametrize("vocabulary", [VOCABULARY, 5_000, 50_257])
@pytest.mark.usefixtures("two_threads")
def test_a_row_does_not_depend_on_the_company(vocabulary: int, step: float) -> None:
    """Bit for bit, whatever others ask for; also where parts of the batch go separate ways."""
    logits_BV = random_logits(2 * len(MIXED), vocabulary=vocabulary)
    if step:
        logits_BV = (logits_BV / step).round() * step
    requests = [request([1, 2, 3], [4, 5, 1], **sampling) for sampling in MIXED * 2]
    together = sample(logits_BV, requests)
    for row, made in enumerate(requests):
        assert sample(logits_BV[row : row + 1], [made]) == [together[row]]
        assert sample(logits_BV[row : row + 2], requests[row : row + 2])[0] == together[row]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("all_of_it", [False, True])
def test_broken_logits_stay_in_their_rows(bad: float, all_of_it: bool) -> None:
    requests = [request([1, 2, 3], [4, 5, 1], **sampling) for sampling in MIXED]
    logits_BV = random_logits(len(MIXED), vocabulary=2_000)
    for first in range(2):
        broken_BV = logits_BV.clone()
        broken_BV[first::2, slice(None) if all_of_it else 1] = bad
        drawn, healthy = sample(broken_BV, requests), sample(logits_BV, requests)
        assert drawn[1 - first :: 2] == healthy[1 - first :: 2]
        assert all(0 <= token.token_id < 2_000 for token in drawn)


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.999])
def test_top_p_is_exact_where_its_prefix_is_short(top_p: float) -> None:
    """Flat rows need more than the sorted prefix, peaked ones less; both keep the fewest tokens."""
    logits_BV = random_logits(4, vocabulary=3_000) * torch.tensor([[0.01], [3.0], [0.2], [1.0]])
    filtered_BV = filter_logits(logits_BV, [SamplingParams(temperature=1.0, top_p=top_p)] * 4)
    counts = []
    for logits_V, filtered_V in zip(logits_BV, filtered_BV, strict=True):
        kept_V = filtered_V.isfinite()
        probs_V = logits_V.double().softmax(-1)
        mass, least = float(probs_V[kept_V].sum()), float(probs_V[kept_V].min())
        assert mass >= top_p - 1e-6
        assert mass - least < top_p + 1e-6
        assert bool((probs_V[~kept_V] <= least).all())
        counts.append(int(kept_V.sum()))
    assert counts[0] > 1024 > counts[1]


def test_top_p_sorts_as_little_as_suffices() -> None:
    """A GPU is not asked whether a prefix sufficed: it sorts all unless top-k bounds it."""

    def width(like_BV: Tensor, *top_k: int) -> int:
        columns = Columns()
        params = [SamplingParams(temperature=1.0, top_k=k, top_p=0.9) for k in top_k]
        sampler.pack_filters(columns, [*params, SamplingParams(temperature=1.0)], like_BV)
        return columns.widths["top_p"]

    host_BV, device_BV = torch.empty(1, 3_000), torch.empty(1, 3_000, device="meta")
    assert (width(host_BV, 0), width(device_BV, 0)) == (1024, 3_000)
    assert width(host_BV, 5, 20) == width(device_BV, 5, 20) == 20
    assert (width(host_BV, 5, 0), width(device_BV, 5, 0)) == (1024, 3_000)
    assert width(torch.empty(1, 30), 0) == 30


class Operations(TorchDispatchMode):
    """Counts tensor operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operations(requests: Sequence[Request]) -> list[str]:
    logits_BV = random_logits(len(requests))
    with Operations() as operations:
        sample(logits_BV, requests)
    return operations.names


def test_more_requests_take_no_more_operations() -> None:
    few = operations([request([1, 2, 3], [4], **sampling) for sampling in MIXED[:8]])
    many = operations([request([1, 2, 3], [4], **sampling) for sampling in MIXED[:8] * 2])
    assert few == many


def test_greedy_rows_take_few_operations() -> None:
    assert len(operations([request() for _ in range(16)])) <= 12


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
    logprobs_NV = logits_NV.log_softmax(-1)
    expected = logprobs_NV[torch.arange(150), torch.tensor(targets)]
    plain, known = token_logprobs(logits_NV, targets), token_logprobs(logits_NV, targets, 3)
    for report in (plain, known):
        assert [token.token_id for token in report] == targets
        assert [token.logprob for token in report] == pytest.approx(expected.tolist(), abs=1e-5)
    assert not any(token.top for token in plain)
    best = logprobs_NV.topk(3)
    assert [[i for i, _ in token.top] for token in known] == best.indices.tolist()
    for token, values in zip(known, best.values.tolist(), strict=True):
        assert [value for _, value in token.top] == pytest.approx(values, abs=1e-5)


def test_completions_have_seeds_of_their_own() -> None:
    seeds = [completion_seed(seed, index) for seed in range(20) for index in range(128)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert [completion_seed(5, 0), completion_seed(5, 1)] == [5, 9195432920620283359]
