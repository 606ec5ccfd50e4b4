"""Which request computes how many tokens in the next step. Bookkeeping alone: no tensors.

Continuous batching with chunked prefill, first come, first served. The requests form one line in
order of arrival: `running` is its head, `waiting` the rest. A step takes

1. one token of every running request that decodes,
2. then chunks of the prompts of running requests, oldest first,
3. then newly admitted requests, while blocks, seats and token budget last.

A request gets the blocks of all its known tokens when it is admitted, so only decoding can find the
cache full. Then the youngest running request is *preempted*: it gives its blocks up, returns to the
head of `waiting` and later recomputes prompt and output. Only the youngest ever yields, so the
line's order is kept, the oldest request always advances, and nobody starves.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from engine.config import EngineConfig
from engine.errors import InvalidRequest, Overloaded, require
from engine.kv_blocks import BlockAllocator
from engine.request import Request, Status


class Scheduled(NamedTuple):
    """A request's part of one step: its next `num_tokens` uncomputed tokens."""

    request: Request
    num_tokens: int


Plan = list[Scheduled]


class Scheduler:
    """The line of requests, and the blocks that they own.

    Attributes:
        running: requests that own blocks, oldest first.
        waiting: requests that own none; all are younger than those running.
        num_queued: requests that wait and were never admitted.
        queued_tokens: prompt tokens of those.
        preemptions: how often a request had to give its blocks up.
    """

    def __init__(self, config: EngineConfig, allocator: BlockAllocator, max_model_len: int) -> None:
        self.config = config
        self.allocator = allocator
        self.max_model_len = max_model_len
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.num_queued = 0
        self.queued_tokens = 0
        self.preemptions = 0
        self._by_id: dict[str, Request] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    @property
    def has_work(self) -> bool:
        return bool(self._by_id)

    def check_fits(self, request: Request) -> None:
        """Raise InvalidRequest if the request is too long to be served even when it is alone."""
        tokens = self.allocator.num_blocks * self.allocator.block_size
        limit = min(self.max_model_len, tokens)
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
        """Put a request at the end of the line.

        Raises:
            InvalidRequest: it can never fit, or its id is in use.
            Overloaded: the queue is full.
        """
        require(
            request.request_id not in self._by_id,
            f"request_id {request.request_id[:64]!r} is already in use",
            InvalidRequest,
        )
        self.check_fits(request)
        self.check_room(request.prompt_len)
        self._by_id[request.request_id] = request
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
            self.running.remove(request)
        else:
            self.waiting.remove(request)
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
        """Note that the step was computed: its tokens have keys and values now."""
        for request, num_tokens in plan:
            request.num_computed += num_tokens

    def check_integrity(self) -> None:
        """Assert that blocks, line and counters agree."""
        self.allocator.check_integrity(request.blocks for request in self.running)
        for request in self.running:
            assert len(request.blocks) >= self.allocator.blocks_for(request.num_computed)
            assert request.status is Status.RUNNING
        fresh = [request for request in self.waiting if not request.preemptions]
        assert not any(request.blocks or request.num_computed for request in self.waiting)
        assert self.num_queued == len(fresh)
        assert self.queued_tokens == sum(request.prompt_len for request in fresh)
        assert len(self._by_id) == len(self.running) + len(self.waiting)

    def _plan_decodes(self) -> Plan:
        """One token of every decoding request, oldest first; makes room by preemption."""
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
        """Back to the head of the waiting line; everything is computed again later."""
        self.running.remove(request)
        self._release(request)
        request.status = Status.WAITING
        request.num_computed = 0
        request.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(request)

    def _plan_chunks(self, plan: Plan, budget: int) -> int:
        """Chunks of running prompts, oldest first; returns what is left of the budget."""
        for request in self.running:
            if request.num_uncomputed > 1 and budget:
                num_tokens = min(request.num_uncomputed, budget)
                plan.append(Scheduled(request, num_tokens))
                budget -= num_tokens
        return budget

    def _plan_admissions(self, plan: Plan, budget: int) -> None:
        """Admit from the head of the line, never past a request that does not fit yet."""
        while self.waiting and budget and len(self.running) < self.config.max_num_seqs:
            if not self._admit(self.waiting[0]):
                break
            request = self.running[-1]
            num_tokens = min(request.num_uncomputed, budget)
            plan.append(Scheduled(request, num_tokens))
            budget -= num_tokens

    def _admit(self, request: Request) -> bool:
        """Move the head of `waiting` to `running` if its known tokens find blocks.

        Each running request keeps one block in reserve: without it the next decode would preempt
        the newcomer at once and its prefill would be wasted, over and over.
        """
        needed = self.allocator.blocks_for(len(request.token_ids))
        if needed + len(self.running) > self.allocator.num_free:
            return False
        self.waiting.popleft()
        self._count_queued(request, -1)
        request.blocks = self.allocator.allocate(needed)
        request.status = Status.RUNNING
        self.running.append(request)
        return True

    def _release(self, request: Request) -> None:
        self.allocator.free(request.blocks)
        request.blocks = []

    def _count_queued(self, request: Request, sign: int) -> None:
        if not request.preemptions:
            self.num_queued += sign
            self.queued_tokens += sign * request.prompt_len
