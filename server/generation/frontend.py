"""The frontend lies between the routes and the worker.

It admits requests up to the server's limit, has their prompts tokenised off the event loop, checks
the server's own limits, and makes sure that whatever is started is also closed.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from engine.errors import EngineStopped, InvalidRequest, Overloaded, require
from engine.policy import ExpertPolicy
from engine.serving.engine import Engine, SamplingFor
from engine.serving.event_stream import EventStream
from engine.serving.request import Request, SamplingParams, TokenEvent
from engine.serving.stats import Numbers
from engine.serving.worker import Worker
from engine.text.grammar import Grammar
from server.engines.fleet import Fleet
from server.engines.reload import Reloader
from server.errors import ContextTooLong, UnknownModel
from server.generation.submission import Prompt, Submission, close_all
from server.http import calls
from server.http.calls import Call
from server.http.deadlines import TimedEvents, late_error, timeout_of
from server.http.ratelimit import RateLimiter
from server.metrics.collector import make_registry
from server.metrics.loop_lag import LoopLag
from server.settings import Settings

# Names that always mean the model that is served. Clients of Hugging Face send "tgi" and "dummy"
# to a server that has one model.
MODEL_ALIASES: Final = ("ambidex", "tgi", "dummy")
# How many new grammars may wait to be compiled; each may take some seconds.
MAX_COMPILING: Final = 8

T = TypeVar("T")


class Frontend:
    """The engine as the routes use it.

    Attributes:
        fleet: owns the workers, and replaces one that fails.
        reloader: gives the fleet new weights.
        settings: the server's limits.
        active: how many requests were admitted and are not closed yet.
        lag: measures how late the event loop is.
        deadlines_exceeded: how many requests were ended because they took too long.
        key_requests: how many HTTP requests generated, by key.
        key_tokens: how many tokens were generated for them.
        limiter: knows what each key may still use.
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
        self._again = itertools.count(2)  # numbers for requests whose ids are in use

    @property
    def worker(self) -> Worker:
        """The worker that serves now."""
        return self.fleet.worker

    @property
    def engine(self) -> Engine:
        """The engine that serves now."""
        return self.worker.engine

    def numbers(self) -> Numbers:
        """What the engines have counted since the start."""
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
        """Raise UnknownModel unless `name` is None or a name of the model that is served."""
        if name not in (None, self.model_name, *MODEL_ALIASES):
            raise UnknownModel(
                f"model {name[:100]!r} is not served here; it is called {self.model_name!r}"
            )

    @property
    def dtype(self) -> str:
        """The name of the type of weights and KV cache."""
        asked = self.engine.config.dtype
        return self.engine.model_config.torch_dtype if asked == "auto" else asked

    @property
    def max_total_tokens(self) -> int:
        """Tokens of prompt and output that a request may have together."""
        return self.engine.scheduler.max_request_len

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
    ) -> Submission:
        """Tokenise, check and submit one request. The caller must `close` what it gets.

        Args:
            inputs: the prompt.
            sampling: the parameters, once the prompt's length is known.
            policy: which experts its tokens use.
            truncate: keep only the last so many tokens of the prompt.
            grammar: what `sampling` will have; it is compiled first.

        Raises:
            InvalidRequest: the request can never be served as asked.
            Overloaded: too many requests are here already.
            EngineStopped: the server is draining or its engine has failed.
            DeadlineExceeded: tokenising and compiling alone has taken longer than the request may.
        """
        request_id = _request_id()

        def make(engine: Engine) -> list[Request]:
            with engine.stats.counting_rejections():
                self._check_truncate(engine, truncate)
            fitting = self._fitting("inputs", engine, sampling)
            request = engine.make_request(
                inputs, fitting, policy, request_id=request_id, truncate=truncate
            )
            return [request]

        (submission,) = await self._start(1, make, grammar)
        return submission

    async def start_all(
        self,
        prompts: Mapping[str, Prompt],
        sampling: SamplingFor,
        policy: ExpertPolicy,
        n: int,
        check: Callable[[list[Request]], None],
        grammar: Grammar | None = None,
    ) -> list[Submission]:
        """Submit `n` completions of each prompt, all of them or none; otherwise as `start`.

        Args:
            prompts: the prompts by the names that errors give them.
            sampling: the parameters of each, once its prompt's length is known.
            policy: which experts their tokens use.
            n: how many completions each prompt gets.
            check: raises InvalidRequest if the requests are too much together.
            grammar: what `sampling` will have; it is compiled first.
        """
        count, limit = len(prompts) * n, self.settings.max_concurrent_requests
        request_id = _request_id()

        def make(engine: Engine) -> list[Request]:
            requests: list[Request] = []
            for position, (name, prompt) in enumerate(prompts.items()):
                with engine.stats.counting_rejections():
                    known = prompt(engine) if callable(prompt) else prompt
                fitting = self._fitting(name, engine, sampling)
                each = f"{request_id}-{position}" if len(prompts) > 1 else request_id
                if n == 1:
                    made = [engine.make_request(known, fitting, policy, request_id=each, name=name)]
                else:
                    made = engine.make_requests(
                        known, fitting, policy, n, request_id=each, name=name
                    )
                requests += made
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
    ) -> list[Submission]:
        """Compile the grammar, run `make` in a thread, and submit the `count` requests it makes."""
        started, call = time.perf_counter(), calls.current()
        with self.fleet.own.counting_rejections():
            seconds = self._timeout(call)
            self._admit(count)
        if call.deadline is None:
            call.deadline = asyncio.get_running_loop().time() + max(0.0, seconds - call.seconds)
        submissions: list[Submission] = []
        try:
            # Long prompts take a while to tokenise; the event loop goes on meanwhile.
            with self.fleet.lease() as worker:
                async with asyncio.timeout_at(call.deadline):
                    if grammar is not None:
                        await self._compile(worker.engine, grammar)
                    requests = await asyncio.to_thread(make, worker.engine)
                validated = time.perf_counter() - started
                for request in requests:
                    if worker.knows(request.request_id):  # a client may send an id again
                        request.request_id += f"~{next(self._again)}"
                    events = self._timed(await worker.submit(request), call, seconds)
                    release = self._release
                    submissions.append(
                        Submission(request, worker.engine, events, started, validated, release)
                    )
        except BaseException as error:
            self.active -= count - len(submissions)
            await close_all(submissions)
            if isinstance(error, TimeoutError):
                self._late(call)
                raise late_error(seconds) from None
            raise
        return submissions

    async def _compile(self, engine: Engine, grammar: Grammar) -> None:
        """Have `engine` compile a grammar.

        One thread compiles them all, in turn, so that the threads that tokenise stay free.
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
        """Run `work` in a thread. It counts as one request, and must end by that one's deadline.

        Raises:
            Overloaded, EngineStopped, DeadlineExceeded: as `start` does.
        """
        with self.fleet.own.counting_rejections():
            seconds = self._timeout(calls.current())
            self._admit(1)
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.to_thread(work)
        except TimeoutError:
            self.deadlines_exceeded += 1
            raise late_error(seconds) from None
        finally:
            self._release()

    def _timeout(self, call: Call) -> float:
        """Seconds that `call` may take."""
        most = self.settings.max_request_timeout
        return timeout_of(call.timeout, self.settings.request_timeout, most)

    def _timed(self, events: EventStream, call: Call, seconds: float) -> TimedEvents:
        """`events` until the call's deadline; they are counted for its key."""
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
        """Count a request that was refused for `reason`, as `metrics.names` lists them."""
        self.fleet.own.reject(reason)

    def count_call(self, call: Call) -> None:
        """Count an HTTP request for its key, if it generated."""
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

    def _check_truncate(self, engine: Engine, truncate: int | None) -> None:
        limit = self.settings.input_limit(engine.scheduler.max_request_len)
        require(
            truncate is None or truncate <= limit,
            f"parameters.truncate must be from 1 to {limit}, got {truncate}",
            InvalidRequest,
        )

    def _fitting(self, name: str, engine: Engine, sampling: SamplingFor) -> SamplingFor:
        """`sampling`, which also raises if the prompt `name` is longer than the server takes."""
        total = engine.scheduler.max_request_len
        limit = self.settings.input_limit(total)

        def fitting(room: int) -> SamplingParams:
            length = total - room
            message = f"{name} must have from 1 to {limit} tokens, got {length}"
            require(length <= limit, message, ContextTooLong)
            return sampling(room)

        return fitting


def _request_id() -> str:
    """The id of the HTTP request under way, under which the engine knows its requests too."""
    return calls.current().request_id or uuid.uuid4().hex
