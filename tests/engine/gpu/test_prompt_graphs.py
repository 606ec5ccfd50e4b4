"""Prompt steps in padded static batches: the buckets, and the steps in Triton's interpreter.

What a graph replays is computed here without one; the capture is tested on a GPU (test_gpu.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.gpu import prompt_graphs
from engine.gpu.decode_graphs import Replay
from engine.gpu.decoder import KernelDecoder
from engine.gpu.prompt_graphs import PromptGraphs, PromptKey, request_bucket, token_bucket
from engine.model.attention import KVCache
from engine.model.decoder import Decoder
from engine.model.trace import Trace
from engine.policy import ExpertPolicy
from engine.serving.request import Request, SamplingParams
from engine.serving.scheduler import Plan
from tests.models import tiny_config, tiny_model

DENSE, TWO, FIVE, MASS = (
    ExpertPolicy.dense(),
    ExpertPolicy.top_k(2),
    ExpertPolicy.top_k(5),
    ExpertPolicy.mass(0.6),
)
PROMPTS = (1, 9, 4, 23, 17)


class TestBuckets:
    @given(st.integers(1, 2048), st.integers(0, 500))
    def test_tokens(self, tokens: int, spare: int) -> None:
        bucket = token_bucket(tokens, tokens + spare)
        assert tokens <= bucket <= tokens + spare
        assert bucket - tokens < max(16, tokens / 4)

    def test_there_are_few_of_them(self) -> None:
        found = sorted({token_bucket(t, 2048) for t in range(1, 2049)})
        assert found[:9] == [16, 32, 48, 64, 80, 96, 112, 128, 160]
        assert found[-4:] == [1280, 1536, 1792, 2048]
        assert len(found) == 24
        assert all(token_bucket(bucket, 2048) == bucket for bucket in found)

    def test_requests(self) -> None:
        assert [request_bucket(n, 100) for n in (1, 4, 5, 32, 33, 100)] == [4, 4, 32, 32, 100, 100]
        assert request_bucket(1, 2) == 2


class Computed:
    """Stands for a graph: computes anew what a graph would replay."""

    def __init__(self, graphs: PromptGraphs, key: PromptKey) -> None:
        self._graphs, self._key = graphs, key

    def replay(self) -> None:
        self._graphs.compute(self._key)


class ComputedGraphs(PromptGraphs):
    def _capture(self, key: PromptKey) -> Replay:
        return Computed(self, key)


@pytest.fixture(scope="module")
def plain() -> Decoder:
    return tiny_model(tiny_config()).requires_grad_(False)


@pytest.fixture(scope="module")
def kernels(plain: Decoder) -> KernelDecoder:
    """The same weights by the GPU's kernels, in the interpreter."""
    return KernelDecoder(plain)


def graphs_of(model: KernelDecoder, requests: int = 8, tokens: int = 40) -> ComputedGraphs:
    cache = KVCache(2, 60, 4, 2, 8, torch.float32, "cpu")
    cache.slots.fill_(1e4)
    return ComputedGraphs(model, cache, requests, tokens, longest=40)


def requests_of(policies: Sequence[ExpertPolicy], **sampling: object) -> list[Request]:
    """Requests of the lengths above, nothing computed yet, on scattered blocks; block 0 is free."""
    made = []
    for i, policy in enumerate(policies):
        prompt = [1 + (37 * i + 11 * j) % 290 for j in range(PROMPTS[i])]
        request = Request(str(i), prompt, SamplingParams(**sampling), policy, seed=0)  # type: ignore[arg-type]
        request.blocks = [59 - 10 * i - (7 * j) % 10 for j in range(10)]
        made.append(request)
    return made


def alone(model: Decoder, request: Request, known: int) -> tuple[Tensor, list[int]]:
    """Logits of the last of `known` tokens, computed as one sequence, and experts of each token."""
    trace = Trace()
    ids = torch.tensor([request.token_ids[:known]])
    logits = model.logits(ids, request.policy, trace)
    return logits[0, -1], trace.counts()[0].sum(0).tolist()


def check_step(graphs: PromptGraphs, plain: Decoder, plan: Plan) -> PromptKey:
    """Run one step and compare it with each request alone; then advance the requests."""
    key = graphs.key(plan)
    assert key is not None
    untouched = graphs.cache.slots[:, :, :4].clone()
    logits, totals = graphs.run(plan, key)
    tokens, start, row = sum(n for _, n in plan), 0, 0
    assert len(totals) == tokens + 4
    for request, count in plan:
        known = request.num_computed + count
        expected, used = alone(plain, request, known)
        assert totals[start : start + count] == used[-count:]
        if count == request.num_uncomputed:
            torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
            row += 1
            request.token_ids.append(3 + row)
        start += count
        request.num_computed = known
    assert len(logits) == row
    assert sum(totals[tokens : tokens + 2]) == sum(totals[:tokens])
    assert all(1 <= union <= 8 for union in totals[tokens + 2 :])
    assert torch.equal(graphs.cache.slots[:, :, :4], untouched), "padding wrote to block 0"
    return key


@pytest.mark.parametrize(
    "policies",
    [[DENSE] * 3, [TWO, FIVE, TWO], [DENSE, FIVE, MASS, TWO, TWO]],
    ids=lambda policies: " ".join(map(str, policies)),
)
@torch.inference_mode()
def test_chunks_and_decoding_requests_compute_what_each_computes_alone(
    policies: list[ExpertPolicy],
    plain: Decoder,
    kernels: KernelDecoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prompt_graphs, "one_pass_is_cheaper", lambda *_: True)
    graphs, requests = graphs_of(kernels), requests_of(policies)
    first, *rest = requests
    check_step(graphs, plain, [(first, first.num_uncomputed)])
    # A decoding request beside first chunks, then beside second ones, then all decode.
    check_step(graphs, plain, [(first, 1), *((r, min(5, r.num_uncomputed)) for r in rest)])
    check_step(graphs, plain, [(r, r.num_uncomputed) for r in requests])
    key = check_step(graphs, plain, [(r, 1) for r in reversed(requests)])
    assert key.tokens == 16
    assert set(graphs.captured) >= {key}


@torch.inference_mode()
def test_one_graph_serves_other_lengths_and_contexts(
    plain: Decoder, kernels: KernelDecoder
) -> None:
    graphs, (first, second, third) = graphs_of(kernels), requests_of([TWO, TWO, TWO])
    keys = {check_step(graphs, plain, [(second, 9), (third, 4)])}
    keys.add(check_step(graphs, plain, [(first, 1)]))
    keys.add(check_step(graphs, plain, [(first, 1), (third, 1), (second, 1)]))
    assert len(keys) == len(graphs.captured) == 1


def test_what_has_no_graph(kernels: KernelDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = graphs_of(kernels, requests=2, tokens=20)
    first, second, third = requests_of([TWO, TWO, TWO])
    assert graphs.key([(second, 9)]) == PromptKey(16, 2, 2)
    assert graphs.key([(second, 9), (third, 4), (first, 1)]) is None
    assert graphs.key([(second, 21)]) is None
    (judged,) = requests_of([ExpertPolicy.oracle(2)])
    assert graphs.key([(judged, 1)]) is None
    monkeypatch.setattr(prompt_graphs, "LONGEST_DECODED", 5)
    second.num_computed = 5
    assert graphs.key([(second, 1)]) is None
    assert graphs.key([(second, 2)]) is not None


def test_dense_and_sparse_tokens_stay_apart_where_that_is_cheaper(
    kernels: KernelDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, (dense, sparse) = graphs_of(kernels), requests_of([DENSE, TWO])
    for together, expected in ((True, PromptKey(16, 4, 8)), (False, None)):
        monkeypatch.setattr(prompt_graphs, "one_pass_is_cheaper", lambda *_, t=together: t)
        assert graphs.key([(dense, 1), (sparse, 9)]) == expected


@torch.inference_mode()
def test_a_shape_is_captured_when_it_comes_again(
    kernels: KernelDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, (_, request) = graphs_of(kernels), requests_of([TWO, TWO])
    plan = [(request, 9)]
    key = graphs.key(plan)
    assert key is not None
    assert [graphs.worth(key), graphs.worth(key)] == [False, True]
    graphs.run(plan, key)
    monkeypatch.setattr(prompt_graphs, "MAX_GRAPHS", 1)
    other = PromptKey(32, 2, 2)
    assert [graphs.worth(other), graphs.worth(other)] == [False, False]
    assert graphs.worth(key)
