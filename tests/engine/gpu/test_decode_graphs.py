"""Decoding in padded static batches: the buckets, and the step itself in Triton's interpreter.

What a graph replays is computed here without one; the capture is tested on a GPU (test_gpu.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from engine.gpu.attention.batches import attend_spans
from engine.gpu.decode_graphs import (
    DecodeGraph,
    DecodeGraphs,
    GraphKey,
    StaticBatch,
    batch_bucket,
    context_bucket,
    graph_key,
    k_bucket,
)
from engine.gpu.decoder import KernelDecoder
from engine.model.attention import KVCache, PagedAttend, SequenceSpan
from engine.model.decoder import Decoder
from engine.model.policy_batch import PolicyBatch
from engine.model.trace import Trace
from engine.policy import ExpertPolicy
from engine.serving.request import Request, SamplingParams
from tests.models import tiny_config, tiny_model

DENSE, TWO, FIVE, MASS = (
    ExpertPolicy.dense(),
    ExpertPolicy.top_k(2),
    ExpertPolicy.top_k(5),
    ExpertPolicy.mass(0.6),
)


class TestBuckets:
    @given(st.integers(1, 256), st.integers(1, 256))
    def test_batch(self, requests: int, spare: int) -> None:
        most = requests + spare - 1
        bucket = batch_bucket(requests, most)
        assert requests <= bucket <= min(most, 2 * requests)

    @given(st.integers(1, 512), st.integers(0, 100))
    def test_k(self, k: int, spare: int) -> None:
        bucket = k_bucket(k, k + spare)
        assert k <= bucket <= k + spare
        assert bucket <= 1.5 * k
        assert bucket == k_bucket(bucket, k + spare)

    def test_k_is_exact_where_it_matters_most(self) -> None:
        buckets = sorted({k_bucket(k, 40) for k in range(1, 41)})
        assert buckets == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40]

    def test_context(self) -> None:
        found = [context_bucket(c, 5000) for c in (1, 512, 513, 2048, 2049, 5000)]
        assert found == [512, 512, 2048, 2048, 5000, 5000]
        assert context_bucket(3, 100) == 100

    def test_a_batch_is_dense_only_if_all_of_it_is(self) -> None:
        everyone = ExpertPolicy.top_k(8)
        assert graph_key([DENSE, everyone], [9, 3], 8, 64, 100) == GraphKey(2, 0, 100)
        assert graph_key([DENSE, TWO, TWO], [9, 3, 1], 8, 64, 100) == GraphKey(4, 8, 100)
        assert graph_key([TWO, FIVE], [9, 3], 8, 64, 100) == GraphKey(2, 6, 100)
        assert graph_key([MASS], [9], 8, 64, 100) == GraphKey(1, 8, 100)


class Computed:
    """Stands for a graph: computes anew what a graph would replay."""

    def __init__(self, graphs: DecodeGraphs, key: GraphKey, batch: StaticBatch) -> None:
        self._compute = lambda: graphs.compute(key, batch)
        self.logits_BV, self.totals, self.chosen_LBE = self._compute()
        self.replays = 0

    def replay(self) -> None:
        logits_BV, totals, chosen_LBE = self._compute()
        self.logits_BV.copy_(logits_BV)
        if self.totals is not None and totals is not None:
            self.totals.copy_(totals)
        if self.chosen_LBE is not None and chosen_LBE is not None:
            self.chosen_LBE.copy_(chosen_LBE)
        self.replays += 1


class ComputedGraphs(DecodeGraphs):
    def _capture(self, key: GraphKey, batch: StaticBatch) -> DecodeGraph:
        graph = Computed(self, key, batch)
        return DecodeGraph(graph, graph.logits_BV, graph.totals, graph.chosen_LBE)


@pytest.fixture(scope="module")
def plain() -> Decoder:
    return tiny_model(tiny_config()).requires_grad_(False)


@pytest.fixture(scope="module")
def kernels(plain: Decoder) -> KernelDecoder:
    """The same weights by the GPU's kernels, in the interpreter."""
    return KernelDecoder(plain)


def new_cache(blocks: int = 40) -> KVCache:
    cache = KVCache(2, blocks, 4, 2, 8, torch.float32, "cpu")
    cache.slots.fill_(1e4)
    return cache


def requests_of(policies: Sequence[ExpertPolicy]) -> list[Request]:
    """Requests of different lengths, their prompts not computed yet, their blocks given."""
    made = []
    for i, policy in enumerate(policies):
        prompt = [1 + (37 * i + 11 * j) % 290 for j in range(1 + 3 * i)]
        request = Request(str(i), prompt, SamplingParams(), policy, seed=0)
        request.blocks = [7 * i + 6, 7 * i + 2, 7 * i + 3, 7 * i + 1, 7 * i + 5]
        made.append(request)
    return made


def prefill(model: Decoder, cache: KVCache, requests: list[Request]) -> None:
    """All but the last token of each prompt, through PyTorch's attention."""
    for request in requests:
        n = request.prompt_len - 1
        if n:
            attend = PagedAttend(cache, [SequenceSpan(0, n, n, request.blocks)])
            policy = PolicyBatch.uniform(request.policy, n, 8)
            model(torch.tensor(request.prompt_ids[:n]), torch.arange(n), attend, policy)
        request.num_computed = n


def alone(model: Decoder, request: Request) -> tuple[Tensor, Tensor]:
    """Logits of the last token of all known ones, computed as one sequence; its experts [L, E]."""
    trace = Trace()
    logits = model.logits(torch.tensor([request.token_ids]), request.policy, trace)
    chosen = [torch.ones(8, dtype=torch.bool) if c is None else c[-1] for c in trace.chosen]
    return logits[0, -1], torch.stack(chosen)


@pytest.mark.parametrize(
    "policies",
    [[TWO], [DENSE, DENSE, DENSE], [TWO, FIVE, TWO], [DENSE, FIVE, MASS, TWO, TWO]],
    ids=lambda policies: " ".join(map(str, policies)),
)
@torch.inference_mode()
def test_padded_decoding_computes_each_request_alone(
    policies: list[ExpertPolicy], plain: Decoder, kernels: KernelDecoder
) -> None:
    cache, requests = new_cache(), requests_of(policies)
    prefill(plain, cache, requests)
    graphs = ComputedGraphs(kernels, cache, 8, 20)
    key = None
    for step in range(3):
        again = graphs.key(requests)
        assert again is not None
        key = again
        untouched = cache.slots[:, :, :4].clone()
        logits, totals = graphs.run(requests, key)
        chosen = graphs.choices(key)
        assert (chosen is None) == all(policy == DENSE for policy in policies)
        assert logits.shape == (len(requests), 300)
        experts = 0
        for row, request in enumerate(requests):
            expected, used_LE = alone(plain, request)
            torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
            assert totals[row] == used_LE.sum()
            assert (used_LE if chosen is None else chosen[:, row]).equal(used_LE)
            experts += totals[row]
            request.token_ids.append(3 + step)
            request.num_computed += 1
        n = len(requests)
        assert len(totals) == n + 4
        assert sum(totals[n : n + 2]) == experts
        assert all(1 <= union <= 8 for union in totals[n + 2 :])
        assert torch.equal(cache.slots[:, :, :4], untouched), "padding wrote to block 0"
    assert graphs.captured == [key]


def test_a_moved_or_shrunk_request_leaves_no_old_blocks() -> None:
    batch = StaticBatch(2, 5, torch.device("cpu"))
    first, second = requests_of([TWO, MASS])
    batch.fill([first, second], 8, 4)
    first.blocks = [30, 31]
    batch.fill([second, first], 8, 4)
    assert batch.table_BM[0].tolist() == second.blocks
    assert batch.table_BM[1, :2].tolist() == [30, 31]
    assert batch.slots_B.tolist() == [second.blocks[0] * 4, 120]
    assert batch.mass_B.tolist() == pytest.approx([0.6, 2.0])
    batch.fill([first], 8, 4)
    assert batch.slots_B.tolist() == [120, -1]
    assert batch.contexts_B.tolist() == [1, 0]
    assert batch.k_B.tolist() == [2, 0]


@torch.inference_mode()
def test_the_way_follows_what_batches_used(kernels: KernelDecoder) -> None:
    """Two that choose alone may use half of the experts together; copies never do."""
    graphs = ComputedGraphs(kernels, new_cache(), 8, 20)
    requests = requests_of([FIVE, FIVE, FIVE])
    first = graphs.key(requests)
    assert first is not None
    assert first.quarters == 4, "independent choices of 5 of 8"
    same = [requests[0]] * 3
    for _ in range(12):
        key = graphs.key(same)
        assert key is not None
        graphs.run(same, key)
    assert graphs.key(same) == first._replace(quarters=3)


def test_what_has_no_graph(kernels: KernelDecoder) -> None:
    graphs = ComputedGraphs(kernels, new_cache(), 2, 20)
    assert graphs.key(requests_of([TWO, TWO])) == GraphKey(2, 2, 20, quarters=2)
    assert graphs.key(requests_of([TWO, TWO, TWO])) is None
    assert graphs.key(requests_of([ExpertPolicy.oracle(2)])) is None


@torch.inference_mode()
def test_kernel_attention_equals_plain_attention_over_any_batch(plain: Decoder) -> None:
    """Chunks and decoding sequences in one batch, in any order."""
    requests = requests_of([DENSE] * 5)
    spans, ids, positions, start = [], [], [], 0
    for request, count in zip(requests, (1, 3, 1, 4, 1), strict=True):
        request.num_computed = request.prompt_len - count
        spans.append(SequenceSpan(start, count, request.prompt_len, request.blocks))
        ids += request.prompt_ids[-count:]
        positions += range(request.num_computed, request.prompt_len)
        start += count
    policy = PolicyBatch.uniform(DENSE, start, 8)
    results = []
    for kernels in (False, True):
        cache = new_cache()
        cache.slots.normal_(generator=torch.Generator().manual_seed(0))
        ids_T, positions_T, rows = torch.tensor(ids), torch.tensor(positions), torch.tensor([0, 9])
        if kernels:
            attend = attend_spans(cache, spans, (plain.cos, plain.sin), 2)
            logits = KernelDecoder(plain).forward(ids_T, attend, policy, rows=rows)
        else:
            logits = plain(ids_T, positions_T, PagedAttend(cache, spans), policy, rows=rows)
        results.append((logits, cache.slots))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
