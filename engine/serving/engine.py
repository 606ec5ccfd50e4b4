"""The serving engine: schedule, run, sample, emit.

`Engine.step` is the whole of it. Each step plans one flat batch (decoding tokens first, then chunks
of prompts), computes it, draws the next token of every request whose known tokens are all computed,
and returns what readers see of them as `TokenEvent`s. Not thread-safe but for `make_request` and
`stats`: one thread adds, aborts and steps (`engine.serving.worker` while serving,
`generate` offline).
"""

from __future__ import annotations

import gc
import secrets
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from engine import checkpoint as checkpoints
from engine.checkpoint import Checkpoint
from engine.config import EngineConfig, ModelConfig
from engine.errors import InvalidRequest, Overloaded, require
from engine.model.decoder import Decoder
from engine.policy import ExpertPolicy
from engine.serving.kv_blocks import BlockAllocator
from engine.serving.output import RequestText
from engine.serving.request import (
    MAX_COMPLETIONS,
    FinishReason,
    Request,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
    Usage,
)
from engine.serving.runner import Runner, StepResult, plan_cache
from engine.serving.sampler import Sampled, completion_seed, sample
from engine.serving.scheduler import Plan, Scheduler
from engine.serving.stats import Stats, usage_of
from engine.serving.token_experts import check_size
from engine.text.structured import Grammars

# A function from the number of tokens that the prompt leaves for the output to the parameters.
SamplingFor = Callable[[int], SamplingParams]


@dataclass
class Generation:
    """The result of one prompt of `Engine.generate`."""

    prompt_ids: list[int]
    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    top_tokens: list[tuple[TokenLogprob, ...]] = field(default_factory=list)
    prompt: tuple[TokenLogprob, ...] = ()
    prompt_top: tuple[tuple[TokenLogprob, ...], ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]

    def add(self, event: TokenEvent) -> None:
        self.text += event.text
        if event.token is not None:
            self.tokens.append(event.token)
            self.top_tokens.append(event.top_tokens)
        self.prompt = self.prompt or event.prompt
        self.prompt_top = self.prompt_top or event.prompt_top
        self.finish_reason, self.usage = event.finish_reason, event.usage


class Engine:
    """One model, its KV cache, and the requests that it works on."""

    def __init__(self, checkpoint: Checkpoint, config: EngineConfig | None = None) -> None:
        """Allocate the KV cache and pack the weights for inference.

        Raises:
            ConfigError: if `config` does not fit the model.
        """
        self.config = config or EngineConfig()
        if self.config.num_threads:
            torch.set_num_threads(self.config.num_threads)
        self.checkpoint = checkpoint
        self.tokenizer = checkpoint.tokenizer
        self.model_config: ModelConfig = checkpoint.config
        dtype = checkpoint.model.embedding.weight.dtype
        self.num_blocks, self.max_model_len = plan_cache(checkpoint.config, self.config, dtype)
        self.allocator = BlockAllocator(self.num_blocks, self.config.block_size)
        self.scheduler = Scheduler(self.config, self.allocator, self.max_model_len)
        self.runner = Runner(checkpoint.model, self.config, self.num_blocks)
        self.num_experts = checkpoint.config.experts.num_experts
        self.num_layers = checkpoint.config.num_hidden_layers
        size = checkpoint.config.experts.expert_size
        self.stats = Stats(self.num_layers, self.num_experts, self.num_blocks, size)
        self.grammars = Grammars(self.tokenizer, self.model_config.vocab_size)
        self._outputs: dict[str, RequestText] = {}
        self._undelivered: list[TokenEvent] = []

    @classmethod
    def load(cls, path: Path | str, config: EngineConfig | None = None) -> Engine:
        """An engine for the checkpoint directory `path`.

        Raises:
            CheckpointError: if the directory is damaged or foreign.
            ConfigError: if `config` does not fit the model.
        """
        config = config or EngineConfig()
        return cls(checkpoints.load(Path(path), config.device, config.dtype), config)

    # Requests

    def make_request(
        self,
        prompt: str | list[int],
        sampling: SamplingParams | SamplingFor,
        policy: ExpertPolicy,
        *,
        request_id: str | None = None,
        truncate: int | None = None,
        name: str = "inputs",
    ) -> Request:
        """Tokenise and validate a request, and compile its grammar, which may take seconds.

        Thread-safe; it is served once it is added.

        Args:
            prompt: text, or token ids.
            sampling: how to draw tokens and when to stop.
            policy: which experts its tokens use; `auto` becomes what the checkpoint recommends.
            request_id: its name; None makes one.
            truncate: keep only the last so many tokens of the prompt.
            name: what errors call the prompt.

        Raises:
            InvalidRequest: if it can never be served as asked.
            Overloaded: if its grammar has to wait too long for others to be compiled.
        """
        request_id = request_id or uuid.uuid4().hex
        return self._make([request_id], prompt, sampling, policy, truncate, name)[0]

    def make_requests(
        self,
        prompt: str | list[int],
        sampling: SamplingParams | SamplingFor,
        policy: ExpertPolicy,
        n: int,
        *,
        request_id: str | None = None,
        truncate: int | None = None,
        name: str = "inputs",
    ) -> list[Request]:
        """`n` requests that complete one prompt differently: as `make_request`, but for

        - their names, which are `request_id` with -0, -1, ... behind it;
        - their seeds, which depend on (the sampling's seed, position) alone; the first one's is
          the sampling's own, so that it draws what a single request would.

        Raises:
            InvalidRequest: if they can never be served as asked, or `n` is out of range.
        """
        with self.stats.counting_rejections():
            message = f"n must be between 1 and {MAX_COMPLETIONS}, got {n}"
            require(1 <= n <= MAX_COMPLETIONS, message, InvalidRequest)
        request_id = request_id or uuid.uuid4().hex
        request_ids = [f"{request_id}-{i}" for i in range(n)]
        return self._make(request_ids, prompt, sampling, policy, truncate, name)

    def _make(
        self,
        request_ids: Sequence[str],
        prompt: str | list[int],
        sampling: SamplingParams | SamplingFor,
        policy: ExpertPolicy,
        truncate: int | None,
        name: str,
    ) -> list[Request]:
        """One request per name, with different seeds; the prompt is tokenised once."""
        with self.stats.counting_rejections():
            prompt_ids = self._prompt_ids(prompt, truncate, name)
            if not isinstance(sampling, SamplingParams):
                sampling = sampling(self.scheduler.max_request_len - len(prompt_ids))
            self._check_ids("logit_bias", [token_id for token_id, _ in sampling.logit_bias])
            self._check_ids("stop_token_ids", sampling.stop_token_ids)
            check_size(sampling, self.model_config)
            resolved = self._resolve(policy)
            seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
            requests = [
                Request(each, prompt_ids, sampling, resolved, completion_seed(seed, index))
                for index, each in enumerate(request_ids)
            ]
            self.scheduler.check_fits(requests[0])
            if sampling.grammar is not None:
                for request in requests:
                    request.matcher = self.grammars.matcher(sampling.grammar)
        return requests

    def _prompt_ids(self, prompt: str | list[int], truncate: int | None, name: str) -> list[int]:
        if truncate is not None:
            require(truncate >= 1, f"truncate must be at least 1, got {truncate}", InvalidRequest)
        if isinstance(prompt, str):
            ids = self.tokenizer.encode_prompt(prompt, truncate)
        else:
            ids = prompt[-truncate:] if truncate else list(prompt)
        require(bool(ids), f"{name} must have at least 1 token", InvalidRequest)
        self._check_ids(name, ids)
        return ids

    def _check_ids(self, name: str, ids: Sequence[int]) -> None:
        top = self.model_config.vocab_size - 1
        message = f"token ids of {name} must be from 0 to {top}"
        require(not ids or (min(ids) >= 0 and max(ids) <= top), message, InvalidRequest)

    def _resolve(self, policy: ExpertPolicy) -> ExpertPolicy:
        resolved = policy.resolve(self.model_config.experts.default_policy)
        require(
            resolved.kind != "oracle",
            "experts must be dense, auto, top_k or mass; oracle is for evaluation only",
            InvalidRequest,
        )
        resolved.validate(self.num_experts)
        return resolved

    def add(self, request: Request) -> None:
        """Accept a request: from now on it owes exactly one terminal event.

        Raises:
            InvalidRequest: its id is in use.
            Overloaded: the queue is full.
        """
        with self.stats.counting_rejections():
            self.scheduler.add(request)
        self._outputs[request.request_id] = RequestText(self.tokenizer, request)

    def abort(self, request_id: str) -> bool:
        """End a request; `step` returns its terminal event. False if it is not in the engine."""
        known = request_id in self.scheduler
        if known:
            self._undelivered.append(self._end(request_id, "abort"))
        return known

    def end_all(self, reason: FinishReason, error: str | None = None) -> list[TokenEvent]:
        """End every request, and return all events that are still owed."""
        for request in (*self.scheduler.running, *self.scheduler.waiting):
            self._undelivered.append(self._end(request.request_id, reason, error))
        self._record_state()
        events, self._undelivered = self._undelivered, []
        return events

    def end_running(self, reason: FinishReason, error: str) -> list[TokenEvent]:
        """End the requests that own blocks, after a step that raised; returns all owed events.

        Raises:
            AssertionError: what is left is not clean; the engine must not be used any more.
        """
        for request in tuple(self.scheduler.running):
            self._undelivered.append(self._end(request.request_id, reason, error))
        self.check_integrity()
        assert self.allocator.num_used == 0, "blocks without an owner"
        self._record_state()
        events, self._undelivered = self._undelivered, []
        return events

    def release(self) -> None:
        """Release weights and cache. The statistics stay readable, but `step` never works again."""
        with torch.device("meta"):
            model = Decoder(self.model_config)
        self.checkpoint = replace(self.checkpoint, model=model)
        del self.runner
        gc.collect()

    def _end(
        self,
        request_id: str,
        reason: FinishReason,
        error: str | None = None,
        own_fault: bool = False,
    ) -> TokenEvent:
        """Take a request out between two steps; returns its terminal event."""
        now = time.monotonic()
        request = self.scheduler.abort(request_id)
        assert request is not None
        request.finish_reason = reason
        text, _ = self._outputs.pop(request_id).end()
        self.stats.record_finish(request, now)
        return TokenEvent(
            request_id,
            request.num_output,
            token=None,
            text=text,
            finish_reason=reason,
            error=error,
            own_fault=own_fault,
            usage=usage_of(request, now),
        )

    def has_work(self) -> bool:
        """Whether `step` has anything to do or to return."""
        return self.scheduler.has_work or bool(self._undelivered)

    # The step

    def step(self) -> list[TokenEvent]:
        """Advance every request that the plan reaches; returns the events for their readers."""
        started = time.monotonic()
        plan = self.scheduler.schedule()
        if plan:
            self._note_admissions(plan)
            result = self.runner.run(plan)
            tokens = sample(result.logits_BV, result.ready, self.model_config.eos_token_id)
            self._account(plan, result, time.monotonic() - started)
            self._emit(result, tokens)
        self._record_state()
        if not self.scheduler.has_work:
            self.check_integrity()
        events, self._undelivered = self._undelivered, []
        return events

    def check_integrity(self) -> None:
        """Assert that blocks and their owners agree, and that no request is lost."""
        self.scheduler.check_integrity()
        line = [*self.scheduler.running, *self.scheduler.waiting]
        assert {request.request_id for request in line} == set(self._outputs)

    def _note_admissions(self, plan: Plan) -> None:
        now = time.monotonic()
        for request, _ in plan:
            if request.admitted is None:
                request.admitted = now

    def _account(self, plan: Plan, result: StepResult, seconds: float) -> None:
        """Book the tokens and experts that were computed, and the time that it took."""
        self.scheduler.advance(plan)
        per_token = self.num_layers * self.num_experts
        for (request, tokens), activated in zip(plan, result.activated, strict=True):
            request.experts_activated += activated
            request.experts_available += tokens * per_token
        for part in result.prompts:
            known = self._outputs[part.request.request_id].prompt
            known[part.first : part.first + len(part.tokens)] = part.tokens
        total = sum(tokens for _, tokens in plan)
        self.stats.record_step(total, len(plan), result.layer_activated, result.layer_loaded)
        if result.sample is not None:
            self.stats.record_sample(result.sample)
        elif total == len(plan):
            self.stats.record_decode(result.activated, sum(result.layer_loaded), seconds)

    def _emit(self, result: StepResult, tokens: list[Sampled]) -> None:
        """Make an event of each drawn token; if one fails, those before it are still delivered."""
        now, available = time.monotonic(), self.num_layers * self.num_experts
        used = zip(result.last_activated, result.last_chosen, strict=True)
        for request, token, (count, chosen) in zip(result.ready, tokens, used, strict=True):
            if request.matcher is not None and request.matcher.failure is not None:
                failure = request.matcher.failure
                event = self._end(request.request_id, "error", failure, own_fault=True)
            else:
                event = self._take_token(request, token, count / available, chosen, now)
            self._undelivered.append(event)

    def _take_token(
        self, request: Request, drawn: Sampled, ratio: float, chosen: bytes, now: float
    ) -> TokenEvent:
        """Append a token to its request, finish it if it is done, and describe both."""
        output = self._outputs[request.request_id]
        index = request.num_output
        self.stats.record_token(request, now)
        request.token_ids.append(drawn.token_id)
        request.first_token = now if request.first_token is None else request.first_token
        request.last_token = now
        text, reason = self._read_token(request, output, drawn.token_id)
        prompt = self._prompt_tokens(request, output) if index == 0 else ()
        prompt_top = self._prompt_top(request, output) if index == 0 else ()
        request.finish_reason = reason
        if reason is not None:
            self.scheduler.finish(request)
            del self._outputs[request.request_id]
            self.stats.record_finish(request, now)
        return TokenEvent(
            request.request_id,
            index,
            self._describe(drawn.token_id, drawn.logprob),
            text,
            self._describe_all(drawn.top),
            ratio,
            reason,
            prompt=prompt,
            prompt_top=prompt_top,
            usage=None if reason is None else usage_of(request, now),
            experts=chosen,
        )

    def _read_token(
        self, request: Request, output: RequestText, token_id: int
    ) -> tuple[str, FinishReason | None]:
        """The text that a new token made final, and whether it ends the request."""
        sampling = request.sampling
        is_eos = token_id == self.model_config.eos_token_id
        is_stop = token_id in sampling.stop_token_ids
        text, stopped = output.push(None if is_eos or is_stop else token_id)
        ended = request.may_end and is_eos and not sampling.ignore_eos
        stopped_by_id = request.may_end and is_stop
        complete = request.matcher is not None and request.matcher.advance(token_id)
        full = request.num_output >= sampling.max_new_tokens
        if not stopped and (ended or stopped_by_id or complete or full):
            rest, stopped = output.end()
            text += rest
        if ended:
            return text, "eos_token"
        if stopped or stopped_by_id:
            return text, "stop_sequence"
        if complete:
            return text, "eos_token"
        return text, "length" if full else None

    def _prompt_tokens(self, request: Request, output: RequestText) -> tuple[TokenLogprob, ...]:
        """The prompt with its log-probabilities, if asked for."""
        if not request.sampling.prompt_logprobs:
            return ()
        logprobs = (known.logprob if known else None for known in output.prompt)
        return self._describe_all(zip(request.prompt_ids, logprobs, strict=True))

    def _prompt_top(
        self, request: Request, output: RequestText
    ) -> tuple[tuple[TokenLogprob, ...], ...]:
        """The likeliest tokens at each position of the prompt, if asked for."""
        if not request.sampling.prompt_top_n:
            return ()
        return tuple(self._describe_all(known.top if known else ()) for known in output.prompt)

    def _describe_all(self, tokens: Iterable[tuple[int, float | None]]) -> tuple[TokenLogprob, ...]:
        return tuple(self._describe(token_id, logprob) for token_id, logprob in tokens)

    def _describe(self, token_id: int, logprob: float | None) -> TokenLogprob:
        words = self.tokenizer
        text, special = words.token_text(token_id), words.is_special(token_id)
        return TokenLogprob(token_id, text, logprob, special, words.token_bytes(token_id))

    def _record_state(self) -> None:
        line, used = self.scheduler, self.allocator.num_used
        self.stats.record_state(len(line.running), len(line.waiting), used)
        self.stats.record_scheduling(
            line.preemptions, line.prefix_hit_tokens, line.prefix_queried_tokens
        )

    # Offline

    def generate(
        self,
        prompts: Sequence[str | list[int]],
        sampling: SamplingParams | None = None,
        policy: ExpertPolicy | None = None,
    ) -> list[Generation]:
        """Complete every prompt; results in the order of the prompts."""
        requests = [
            self.make_request(prompt, sampling or SamplingParams(), policy or ExpertPolicy.auto())
            for prompt in prompts
        ]
        results = {request.request_id: Generation(request.prompt_ids) for request in requests}
        for event in self.run(requests):
            results[event.request_id].add(event)
        return list(results.values())

    def run(self, requests: Sequence[Request]) -> Generator[TokenEvent]:
        """Serve `requests` to their ends, as fast as the queue takes them; yields their events.

        Closing the iterator, or a failing step, aborts what is left.
        """
        pending = deque(requests)
        try:
            while pending or self.has_work():
                with suppress(Overloaded):
                    while pending:
                        self.scheduler.check_room(pending[0].prompt_len)
                        self.add(pending.popleft())
                yield from self.step()
        finally:
            self.end_all("abort")
