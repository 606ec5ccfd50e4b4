"""One generation as a route sees it: from a prompt's text to token events, and its end.

Between HTTP and the worker: admits requests up to the server's limit, tokenises off the event
loop, checks the server's own limits, and makes sure that whatever is started is also closed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, TypeVar

from engine.errors import EngineStopped, InvalidRequest, Overloaded, require
from engine.policy import ExpertPolicy
from engine.serving.engine import Engine
from engine.serving.event_stream import EventStream
from engine.serving.request import Request, SamplingParams, TokenEvent
from engine.serving.stats import Numbers
from engine.serving.worker import Worker
from engine.text.grammar import Grammar
from server import calls
from server.calls import Call
from server.deadlines import TimedEvents, late_error, timeout_of
from server.errors import ContextTooLong, UnknownModel
from server.fleet import Fleet
from server.loop_lag import LoopLag
from server.metrics import make_registry
from server.ratelimit import RateLimiter
from server.reload import Reloader
from server.settings import Settings

# What clients of Hugging Face call the model of a server that has one, and a name that stays when a
# checkpoint replaces another.
MODEL_ALIASES: Final = ("ambidex", "tgi", "dummy")
# New grammars that may wait to be compiled, some seconds each at worst.
MAX_COMPILING: Final = 8

T = TypeVar("T")

# Parameters once the prompt's length is known: how many tokens are left for the output.
SamplingFor = Callable[[int], SamplingParams]
# A text, token ids, or what makes ids of the engine that will serve them.
Prompt = str | list[int] | Callable[[Engine], list[int]]


@dataclass
class Generation:
    """An accepted request, its engine and events, and how long the steps before the engine took."""

    request: Request
    engine: Engine
    events: TimedEvents
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


class Frontend:
    """The worker as the routes use it.

    Attributes:
        fleet: steps the engine, and replaces it if it fails.
        reloader: gives the fleet new weights.
        settings: the server's limits.
        active: requests admitted and not yet closed.
        lag: how late the event loop is.
        deadlines_exceeded: requests that were ended because they took too long.
        key_requests: HTTP requests that generated, by key.
        key_tokens: tokens generated for them.
        limiter: what each key may still use.
        registry: the metrics of this server.
    """

    def __init__(self, worker: Worker, settings: Settings) -> None:
        self.fleet = Fleet(worker, settings)
        self.reloader = Reloader(self.fleet, settings)
        self.settings = settings
        self.active = 0
        self.lag = LoopLag()
        self.deadlines_exceeded = 0
        self.key_requests: Counter[str] = Counter()
        self.key_tokens: Counter[str] = Counter()
        self.limiter = RateLimiter(settings.requests_per_minute, settings.tokens_per_minute)
        self.registry = make_registry(self)
        self._compiler = ThreadPoolExecutor(1, "ambidex-grammars")
        self._compiling = 0

    @property
    def worker(self) -> Worker:
        """The one that serves now."""
        return self.fleet.worker

    @property
    def engine(self) -> Engine:
        """The one that serves now."""
        return self.worker.engine

    def numbers(self) -> Numbers:
        """What has been counted since the start."""
        return self.fleet.numbers()

    @property
    def ready(self) -> bool:
        return self.fleet.ready

    @property
    def draining(self) -> bool:
        """Whether the server is about to stop; new requests are refused."""
        return self.fleet.draining

    @property
    def model_name(self) -> str:
        """What clients call the model that serves now."""
        return self.settings.model_name or self.engine.checkpoint.path.resolve().name

    def check_model(self, name: str | None) -> None:
        """Raise UnknownModel unless `name` means the model that is served; None does."""
        if name not in (None, self.model_name, *MODEL_ALIASES):
            raise UnknownModel(
                f"model {name[:100]!r} is not served here; it is called {self.model_name!r}"
            )

    @property
    def dtype(self) -> str:
        """Name of the type that the model runs in."""
        asked = self.engine.config.dtype
        return self.engine.model_config.torch_dtype if asked == "auto" else asked

    @property
    def max_total_tokens(self) -> int:
        """Prompt plus output of one request: the model's limit, and what the KV cache can hold."""
        return total_limit(self.engine)

    @property
    def max_input_tokens(self) -> int:
        return self.settings.input_limit(self.max_total_tokens)

    async def start(
        self,
        inputs: str,
        sampling: SamplingFor,
        policy: ExpertPolicy,
        truncate: int | None = None,
        grammar: Grammar | None = None,
    ) -> Generation:
        """Tokenise, check and submit one request. The caller must `close` what it gets.

        `grammar` is what `sampling` will have: it is compiled first.

        Raises:
            InvalidRequest: the request can never be served as asked.
            Overloaded: too many requests are here already.
            EngineStopped: the server is draining or its engine has failed.
            DeadlineExceeded: tokenising and compiling alone has taken longer than the request may.
        """

        def make(engine: Engine) -> list[Request]:
            with engine.stats.counting_rejections():
                ids = self._tokenize(engine, inputs, truncate)
                params = sampling(total_limit(engine) - len(ids))
            return [engine.make_request(ids, params, policy)]

        (generation,) = await self._start(1, make, grammar)
        return generation

    async def start_all(
        self,
        prompts: Mapping[str, Prompt],
        sampling: SamplingFor,
        policy: ExpertPolicy,
        n: int,
        check: Callable[[list[Request]], None],
        grammar: Grammar | None = None,
    ) -> list[Generation]:
        """As `start`, for `n` completions of each prompt: all of them, or none.

        Args:
            prompts: by the names that complaints use.
            sampling: parameters of each.
            policy: of all.
            n: completions of each prompt.
            check: raises InvalidRequest if they are too much together.
            grammar: as in `start`.
        """
        count, limit = len(prompts) * n, self.settings.max_concurrent_requests

        def make(engine: Engine) -> list[Request]:
            requests: list[Request] = []
            for name, prompt in prompts.items():
                with engine.stats.counting_rejections():
                    ids = self._ids(engine, name, prompt)
                    params = sampling(total_limit(engine) - len(ids))
                requests += engine.make_requests(ids, params, policy, n)
            with engine.stats.counting_rejections():
                check(requests)
            return requests

        with self.fleet.own.counting_rejections():
            message = f"prompts times n must be at most {limit} (max_concurrent_requests), got"
            require(count <= limit, f"{message} {count}", InvalidRequest)
        return await self._start(count, make, grammar)

    async def _start(
        self,
        count: int,
        make: Callable[[Engine], list[Request]],
        grammar: Grammar | None,
    ) -> list[Generation]:
        """Submit the `count` requests that `make` makes in a thread, after their grammar."""
        started, call = time.perf_counter(), calls.current()
        with self.fleet.own.counting_rejections():
            seconds = timeout_of(call.timeout, self.settings)
            self._admit(count)
        if call.deadline is None:
            call.deadline = asyncio.get_running_loop().time() + max(0.0, seconds - call.seconds)
        generations: list[Generation] = []
        try:
            # Long prompts take a while to tokenise; the event loop goes on meanwhile.
            with self.fleet.lease() as worker:
                async with asyncio.timeout_at(call.deadline):
                    if grammar is not None:
                        await self._compile(worker.engine, grammar)
                    requests = await asyncio.to_thread(make, worker.engine)
                validated = time.perf_counter() - started
                for request in requests:
                    events = self._timed(await worker.submit(request), call, seconds)
                    release = self._release
                    generations.append(
                        Generation(request, worker.engine, events, started, validated, release)
                    )
        except BaseException as error:
            self.active -= count - len(generations)
            await close_all(generations)
            if isinstance(error, TimeoutError):
                self._late(call)
                raise late_error(seconds) from None
            raise
        return generations

    async def _compile(self, engine: Engine, grammar: Grammar) -> None:
        """Have `engine` compile a grammar, after those that came before it.

        One thread does it, so that who waits for a grammar keeps no thread from tokenising.
        """
        if engine.grammars.knows(grammar):
            return
        with engine.stats.counting_rejections():
            if self._compiling >= MAX_COMPILING:
                raise Overloaded(f"{MAX_COMPILING} new grammars are waiting to be compiled already")
            self._compiling += 1
            try:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._compiler, engine.grammars.matcher, grammar)
            finally:
                self._compiling -= 1

    async def in_thread(self, work: Callable[[], T]) -> T:
        """What `work` returns, off the event loop, in the place and the time of one request.

        Raises:
            Overloaded, EngineStopped, DeadlineExceeded: as `start` does.
        """
        with self.fleet.own.counting_rejections():
            seconds = timeout_of(calls.current().timeout, self.settings)
            self._admit(1)
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.to_thread(work)
        except TimeoutError:
            self.deadlines_exceeded += 1
            raise late_error(seconds) from None
        finally:
            self._release()

    def _timed(self, events: EventStream, call: Call, seconds: float) -> TimedEvents:
        """`events`, counted for the call's key, until the call's deadline."""
        assert call.deadline is not None
        call.outcome = "abort"  # unless it ends otherwise

        def see(taken: Sequence[TokenEvent]) -> None:
            before = call.generated_tokens
            for event in taken:
                call.note(event)
            self.limiter.generated(call.key_name, call.generated_tokens - before)

        return TimedEvents(events, call.deadline, seconds, see, lambda: self._late(call))

    def _late(self, call: Call) -> None:
        call.outcome = "timeout"
        self.deadlines_exceeded += 1

    async def drain(self, timeout: float) -> None:
        """Refuse new requests; return once those here have finished, aborted after `timeout`."""
        await self.fleet.drain(timeout)

    def count_invalid(self) -> None:
        """Count a request that was refused because of what it says."""
        self.count_rejection("invalid")

    def count_rejection(self, reason: str) -> None:
        """Count a request that was refused before it got here."""
        self.fleet.own.reject(reason)

    def count_call(self, call: Call) -> None:
        """Count an HTTP request that generated, for its key."""
        if call.outcome is not None:
            self.key_requests[call.key_name] += 1
            self.key_tokens[call.key_name] += call.generated_tokens

    def _admit(self, count: int) -> None:
        limit = self.settings.max_concurrent_requests
        require(not self.draining, "the server is shutting down", EngineStopped)
        if self.active + count > limit:
            raise Overloaded(
                f"the server has {self.active} of at most {limit} requests already "
                "(max_concurrent_requests)"
            )
        self.active += count

    def _release(self) -> None:
        self.active -= 1

    def _tokenize(self, engine: Engine, inputs: str, truncate: int | None) -> list[int]:
        limit = self.settings.input_limit(total_limit(engine))
        require(
            truncate is None or truncate <= limit,
            f"parameters.truncate must be from 1 to {limit}, got {truncate}",
            InvalidRequest,
        )
        ids = engine.tokenizer.encode_prompt(inputs, truncate)
        self._check_length("inputs", ids, limit)
        return ids

    def _ids(self, engine: Engine, name: str, prompt: Prompt) -> list[int]:
        """The token ids of a prompt that complaints call `name`."""
        if isinstance(prompt, str):
            ids = engine.tokenizer.encode_prompt(prompt)
        else:
            ids = prompt if isinstance(prompt, list) else prompt(engine)
        self._check_length(name, ids, self.settings.input_limit(total_limit(engine)))
        top = engine.model_config.vocab_size - 1
        message = f"token ids of {name} must be from 0 to {top}"
        require(min(ids) >= 0 and max(ids) <= top, message, InvalidRequest)
        return ids

    @staticmethod
    def _check_length(name: str, ids: list[int], limit: int) -> None:
        message = f"{name} must have from 1 to {limit} tokens, got {len(ids)}"
        require(len(ids) >= 1, message, InvalidRequest)
        require(len(ids) <= limit, message, ContextTooLong)


def total_limit(engine: Engine) -> int:
    """Tokens of a prompt and its output together that `engine` can serve."""
    return min(engine.max_model_len, engine.num_blocks * engine.config.block_size)


async def close_all(generations: Iterable[Generation]) -> None:
    """Close every one, whatever closing another raises."""
    await asyncio.gather(*(each.close() for each in generations))
