"""Steps that compute prompts, replayed from CUDA graphs, so that no launch waits for Python.

A step of at most MAX_TOKENS tokens can be replayed: chunks of prompts, with or without decoding
requests among them. It is padded to the next of a few numbers of tokens, of requests and of experts
per token. Its attention reads from the device where each chunk lies
(`engine.gpu.attention.attend_chunks`), so that lengths and contexts are no part of the shape. One
`StaticPrompt` feeds all graphs, and all leave their logits in one buffer, so memory grows with the
number of graphs by their launches alone.

Capturing costs more than launching once, and prompts have many lengths: a shape is captured when it
comes for the second time.

A padding row has no slot, no keys and k = 0, as in `engine.gpu.decode_graphs`.

Shapes: T tokens and R requests of a graph, N pieces, M blocks per request at most, L layers,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.gpu.attention.attend_chunks import chunk_blocks, cut, most_pieces
from engine.gpu.attention.batches import ChunkAttend, ChunkBatch
from engine.gpu.decode_graphs import DecodingRequest, Replay, k_bucket
from engine.gpu.decoder import KernelDecoder
from engine.gpu.ffn.cheapest_way import FFNShape, one_pass_is_cheaper
from engine.gpu.graph_capture import capture
from engine.gpu.routing.count_chosen import count_chosen
from engine.model.attention import KVCache
from engine.model.policy_batch import PolicyBatch
from engine.model.trace import Trace
from engine.policy import NO_MASS_LIMIT

# Larger steps keep the device busy longer than Python needs to launch them.
MAX_TOKENS = 2048
# Once so many graphs exist, steps of a new shape run without one.
MAX_GRAPHS = 96
# Beside prompts, a decoding request's context is not split among programs. A step with a longer
# context runs without a graph, by the kernel that splits it.
LONGEST_DECODED = 4096


class PromptRequest(DecodingRequest, Protocol):
    """What a step reads of a request; `engine.serving.request.Request` has it all."""

    @property
    def num_uncomputed(self) -> int:
        """Known tokens that are not in the cache yet."""
        ...


# Requests in batch order, each with the number of its tokens that the step computes.
Plan = Sequence[tuple[PromptRequest, int]]


class PromptKey(NamedTuple):
    """The shape of one graph.

    Attributes:
        tokens: rows.
        requests: most requests among them.
        max_k: most experts of a row; 0: every row is dense.
    """

    tokens: int
    requests: int
    max_k: int


def token_bucket(tokens: int, most: int) -> int:
    """The least of 16, 32, 48, ..., 128, 160, ..., 256, 320, ... that is not below them, or `most`.

    From 64 on there are four sizes to each doubling, so less than a fifth of the rows is padding.
    """
    step = max(16, 1 << max(0, (tokens - 1).bit_length() - 3))
    return min(-(-tokens // step) * step, most)


def request_bucket(requests: int, most: int) -> int:
    """The least of 4, 32, 256, ... that is not below the number of requests, but `most` at most."""
    bucket = 4
    while bucket < requests:
        bucket *= 8
    return min(bucket, most)


class StaticPrompt:
    """What a step feeds to the graphs: tensors that stay where they are.

    Args:
        tokens, requests: the most that a step may have.
        most_blocks: M.
        pieces: the most that a step may have.
        device: where the tensors are.

    Attributes:
        ids_T, positions_T, slots_T, k_T: int32.
        mass_T: float32.
        rows_R: int32, the rows whose logits are wanted; 0 behind the last.
        pieces_N4, table_RM: int32.
    """

    COLUMNS = 5

    def __init__(
        self, tokens: int, requests: int, most_blocks: int, pieces: int, device: torch.device
    ) -> None:
        pinned = device.type == "cuda"
        sizes = [self.COLUMNS * tokens, requests, 4 * pieces, requests * most_blocks]
        self._host = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=pinned)
        self._device = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        # The table is last: a step copies its own rows of it alone.
        self._before_table = sum(sizes[:3])
        self._copied: Any = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]
        shapes = ((self.COLUMNS, tokens), (requests,), (pieces, 4), (requests, most_blocks))

        def views(flat: Tensor) -> list[Tensor]:
            parts: tuple[Tensor, ...] = torch.split(flat, sizes)
            return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

        columns, self.rows_R, self.pieces_N4, self.table_RM = views(self._device)
        self.ids_T, self.positions_T, self.slots_T, self.k_T = columns[:4]
        self.mass_T = columns[4].view(torch.float32)
        host_columns, *rest = views(self._host)
        self._numbers = host_columns[:4].numpy()
        self._mass = host_columns[4].view(torch.float32).numpy()
        self._rows, self._pieces, self._table = (view.numpy() for view in rest)

    def fill(
        self, plan: Plan, key: PromptKey, num_experts: int, block_size: int, block_q: int
    ) -> None:
        """Fill in the plan's tokens, and padding behind. Does not wait for the step before."""
        if self._copied is not None:
            self._copied.synchronize()  # the copy before has usually ended long ago
        spans: list[tuple[int, int, int]] = []
        ready: list[int] = []
        start = 0
        for row, (request, count) in enumerate(plan):
            self._fill_request(row, request, start, count, num_experts, block_size)
            spans.append((start, count, request.num_computed))
            start += count
            if count == request.num_uncomputed:
                ready.append(start - 1)
        end = key.tokens
        self._numbers[:, start:end] = 0
        self._numbers[2, start:end] = -1
        self._mass[start:end] = NO_MASS_LIMIT
        self._rows[: len(ready)], self._rows[len(ready) : key.requests] = ready, 0
        pieces = cut(spans, end, block_q)
        self._pieces[: len(pieces)] = pieces
        self._pieces[len(pieces) : most_pieces(end, key.requests, block_q)] = 0
        used = self._before_table + len(plan) * self._table.shape[1]
        self._device[:used].copy_(self._host[:used], non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def _fill_request(
        self,
        row: int,
        request: PromptRequest,
        start: int,
        count: int,
        num_experts: int,
        block_size: int,
    ) -> None:
        rows, first = slice(start, start + count), request.num_computed
        ids, positions, slots, k = (column[rows] for column in self._numbers)
        self._table[row, : len(request.blocks)] = request.blocks
        ids[:] = request.token_ids[first : first + count]
        positions[:] = np.arange(first, first + count)
        slots[:] = self._table[row][positions // block_size] * block_size + positions % block_size
        k[:], self._mass[rows] = request.policy.limits(num_experts)


class PromptGraphs:
    """The captured prompt steps of one model and cache.

    Args:
        decoder: the model, on CUDA.
        cache: its keys and values.
        most_requests: requests that may run at the same time.
        most_tokens: tokens of one step.
        longest: tokens of the longest request.
    """

    def __init__(
        self,
        decoder: KernelDecoder,
        cache: KVCache,
        most_requests: int,
        most_tokens: int,
        longest: int,
    ) -> None:
        self.decoder = decoder
        self.model = model = decoder.model
        self.cache = cache
        self.most_tokens = min(most_tokens, MAX_TOKENS)
        self.most_requests = min(most_requests, self.most_tokens)
        self.num_experts = model.config.experts.num_experts
        config, weight = model.config, model.embedding.weight
        group = config.num_attention_heads // config.num_key_value_heads
        blocks = chunk_blocks(group, config.head_dim, weight.element_size())
        self._block_q = blocks["BLOCK_Q"]
        self._longest = longest
        self._seen: set[PromptKey] = set()
        self._graphs: dict[PromptKey, Replay] = {}
        self._pool: Any = None
        self._static: StaticPrompt | None = None

    @property
    def captured(self) -> list[PromptKey]:
        """The shapes that have a graph, in the order in which they were captured."""
        return list(self._graphs)

    def key(self, plan: Plan) -> PromptKey | None:
        """The shape of a step; None if it must run without a graph.

        A graph gives logits of requests whose known tokens are then all computed, and numbers of
        experts: the caller asks for no more.
        """
        tokens = sum(count for _, count in plan)
        if tokens > self.most_tokens or len(plan) > self.most_requests:
            return None
        if not all(self._takes(request, count) for request, count in plan):
            return None
        max_k = self._max_k(plan)
        if max_k is None:
            return None
        return PromptKey(
            token_bucket(tokens, self.most_tokens),
            request_bucket(len(plan), self.most_requests),
            max_k,
        )

    def worth(self, key: PromptKey) -> bool:
        """Whether `run` may compute a step of this shape: from the second such step on."""
        if key in self._graphs:
            return True
        again = key in self._seen
        self._seen.add(key)
        return again and len(self._graphs) < MAX_GRAPHS

    def _takes(self, request: PromptRequest, count: int) -> bool:
        # the oracle cannot be said as bounds on experts and mass
        if request.policy.kind == "oracle":
            return False
        return count > 1 or request.num_computed < LONGEST_DECODED

    def _max_k(self, plan: Plan) -> int | None:
        """The bound of a graph; None where dense and sparse tokens are cheaper apart."""
        experts, config = self.num_experts, self.model.config
        dense = sum(n for r, n in plan if r.policy.uses_all(experts))
        sparse = [(r, n) for r, n in plan if not r.policy.uses_all(experts)]
        if not sparse:
            return 0
        max_k = k_bucket(max(r.policy.limits(experts)[0] for r, _ in sparse), experts)
        if not dense:
            return max_k
        if not self.decoder.is_plain:  # dense and sparse tokens are then computed apart
            return None
        size = config.intermediate_size // experts
        itemsize = self.model.embedding.weight.element_size()
        shape = FFNShape(config.hidden_size, experts, size, itemsize)
        together = one_pass_is_cheaper(shape, dense, sum(n for _, n in sparse), max_k)
        return experts if together else None

    def run(self, plan: Plan, key: PromptKey) -> tuple[Tensor, list[int]]:
        """Compute the plan's tokens.

        Returns:
            Logits [n, V] of the n requests whose known tokens are then all computed, which the next
            run overwrites; and how many experts ran: of each token over all layers, of each layer
            over all tokens, and the distinct ones of each layer.
        """
        static = self._static_prompt()
        static.fill(plan, key, self.num_experts, self.cache.block_size, self._block_q)
        if key not in self._graphs:
            self._graphs[key] = self._capture(key)
        self._graphs[key].replay()
        ready = sum(count == request.num_uncomputed for request, count in plan)
        return self._logits_RV[:ready], self._totals(key, sum(count for _, count in plan))

    def _static_prompt(self) -> StaticPrompt:
        """The step's tensors, allocated when they are first needed."""
        if self._static is None:
            tokens, requests = self.most_tokens, self.most_requests
            config, device = self.model.config, self.cache.slots.device
            most_blocks = -(-self._longest // self.cache.block_size)
            pieces = most_pieces(tokens, requests, self._block_q)
            self._static = StaticPrompt(tokens, requests, most_blocks, pieces, device)
            numbers = tokens + 2 * config.num_hidden_layers
            self._counts = torch.zeros(numbers, dtype=torch.int32, device=device)
            self._logits_RV = torch.zeros(requests, config.vocab_size, device=device)
        return self._static

    def _totals(self, key: PromptKey, tokens: int) -> list[int]:
        layers, experts = self.model.config.num_hidden_layers, self.num_experts
        if not key.max_k:
            return [layers * experts] * tokens + [tokens * experts] * layers + [experts] * layers
        found: list[int] = self._counts[: key.tokens + 2 * layers].tolist()
        return found[:tokens] + found[key.tokens :]

    def compute(self, key: PromptKey) -> None:
        """What a graph holds: the model over the static tensors, with nothing read by the host."""
        static, rows = self._static_prompt(), slice(key.tokens)
        pieces = most_pieces(key.tokens, key.requests, self._block_q)
        chunks = ChunkBatch(static.table_RM[: key.requests], static.pieces_N4[:pieces])
        turns = self.model.turns(static.positions_T[rows])
        attend = ChunkAttend(self.cache, turns, static.slots_T[rows], chunks)
        policy = PolicyBatch(static.k_T[rows], static.mass_T[rows], key.max_k)
        trace = Trace()
        wanted = static.rows_R[: key.requests]
        ids_T, positions_T = static.ids_T[rows], static.positions_T[rows]
        logits_RV = self.decoder.forward(
            ids_T, attend, policy, trace, wanted, positions_T=positions_T
        )
        self._logits_RV[: key.requests].copy_(logits_RV)
        if key.max_k:
            found = count_chosen(torch.stack(trace.choices()))
            self._counts[: found.numel()].copy_(found)

    def _capture(self, key: PromptKey) -> Replay:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return capture(lambda: self.compute(key), self._pool)
