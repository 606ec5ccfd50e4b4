"""Decoding steps replayed from CUDA graphs, so that no launch waits for Python.

A step whose requests all compute one token is padded to a batch of 1, 2, 4, 8, ... rows and to the
next of a few bounds on experts and context; each such shape is captured once, when it is first
needed, and replayed from then on. What changes from step to step lies in one `StaticBatch` per
batch size, filled by one copy to the device. All graphs share one memory pool.

A padding row has no slot (nothing of it is stored), an empty context (its attention reads nothing),
and k = 0 (it chooses no expert, so sparse layers load nothing for it and count nothing). Rows of
requests that run dense beside sparse ones choose all experts: such a batch is replayed with the
bound "all", which computes the dense products and zeroes what was not chosen.

Shapes: B rows of the graph, n requests, M blocks per request at most, L layers, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from engine.gpu.arrivals import Arrivals
from engine.gpu.attention.batches import DecodeBatch, StepAttend
from engine.gpu.decoder import KernelDecoder
from engine.gpu.ffn.cheapest_way import expected_used
from engine.gpu.graph_capture import capture
from engine.gpu.routing.count_chosen import count_chosen
from engine.model.attention import KVCache
from engine.model.policy_batch import PolicyBatch
from engine.model.trace import Trace
from engine.policy import NO_MASS_LIMIT, ExpertPolicy

# Larger batches keep the device busy longer than Python needs to launch them.
MAX_BATCH = 256
# Once so many graphs exist, steps of a new shape run without one.
MAX_GRAPHS = 96
FIRST_CONTEXT = 512
# The weight of the newest step in the running mean of the share of experts that steps use.
UNION_WEIGHT = 0.1


class DecodingRequest(Protocol):
    """What a step reads of a request that decodes; `engine.serving.request.Request` has it all.

    Attributes:
        token_ids: prompt and output so far.
        num_computed: how many of them have keys and values in the cache.
        blocks: the cache blocks that hold these.
        policy: which experts its tokens use.
    """

    token_ids: list[int]
    num_computed: int
    blocks: list[int]
    policy: ExpertPolicy


class GraphKey(NamedTuple):
    """The shape of one graph.

    Attributes:
        batch: rows.
        max_k: most experts of a row; 0: every row is dense.
        longest: most tokens of a context.
        quarters: how many quarters of all experts such batches used lately, rounded up; 0 if that
            does not matter.
    """

    batch: int
    max_k: int
    longest: int
    quarters: int = 0


def batch_bucket(requests: int, most: int) -> int:
    """The least power of two that is not below the number of rows, but `most` at most."""
    return min(1 << (requests - 1).bit_length(), most)


def k_bucket(k: int, num_experts: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is not below k, or all experts."""
    bucket = 1
    while bucket < k:
        bucket = bucket + max(1, bucket // 2) if bucket & (bucket - 1) == 0 else bucket // 3 * 4
    return min(bucket, num_experts)


def context_bucket(context: int, most: int) -> int:
    """The least of 512, 2048, 8192, ... that is not below the length, but `most` at most."""
    bucket = FIRST_CONTEXT
    while bucket < context:
        bucket *= 4
    return min(bucket, most)


def graph_key(
    policies: Sequence[ExpertPolicy],
    contexts: Sequence[int],
    num_experts: int,
    most_rows: int,
    most_tokens: int,
) -> GraphKey:
    """The shape in which these requests decode."""
    max_k = k_bucket(max(policy.limits(num_experts)[0] for policy in policies), num_experts)
    return GraphKey(
        batch_bucket(len(policies), most_rows),
        0 if all(policy.uses_all(num_experts) for policy in policies) else max_k,
        context_bucket(max(contexts), most_tokens),
    )


class StaticBatch:
    """What a step feeds to the graphs of one batch size: tensors that stay where they are.

    Attributes:
        ids_B, slots_B, contexts_B, k_B: int32.
        mass_B: float32.
        table_BM: int32.
    """

    ROWS = 5

    def __init__(self, batch: int, most_blocks: int, device: torch.device) -> None:
        numbers = batch * (self.ROWS + most_blocks)
        pinned = device.type == "cuda"
        self._host = torch.zeros(numbers, dtype=torch.int32, pin_memory=pinned)
        self._device = torch.zeros(numbers, dtype=torch.int32, device=device)
        split = self.ROWS * batch
        rows = self._device[:split].view(self.ROWS, batch)
        self.ids_B, self.slots_B, self.contexts_B, self.k_B = rows[:4]
        self.mass_B = rows[4].view(torch.float32)
        self.table_BM = self._device[split:].view(batch, most_blocks)
        host_rows = self._host[:split].view(self.ROWS, batch)
        self._numbers = host_rows[:4].numpy()
        self._mass = host_rows[4].view(torch.float32).numpy()
        self._table = self._host[split:].view(batch, most_blocks).numpy()
        self._blocks: list[list[int]] = [[] for _ in range(batch)]

    def fill(self, requests: Sequence[DecodingRequest], num_experts: int, block_size: int) -> None:
        """Fill in the next token of each request, and padding behind. Does not wait for the device.

        The step before must have ended, because the host's side of the copy is overwritten.
        """
        n = len(requests)
        for row, request in enumerate(requests):
            position = request.num_computed
            block, offset = divmod(position, block_size)
            k, self._mass[row] = request.policy.limits(num_experts)
            slot = request.blocks[block] * block_size + offset
            self._numbers[:, row] = (request.token_ids[position], slot, position + 1, k)
            if self._blocks[row] != request.blocks:
                self._blocks[row] = list(request.blocks)
                self._table[row, : len(request.blocks)] = request.blocks
        self._numbers[:, n:] = 0
        self._numbers[1, n:] = -1
        self._mass[n:] = NO_MASS_LIMIT
        self._device.copy_(self._host, non_blocking=True)


class Replay(Protocol):
    """Runs a captured graph; `torch.cuda.CUDAGraph` does."""

    def replay(self) -> None: ...


@dataclass(frozen=True)
class DecodeGraph:
    """A captured step and the tensors that it writes.

    Attributes:
        graph: replays it.
        logits_BV: float32.
        totals: how many experts ran, [B + 2 L], as `DecodeGraphs.run` returns it; None if all did.
        chosen_LBE: which ones, bool; None if all did.
    """

    graph: Replay
    logits_BV: Tensor
    totals: Tensor | None
    chosen_LBE: Tensor | None


class DecodeGraphs:
    """The captured decoding steps of one model and cache.

    Args:
        decoder: the model, on CUDA.
        cache: its keys and values.
        most_rows: requests that may run at the same time.
        most_tokens: the longest request.
    """

    def __init__(
        self, decoder: KernelDecoder, cache: KVCache, most_rows: int, most_tokens: int
    ) -> None:
        self.decoder = decoder
        self.model = decoder.model
        self.cache = cache
        self.most_rows = min(most_rows, MAX_BATCH)
        self.most_tokens = most_tokens
        self.num_experts = self.model.config.experts.num_experts
        self._batches: dict[int, StaticBatch] = {}
        self._graphs: dict[GraphKey, DecodeGraph] = {}
        self._pool: Any = None
        self._arrivals = Arrivals(cache.slots.device)
        self._used: dict[tuple[int, int], float] = {}

    @property
    def captured(self) -> list[GraphKey]:
        """The shapes that have a graph, in the order in which they were needed."""
        return list(self._graphs)

    def key(self, requests: Sequence[DecodingRequest]) -> GraphKey | None:
        """The shape for one token of each request; None if these must run without a graph."""
        if not 1 <= len(requests) <= self.most_rows:
            return None
        policies = [request.policy for request in requests]
        if any(policy.kind == "oracle" for policy in policies):
            return None
        contexts = [request.num_computed + 1 for request in requests]
        key = graph_key(policies, contexts, self.num_experts, self.most_rows, self.most_tokens)
        key = key._replace(quarters=math.ceil(4 * self._share_used(key)))
        return key if key in self._graphs or len(self._graphs) < MAX_GRAPHS else None

    def run(self, requests: Sequence[DecodingRequest], key: GraphKey) -> tuple[Tensor, list[int]]:
        """Compute one token of each request.

        Returns:
            Logits [n, V], which the next run overwrites; and how many experts ran: of each row over
            all layers, of each layer over all rows, and the distinct ones of each layer.
        """
        batch = self._batch(key.batch)
        batch.fill(requests, self.num_experts, self.cache.block_size)
        found = self._graphs.get(key)
        if found is None:
            found = self._graphs[key] = self._capture(key, batch)
        found.graph.replay()
        n = len(requests)
        totals = self._totals(found, n)
        self._note_union(key, totals[-self.model.config.num_hidden_layers :])
        return found.logits_BV[:n], totals

    def choices(self, key: GraphKey) -> Tensor | None:
        """The experts of the last run of this shape, [L, B, E], which the next run overwrites.

        None if every row used every expert.
        """
        return self._graphs[key].chosen_LBE

    def _share_used(self, key: GraphKey) -> float:
        """The share of the experts that such a batch uses, from the steps before."""
        # the kernels for few rows read only what is chosen, whatever is expected
        if key.batch == 1 or not key.max_k:
            return 0.0
        expected = expected_used(key.batch, key.max_k, self.num_experts) / self.num_experts
        return self._used.get((key.batch, key.max_k), expected)

    def _note_union(self, key: GraphKey, union_L: list[int]) -> None:
        found = sum(union_L) / len(union_L) / self.num_experts
        before = self._share_used(key)
        self._used[key.batch, key.max_k] = before + UNION_WEIGHT * (found - before)

    def _batch(self, size: int) -> StaticBatch:
        if size not in self._batches:
            most_blocks = -(-self.most_tokens // self.cache.block_size)
            self._batches[size] = StaticBatch(size, most_blocks, self.cache.slots.device)
        return self._batches[size]

    def _totals(self, found: DecodeGraph, n: int) -> list[int]:
        layers = self.model.config.num_hidden_layers
        if found.totals is None:
            everything = self.num_experts
            return [layers * everything] * n + [n * everything] * layers + [everything] * layers
        totals: list[int] = found.totals.tolist()
        return totals[:n] + totals[-2 * layers :]

    def compute(
        self, key: GraphKey, batch: StaticBatch
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What a graph holds: the model over the batch's tensors, with nothing read by the host.

        Returns:
            The tensors of a `DecodeGraph`.
        """
        model, arrivals = self.model, self._arrivals
        decode = DecodeBatch(batch.table_BM, batch.contexts_B, key.longest)
        tables = model.cos, model.sin
        attend = StepAttend(self.cache, tables, batch.slots_B, decode, arrivals)
        policy = PolicyBatch(batch.k_B, batch.mass_B, key.max_k, quarters=key.quarters)
        chosen_LBE: Tensor | None = None
        if key.batch == 1 and self.decoder.is_plain:
            if key.max_k:
                shape = len(model.layers), 1, self.num_experts
                chosen_LBE = batch.ids_B.new_empty(shape, dtype=torch.bool)
            logits_BV = self.decoder.next_token(batch.ids_B, attend, policy, arrivals, chosen_LBE)
        else:
            trace = Trace()
            positions_B = None
            if not model.config.is_rotary:  # a padding row's context is empty
                positions_B = (batch.contexts_B - 1).clamp_min(0)
            logits_BV = self.decoder.forward(
                batch.ids_B, attend, policy, trace, positions_T=positions_B
            )
            if key.max_k:
                chosen_LBE = torch.stack(trace.choices())
        totals = None if chosen_LBE is None else count_chosen(chosen_LBE)
        return logits_BV, totals, chosen_LBE

    def _capture(self, key: GraphKey, batch: StaticBatch) -> DecodeGraph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        outputs: list[tuple[Tensor, Tensor | None, Tensor | None]] = []

        def compute() -> None:
            outputs[:] = [self.compute(key, batch)]

        graph = capture(compute, self._pool)
        return DecodeGraph(graph, *outputs[0])
