"""Which request computes how many tokens in the next step. Bookkeeping alone: no tensors.

Continuous batching with chunked prefill. The requests form one line; `running` are those of it that
own blocks, `waiting` the others. A step takes

1. one token of every running request that decodes,
2. then chunks of the prompts of running requests, first in line first,
3. then newly admitted requests, first in line first, while blocks, seats and token budget last;
   nobody overtakes a request that does not fit yet.

**The line.** Requests stand in the order in which they arrived, and no two ever change places.

**Preemption.** A request gets the blocks of all its known tokens when it is admitted, so only
decoding can find the cache full. Then the last running request is *preempted*: it gives its blocks
up, returns to the head of `waiting` and later recomputes what is no longer cached.

**The invariant.** Only requests later in line yield, so the first in line always advances: every
plan has a token of it, and it keeps its blocks. It ends after so many steps, then the next is
first: nobody starves.

**Prefix caching.** The full blocks of computed tokens are published under keys that name their
whole content (`engine.serving.kv_blocks`), after the step that computed them. An admitted request
shares the blocks of its longest known prefix and computes the rest: its last known token at least,
whose logits the next token is drawn from.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from typing import NamedTuple

from engine.config import EngineConfig
from engine.errors import InvalidRequest, Overloaded, require
from engine.serving.kv_blocks import BlockAllocator, child_key, root_key
from engine.serving.request import Request, Status


class Scheduled(NamedTuple):
    """A request's part of one step: its next `num_tokens` uncomputed tokens."""

    request: Request
    num_tokens: int


Plan = list[Scheduled]


def _rank(request: Request) -> int:
    return request.rank


class Scheduler:
    """The line of requests, and the blocks that they own.

    Attributes:
        running: requests that own blocks, first in line first.
        waiting: requests that own none, first in line first.
        num_queued: requests that wait and were never admitted.
        queued_tokens: prompt tokens of these.
        preemptions: how often a request had to give its blocks up.
        prefix_queried_tokens: prompt tokens that were looked up in the prefix cache.
        prefix_hit_tokens: how many of these were found.
    """

    def __init__(self, config: EngineConfig, allocator: BlockAllocator, max_model_len: int) -> None:
        self.config = config
        self.allocator = allocator
        self.max_model_len = max_model_len
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.num_queued = 0
        self.queued_tokens = 0
        self.preemptions = 0
        self.prefix_queried_tokens = 0
        self.prefix_hit_tokens = 0
        self._arrivals = itertools.count()
        self._by_id: dict[str, Request] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    @property
    def has_work(self) -> bool:
        return bool(self._by_id)

    @property
    def max_request_len(self) -> int:
        """Tokens of prompt and output together that a request may have."""
        return min(self.max_model_len, self.allocator.num_blocks * self.allocator.block_size)

    def check_fits(self, request: Request) -> None:
        """Raise InvalidRequest if the request is too long to be served even when it is alone."""
        limit = self.max_request_len
        require(
            request.max_len <= limit,
            f"input tokens + max_new_tokens must be at most {limit}, got {request.prompt_len} + "
            f"{request.sampling.max_new_tokens}",
            InvalidRequest,
        )

    def check_room(self, prompt_len: int, requests: int = 0, tokens: int = 0) -> None:
        """Raise Overloaded if the queue cannot take another prompt of `prompt_len` tokens.

        Preempted requests do not count: they were accepted long ago. An empty queue takes any
        prompt, so a bound below a prompt's length does not shut it out for ever.

        Args:
            requests: further requests that are about to be added before this one.
            tokens: their prompt tokens.
        """
        queued, limit = self.num_queued + requests, self.config.max_waiting
        if queued >= limit:
            raise Overloaded(f"{queued} requests are waiting, at most {limit} may")
        queued_tokens, token_limit = self.queued_tokens + tokens, self.config.max_waiting_tokens
        if queued and queued_tokens + prompt_len > token_limit:
            raise Overloaded(
                f"{queued_tokens} prompt tokens are waiting; {prompt_len} more would exceed the "
                f"limit of {token_limit}"
            )

    def add(self, request: Request) -> None:
        """Put a request in its place in the line. It has passed `check_fits`.

        Raises:
            InvalidRequest: its id is in use.
            Overloaded: the queue is full.
        """
        require(
            request.request_id not in self._by_id,
            f"request_id {request.request_id[:64]!r} is already in use",
            InvalidRequest,
        )
        assert request.max_len <= self.max_request_len, "a request that never fits blocks the line"
        self.check_room(request.prompt_len)
        self._by_id[request.request_id] = request
        request.rank = next(self._arrivals)
        self.waiting.append(request)
        self._count_queued(request, 1)

    def abort(self, request_id: str) -> Request | None:
        """Take a request out, wherever it is; None if it is unknown or has finished."""
        request = self._by_id.get(request_id)
        if request is not None:
            self.finish(request)
        return request

    def finish(self, request: Request) -> None:
        """Take a request out and free its blocks."""
        if request.status is Status.RUNNING:
            _leave(self.running, request)
        else:
            _leave(self.waiting, request)
            self._count_queued(request, -1)
        self._release(request)
        request.status = Status.FINISHED
        del self._by_id[request.request_id]

    def schedule(self) -> Plan:
        """Plan the next step; it may admit and preempt. Empty if nothing can run."""
        plan = self._plan_decodes()
        budget = self.config.max_num_batched_tokens - len(plan)
        budget = self._plan_chunks(plan, budget)
        self._plan_admissions(plan, budget)
        return plan

    def advance(self, plan: Plan) -> None:
        """Note that the step was computed: its keys and values are cached and may be shared."""
        for request, num_tokens in plan:
            first = request.num_computed // self.allocator.block_size
            request.num_computed += num_tokens
            if self.config.prefix_caching:
                for index in range(first, request.num_computed // self.allocator.block_size):
                    self.allocator.publish(request.blocks[index], self._key(request, index))

    def check_integrity(self) -> None:
        """Assert that blocks, line and counters agree."""
        self.allocator.check_integrity(request.blocks for request in self.running)
        for request in self.running:
            assert len(request.blocks) >= self.allocator.blocks_for(request.num_computed)
            assert request.status is Status.RUNNING
        fresh = [request for request in self.waiting if not request.preemptions]
        assert not any(request.blocks or request.num_computed for request in self.waiting)
        line = self.running + self.waiting
        assert line == sorted(line, key=_rank), "the line is out of order"
        assert self.num_queued == len(fresh)
        assert self.queued_tokens == sum(request.prompt_len for request in fresh)
        assert len(self._by_id) == len(self.running) + len(self.waiting)

    def _plan_decodes(self) -> Plan:
        """One token of every decoding request, first in line first; makes room by preemption."""
        plan: Plan = []
        for request in [r for r in self.running if r.num_uncomputed == 1]:
            if request.status is Status.RUNNING and self._make_room(request):
                plan.append(Scheduled(request, 1))
        return plan

    def _make_room(self, request: Request) -> bool:
        """Give `request` the block of its next token; False if it was itself preempted."""
        missing = self.allocator.blocks_for(len(request.token_ids)) - len(request.blocks)
        while missing > self.allocator.num_free and request.status is Status.RUNNING:
            self._preempt(self.running[-1])
        if request.status is not Status.RUNNING:
            return False
        request.blocks += self.allocator.allocate(max(missing, 0))
        return True

    def _preempt(self, request: Request) -> None:
        """Return the request to the head of `waiting`; what left the cache is computed again."""
        _leave(self.running, request)
        self._release(request)
        request.status = Status.WAITING
        request.num_computed = 0
        request.preemptions += 1
        self.preemptions += 1
        self.waiting.insert(0, request)

    def _plan_chunks(self, plan: Plan, budget: int) -> int:
        """Chunks of running prompts, first in line first; returns what is left of the budget."""
        for request in self.running:
            if request.num_uncomputed > 1 and budget:
                num_tokens = min(request.num_uncomputed, budget)
                plan.append(Scheduled(request, num_tokens))
                budget -= num_tokens
        return budget

    def _plan_admissions(self, plan: Plan, budget: int) -> None:
        """Admit from the head of the line, never past a request that does not fit yet."""
        while self.waiting and budget:
            request = self.waiting[0]
            if not self._admit(request):
                break
            num_tokens = min(request.num_uncomputed, budget)
            plan.append(Scheduled(request, num_tokens))
            budget -= num_tokens

    def _admit(self, request: Request) -> bool:
        """Move the head of `waiting` to `running` if a seat is free and its known tokens find room.

        Each running request keeps one block in reserve: without it the next decode would preempt
        the newcomer at once and its prefill would be wasted, over and over.
        """
        available = self.allocator.num_free - len(self.running)
        if len(self.running) >= self.config.max_num_seqs or available < 1:
            return False
        cached = self._cached_blocks(request)
        missing = self.allocator.blocks_for(len(request.token_ids)) - len(cached)
        if missing + sum(map(self.allocator.is_free, cached)) > available:
            return False
        self.allocator.share(cached)
        request.blocks = cached + self.allocator.allocate(missing)
        request.num_computed = len(cached) * self.allocator.block_size
        self._count_prefix(request)
        self._count_queued(request, -1)
        request.status = Status.RUNNING
        _leave(self.waiting, request)
        self.running.append(request)
        return True

    def _may_use_cache(self, request: Request) -> bool:
        """Whether it may use the prefix cache: not if the logits of its whole prompt are wanted."""
        wants_prompt = request.sampling.prompt_logprobs and not request.num_output
        return self.config.prefix_caching and not wants_prompt

    def _cached_blocks(self, request: Request) -> list[int]:
        """The findable blocks of the longest prefix, without the last known token."""
        blocks: list[int] = []
        if self._may_use_cache(request):
            for index in range((len(request.token_ids) - 1) // self.allocator.block_size):
                block = self.allocator.find(self._key(request, index))
                if block is None:
                    break
                blocks.append(block)
        return blocks

    def _key(self, request: Request, index: int) -> bytes:
        """The key of its full block `index`; each is computed once, in order."""
        keys, size = request.block_keys, self.allocator.block_size
        for start in range(len(keys) * size, (index + 1) * size, size):
            policy = request.policy
            # str(policy) would not do: it rounds.
            parent = keys[-1] if keys else root_key(f"{policy.kind}:{policy.value!r}")
            keys.append(child_key(parent, request.token_ids[start : start + size]))
        return keys[index]

    def _release(self, request: Request) -> None:
        self.allocator.free(request.blocks)
        request.blocks = []

    def _count_prefix(self, request: Request) -> None:
        """Count what a prompt found in the prefix cache, at its first admission."""
        if self._may_use_cache(request) and not request.preemptions:
            request.cached_prompt_tokens = request.num_computed
            self.prefix_queried_tokens += request.prompt_len
            self.prefix_hit_tokens += request.num_computed

    def _count_queued(self, request: Request, sign: int) -> None:
        if not request.preemptions:
            self.num_queued += sign
            self.queued_tokens += sign * request.prompt_len


def _leave(line: list[Request], request: Request) -> None:
    """Take a request out of a line that is in order."""
    place = bisect_left(line, request.rank, key=_rank)
    assert line[place] is request
    del line[place]
