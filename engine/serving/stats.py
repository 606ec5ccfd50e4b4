"""Counters, gauges and histograms of one engine: plain numbers, for whoever exports them.

The engine's thread writes, any thread reads: `Stats.snapshot` copies everything under the lock that
each writing method takes for a moment. Times are in seconds.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any, Final

from engine.errors import EngineStopped, InvalidRequest, Overloaded
from engine.histogram import (
    BATCH_BUCKETS,
    FIRST_TOKEN_BUCKETS,
    INTER_TOKEN_BUCKETS,
    RATIO_BUCKETS,
    REQUEST_BUCKETS,
    TOKEN_BUCKETS,
    Histogram,
)
from engine.serving.request import Request, Usage

# Steps that only decode are told apart by whether their tokens used every expert, and by their
# number of requests: up to 1, 2, 4, ... The last bound is the largest `max_num_seqs`.
DECODE_KINDS: Final = ("dense", "sparse", "mixed")
DECODE_BATCHES: Final = tuple(1 << e for e in range(13))


def _table() -> list[list[float]]:
    """A number per kind and batch, [DECODE_KINDS][DECODE_BATCHES]."""
    return [[0] * len(DECODE_BATCHES) for _ in DECODE_KINDS]


@dataclass(frozen=True)
class RouterSample:
    """What one step's routers missed, per layer, over its sampled sparse tokens.

    Attributes:
        captured: true activation mass of the chosen experts.
        mass: that of all experts.
        fired: neurons that were not zero.
        neurons: all neurons.
        load: how often each expert was chosen, [layers][experts].
    """

    captured: list[float]
    mass: list[float]
    fired: list[int]
    neurons: list[int]
    load: list[list[int]]


@dataclass
class Numbers:
    """Everything that is counted.

    Per layer, summed over steps: `experts_activated` and `experts_available` count (token, expert)
    pairs; `experts_loaded` counts the distinct experts that a step read, out of `experts_loadable`.
    `finished` counts requests by finish reason, `rejected` by reason ("invalid",
    "overloaded", "stopped"). `batch_tokens` is the number of tokens of a step. Of the
    `prefix_queried_tokens` that admitted prompts had, `prefix_hit_tokens` came from the prefix
    cache; prompts that may not use it do not count, nor does a preempted request's return.

    `neurons_activated` and `neurons_available` are those of the experts. From sampled steps alone
    (`EngineConfig.sample_every`), as in `RouterSample`: `mass_captured`, `mass_total`,
    `neurons_fired`, `neurons_sampled`, and per layer and expert `expert_load`.

    Steps that only decode (one token of each request) are counted by kind and batch size
    (`DECODE_KINDS`, `DECODE_BATCHES`): their number, their duration, and the distinct experts that
    they read, over all layers, out of those that exist. Sampled steps take longer and are left out.
    """

    experts_activated: list[int]
    experts_available: list[int]
    experts_loaded: list[int]
    experts_loadable: list[int]
    neurons_activated: list[int]
    neurons_available: list[int]
    mass_captured: list[float]
    mass_total: list[float]
    neurons_fired: list[int]
    neurons_sampled: list[int]
    expert_load: list[list[int]]
    steps: int = 0
    sampled_steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_queried_tokens: int = 0
    finished: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0

    activated_ratio: Histogram = field(default_factory=partial(Histogram, RATIO_BUCKETS))
    first_token_seconds: Histogram = field(default_factory=partial(Histogram, FIRST_TOKEN_BUCKETS))
    inter_token_seconds: Histogram = field(default_factory=partial(Histogram, INTER_TOKEN_BUCKETS))
    queue_seconds: Histogram = field(default_factory=partial(Histogram, REQUEST_BUCKETS))
    prefill_seconds: Histogram = field(default_factory=partial(Histogram, REQUEST_BUCKETS))
    decode_seconds: Histogram = field(default_factory=partial(Histogram, REQUEST_BUCKETS))
    request_seconds: Histogram = field(default_factory=partial(Histogram, REQUEST_BUCKETS))
    request_prompt_tokens: Histogram = field(default_factory=partial(Histogram, TOKEN_BUCKETS))
    request_generated_tokens: Histogram = field(default_factory=partial(Histogram, TOKEN_BUCKETS))
    batch_tokens: Histogram = field(default_factory=partial(Histogram, BATCH_BUCKETS))
    batch_requests: Histogram = field(default_factory=partial(Histogram, BATCH_BUCKETS))

    decode_steps: list[list[float]] = field(default_factory=_table)
    decode_step_seconds: list[list[float]] = field(default_factory=_table)
    decode_loaded: list[list[float]] = field(default_factory=_table)
    decode_loadable: list[list[float]] = field(default_factory=_table)

    @property
    def aborts(self) -> int:
        return self.finished["abort"]

    def __add__(self, other: Numbers) -> Numbers:
        """The sum of two engines' counts; an engine with fewer layers adds zero to the others."""
        names = [f.name for f in dataclasses.fields(self)]
        return Numbers(**{name: _sum(getattr(self, name), getattr(other, name)) for name in names})

    def settled(self) -> Numbers:
        """The counts of an engine that has ended, without its gauges, which describe a state."""
        return dataclasses.replace(self, running=0, waiting=0, kv_blocks_used=0, kv_blocks_total=0)


def _sum(one: Any, other: Any) -> Any:
    """The sum of two numbers, or of two lists element by element; a shorter list is filled up."""
    if not isinstance(one, list):
        return one + other
    if any(isinstance(part, list) for part in (*one, *other)):
        nothing: list[int] = []
        return [_sum(a, b) for a, b in zip_longest(one, other, fillvalue=nothing)]
    return [a + b for a, b in zip_longest(one, other, fillvalue=0)]


class Stats:
    """The numbers of one engine, safe to read from any thread."""

    def __init__(
        self, num_layers: int, num_experts: int, kv_blocks: int, expert_size: int = 0
    ) -> None:
        self.num_layers = num_layers
        self.num_experts = num_experts
        self.expert_size = expert_size
        self._lock = threading.Lock()
        no_default = dataclasses.MISSING
        fields = dataclasses.fields(Numbers)
        per_layer = (f.name for f in fields if f.default is f.default_factory is no_default)
        counts: dict[str, Any] = {name: [0] * num_layers for name in per_layer}
        counts["expert_load"] = [[0] * num_experts for _ in range(num_layers)]
        self._numbers = Numbers(**counts, kv_blocks_total=kv_blocks)

    def snapshot(self) -> Numbers:
        """A consistent copy."""
        with self._lock:
            return copy.deepcopy(self._numbers)

    @contextmanager
    def counting_rejections(self) -> Iterator[None]:
        """Count a refusal that leaves the block as an exception."""
        try:
            yield
        except InvalidRequest:
            self.reject("invalid")
            raise
        except Overloaded:
            self.reject("overloaded")
            raise
        except EngineStopped:
            self.reject("stopped")
            raise

    def reject(self, reason: str) -> None:
        with self._lock:
            self._numbers.rejected[reason] += 1

    def absorb(self, numbers: Numbers) -> None:
        """Add what another engine counted in its life."""
        with self._lock:
            self._numbers += numbers.settled()

    def record_given_up(self, reason: str, requests: int) -> None:
        """Count requests that were ended without the engine's help."""
        with self._lock:
            self._numbers.finished[reason] += requests

    def record_step(
        self, tokens: int, requests: int, activated: Sequence[int], loaded: Sequence[int]
    ) -> None:
        """Count a step: tokens and requests; per layer, expert pairs and distinct experts."""
        available = tokens * self.num_experts
        with self._lock:
            numbers = self._numbers
            numbers.steps += 1
            numbers.batch_tokens.observe(tokens)
            numbers.batch_requests.observe(requests)
            for layer, (pairs, union) in enumerate(zip(activated, loaded, strict=True)):
                numbers.experts_activated[layer] += pairs
                numbers.experts_available[layer] += available
                numbers.experts_loaded[layer] += union
                numbers.experts_loadable[layer] += self.num_experts
                numbers.neurons_activated[layer] += pairs * self.expert_size
                numbers.neurons_available[layer] += available * self.expert_size

    def record_decode(self, activated: Sequence[int], loaded: int, seconds: float) -> None:
        """Count a step that only decoded.

        Args:
            activated: the experts that each request's token used, over all layers.
            loaded: distinct experts that were read, over all layers.
            seconds: from planning to drawn tokens.
        """
        every = self.num_layers * self.num_experts
        kind = DECODE_KINDS.index(decode_kind(activated, every))
        batch = (len(activated) - 1).bit_length()
        with self._lock:
            numbers = self._numbers
            numbers.decode_steps[kind][batch] += 1
            numbers.decode_step_seconds[kind][batch] += seconds
            numbers.decode_loaded[kind][batch] += loaded
            numbers.decode_loadable[kind][batch] += every

    def record_sample(self, sample: RouterSample) -> None:
        """Count what a sampled step measured."""
        with self._lock:
            numbers = self._numbers
            numbers.sampled_steps += 1
            for layer, load in enumerate(sample.load):
                numbers.mass_captured[layer] += sample.captured[layer]
                numbers.mass_total[layer] += sample.mass[layer]
                numbers.neurons_fired[layer] += sample.fired[layer]
                numbers.neurons_sampled[layer] += sample.neurons[layer]
                for expert, times in enumerate(load):
                    numbers.expert_load[layer][expert] += times

    def record_state(self, running: int, waiting: int, blocks_used: int) -> None:
        """Note the state of the queue and the cache."""
        with self._lock:
            numbers = self._numbers
            numbers.running, numbers.waiting = running, waiting
            numbers.kv_blocks_used = blocks_used

    def record_scheduling(self, preemptions: int, hit_tokens: int, queried_tokens: int) -> None:
        """Note the preemptions, and the prefix cache's hits and queries, since the start."""
        with self._lock:
            numbers = self._numbers
            numbers.preemptions = preemptions
            numbers.prefix_hit_tokens = hit_tokens
            numbers.prefix_queried_tokens = queried_tokens

    def record_token(self, request: Request, now: float) -> None:
        """Count a generated token; call it before the request's own times are brought forward."""
        with self._lock:
            numbers = self._numbers
            numbers.generated_tokens += 1
            if request.last_token is not None:
                numbers.inter_token_seconds.observe(now - request.last_token)
                return
            numbers.prompt_tokens += request.prompt_len
            numbers.first_token_seconds.observe(now - request.arrived)
            if request.admitted is not None:
                numbers.queue_seconds.observe(request.admitted - request.arrived)
                numbers.prefill_seconds.observe(now - request.admitted)

    def record_finish(self, request: Request, now: float) -> None:
        """Count a request that has its finish reason."""
        assert request.finish_reason is not None
        with self._lock:
            numbers = self._numbers
            numbers.finished[request.finish_reason] += 1
            numbers.request_seconds.observe(now - request.arrived)
            numbers.request_prompt_tokens.observe(request.prompt_len)
            numbers.request_generated_tokens.observe(request.num_output)
            if request.first_token is not None and request.last_token is not None:
                numbers.decode_seconds.observe(request.last_token - request.first_token)
            if request.experts_available:
                numbers.activated_ratio.observe(request.activated_ratio)


def decode_kind(activated: Sequence[int], every: int) -> str:
    """The entry of DECODE_KINDS for a batch whose tokens used so many experts, out of `every`."""
    dense = sum(count == every for count in activated)
    if 0 < dense < len(activated):
        return "mixed"
    return "dense" if dense else "sparse"


def usage_of(request: Request, now: float) -> Usage:
    """What a request took until `now`; it names a seed only if one was given or used."""
    sampling = request.sampling
    admitted = now if request.admitted is None else request.admitted
    return Usage(
        prompt_tokens=request.prompt_len,
        cached_prompt_tokens=request.cached_prompt_tokens,
        generated_tokens=request.num_output,
        seed=None if sampling.greedy and sampling.seed is None else request.seed,
        queue_seconds=admitted - request.arrived,
        inference_seconds=now - admitted,
        experts_activated=request.experts_activated,
        experts_available=request.experts_available,
    )
