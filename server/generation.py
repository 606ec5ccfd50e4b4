"""One generation as a route sees it: from a prompt's text to token events, and its end.

Between HTTP and the worker: admits requests up to the server's limit, tokenises off the event
loop, checks the server's own limits, and makes sure that whatever is started is also closed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from engine.engine import Engine
from engine.errors import EngineStopped, InvalidRequest, Overloaded, require
from engine.request import ExpertPolicy, Request, SamplingParams, TokenEvent, Usage
from engine.worker import EventStream, Worker
from server.errors import GenerationFailed, IncompleteGeneration
from server.metrics import make_registry
from server.settings import Settings

# Parameters once the prompt's length is known: how many tokens are left for the output.
SamplingFor = Callable[[int], SamplingParams]


@dataclass
class Generation:
    """An accepted request, its events, and how long the steps before the engine took."""

    request: Request
    events: EventStream
    started: float
    validation_seconds: float
    _release: Callable[[], None]
    _closed: bool = field(default=False, init=False)

    async def close(self) -> None:
        """Abort what has not finished and give up the place; may be called again."""
        if self._closed:
            return
        self._closed = True
        try:
            await self.events.aclose()
        finally:
            self._release()


@dataclass
class Output:
    """What a finished generation said."""

    text: str
    events: list[TokenEvent]
    finish_reason: str
    usage: Usage


class Frontend:
    """The worker as the routes use it.

    Attributes:
        worker: steps the engine.
        settings: the server's limits.
        active: requests admitted and not yet closed.
        draining: set when the server is about to stop; new requests are refused.
        registry: the metrics of this server.
    """

    def __init__(self, worker: Worker, settings: Settings) -> None:
        self.worker = worker
        self.settings = settings
        self.active = 0
        self.draining = False
        self.registry = make_registry(worker.engine.stats, lambda: self.ready, lambda: self.active)

    @property
    def engine(self) -> Engine:
        return self.worker.engine

    @property
    def ready(self) -> bool:
        return self.worker.ready and not self.draining

    @property
    def dtype(self) -> str:
        """Name of the type that the model runs in."""
        asked = self.engine.config.dtype
        return self.engine.model_config.torch_dtype if asked == "auto" else asked

    @property
    def max_total_tokens(self) -> int:
        """Prompt plus output of one request: the model's limit, and what the KV cache can hold."""
        cache = self.engine.num_blocks * self.engine.config.block_size
        return min(self.engine.max_model_len, cache)

    @property
    def max_input_tokens(self) -> int:
        return self.settings.input_limit(self.max_total_tokens)

    async def start(
        self,
        inputs: str,
        sampling: SamplingFor,
        policy: ExpertPolicy,
        truncate: int | None = None,
    ) -> Generation:
        """Tokenise, check and submit one request. The caller must `close` what it gets.

        Raises:
            InvalidRequest: the request can never be served as asked.
            Overloaded: too many requests are here already.
            EngineStopped: the server is draining or its engine has failed.
        """
        started = time.perf_counter()
        with self.engine.stats.counting_rejections():
            self._admit()
        try:
            # Long prompts take a while to tokenise; the event loop goes on meanwhile.
            request = await asyncio.to_thread(self._prepare, inputs, sampling, policy, truncate)
            validated = time.perf_counter() - started
            events = await self.worker.submit(request)
        except BaseException:
            self._release()
            raise
        return Generation(request, events, started, validated, self._release)

    async def drain(self, timeout: float) -> None:
        """Refuse new requests; return once those here have finished, aborted after `timeout`."""
        self.draining = True
        await self.worker.drain(timeout)

    def count_invalid(self) -> None:
        """Count a request that was refused before it got here."""
        self.engine.stats.reject("invalid")

    def _admit(self) -> None:
        limit = self.settings.max_concurrent_requests
        require(not self.draining, "the server is shutting down", EngineStopped)
        if self.active >= limit:
            raise Overloaded(f"the server has {limit} requests already (max_concurrent_requests)")
        self.active += 1

    def _release(self) -> None:
        self.active -= 1

    def _prepare(
        self, inputs: str, sampling: SamplingFor, policy: ExpertPolicy, truncate: int | None
    ) -> Request:
        """The engine's request; runs in a thread."""
        with self.engine.stats.counting_rejections():
            ids = self._tokenize(inputs, truncate)
            params = sampling(self.max_total_tokens - len(ids))
        return self.engine.make_request(ids, params, policy)

    def _tokenize(self, inputs: str, truncate: int | None) -> list[int]:
        limit = self.max_input_tokens
        require(
            truncate is None or truncate <= limit,
            f"parameters.truncate must be from 1 to {limit}, got {truncate}",
            InvalidRequest,
        )
        ids = self.engine.tokenizer.encode(inputs)
        ids = ids[-truncate:] if truncate else ids
        require(
            1 <= len(ids) <= limit,
            f"inputs must have from 1 to {limit} tokens, got {len(ids)}",
            InvalidRequest,
        )
        return ids


def check(event: TokenEvent) -> None:
    """Raise if `event` ends its request in any way but a finished generation.

    Raises:
        GenerationFailed: the model failed.
        IncompleteGeneration: the server gave the request up.
    """
    if event.finish_reason == "error":
        raise GenerationFailed(event.error or "generation failed")
    if event.finish_reason == "abort":
        raise IncompleteGeneration("the server ended the request before it was complete")


async def checked_events(generation: Generation) -> AsyncGenerator[TokenEvent, None]:
    """The events of a generation, the terminal one last; raises as `check` does."""
    async for event in generation.events:
        check(event)
        yield event
        if event.finish_reason is not None:
            return
    raise IncompleteGeneration("the engine ended the request without a last token")


async def collect(generation: Generation) -> Output:
    """Everything that a generation says, once it is finished."""
    events = [event async for event in checked_events(generation)]
    last = events[-1]
    assert last.finish_reason is not None
    assert last.usage is not None
    return Output("".join(e.text for e in events), events, last.finish_reason, last.usage)
