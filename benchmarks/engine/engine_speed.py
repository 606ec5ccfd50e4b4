"""The whole engine on the CPU, sparse against dense: decoding, prompts, and a load of requests.

    ambidex bench decode|prefill|serve [--shape opt-125m|opt-1.3b] [--experts 32|64] [--json FILE]

Everything goes through `Engine.step`, as while serving: scheduling, attention, routing, sampling
and detokenising included. Both sides run the same random weights (`benchmarks.models`) and take
turns: step by step when decoding, prompt by prompt, load by load. Times are medians.
docs/benchmarks.md says what each column means.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.load import (
    Decoding,
    Percentiles,
    Served,
    prefill_ms,
    random_load,
    random_prompt,
    random_prompts,
    serve,
)
from benchmarks.models import (
    EngineServer,
    Shape,
    chosen_of,
    engine_config,
    kv_token_bytes,
    limit_share,
    model_config,
    random_checkpoint,
    shape_named,
    step_bytes,
)
from benchmarks.records import MACHINE, VERSIONS, Record, write_records
from engine.config import ModelConfig, check_choice, check_range
from engine.model.policy_batch import PolicyBatch
from engine.policy import ExpertPolicy
from engine.serving.engine import Engine

BATCHES: Final = (1, 2, 4, 8, 16, 32, 64)
PREFILLS: Final = (1, 16, 64, 256, 512, 1024)
ROUTINGS: Final = ("own", "same")
PROMPT: Final = 64  # tokens before decoding starts
MIN_STEPS, MAX_STEPS = 6, 128
MIN_PREFILLS, MAX_PREFILLS = 3, 31
SPARE_STEPS: Final = 64  # what the first requests decode while the last ones' prompts are computed
REQUESTS: Final = 64
KV_BYTES: Final = 4 << 30  # of one engine's cache, at most
LENGTHS: Final = (32, 512)
NEW_TOKENS: Final = 128
SERVE_ROUNDS: Final = 3
LOAD_SHARE: Final = 0.7  # of dense's greatest throughput: the rate of arrivals unless told


@dataclass(frozen=True)
class Options:
    """What the three commands share.

    Attributes:
        shape: a name of `benchmarks.models.SHAPES`.
        experts: per layer, 32 or 64.
        routing: "own": every request has its own prompt; "same": one prompt for all of a batch.
        seconds: to spend on a row, about; every row has a least number of samples.
        threads: of the CPU; 0 leaves torch's choice.
    """

    shape: str = "opt-125m"
    experts: int = 32
    routing: str = "own"
    seconds: float = 20.0
    threads: int = 0

    def __post_init__(self) -> None:
        shape_named(self.shape)
        chosen_of(self.experts)
        check_choice("routing", self.routing, ROUTINGS)
        check_range("seconds", self.seconds, 0.0, 3600.0)
        check_range("threads", self.threads, 0, 1024)


class Subject:
    """One model as its dense and its sparse self.

    Args:
        options: which model.
        kv_tokens: room in the cache; KV_BYTES bound it.
        side_by_side: both work at the same time, each in an engine of its own; otherwise one engine
            serves the two in turn.
    """

    def __init__(self, options: Options, kv_tokens: int, *, side_by_side: bool = False) -> None:
        self.options = options
        self.shape: Shape = shape_named(options.shape)
        self.chosen = chosen_of(options.experts)
        self.config: ModelConfig = model_config(self.shape, options.experts, torch.bfloat16)
        self.checkpoint = random_checkpoint(self.config)
        kv_tokens = min(kv_tokens, KV_BYTES // kv_token_bytes(self.config))
        config = engine_config(self.config, kv_tokens, options.threads)
        engine = Engine(self.checkpoint, config)
        other = Engine(self.checkpoint, config) if side_by_side else engine
        self.dense = EngineServer(engine, ExpertPolicy.dense())
        self.sparse = EngineServer(other, ExpertPolicy.top_k(self.chosen))

    def prompts(self, count: int, length: int, seed: int) -> list[list[int]]:
        """Prompts of a batch, as the routing asks."""
        if self.options.routing == "same":
            return [random_prompt(length, self.config.vocab_size, seed)] * count
        return random_prompts(count, length, self.config.vocab_size, seed)

    @property
    def params(self) -> dict[str, Any]:
        return {
            "shape": self.options.shape,
            "D": self.shape.hidden,
            "F": self.shape.neurons,
            "layers": self.shape.layers,
            "vocab": self.shape.vocabulary,
            "E": self.options.experts,
            "k": self.chosen,
            "dtype": self.config.torch_dtype,
            "threads": torch.get_num_threads(),
        }


class Bandwidth:
    """Bytes a second at which the layers' packed dense FFNs read their weights for one token.

    The layers take turns, so their weights come from memory if they exceed the cache.
    """

    def __init__(self, subject: Subject) -> None:
        config = subject.config
        self._layers = subject.checkpoint.model.ffns()
        self._policy = PolicyBatch.uniform(ExpertPolicy.dense(), 1, config.experts.num_experts)
        self._x_1D = torch.randn(1, config.hidden_size).to(getattr(torch, config.torch_dtype))
        matrix = config.intermediate_size * config.hidden_size * self._x_1D.itemsize
        self._bytes = 2 * matrix * len(self._layers)
        self._seconds: list[float] = []

    @torch.inference_mode()
    def sample(self) -> None:
        """Time one pass over all layers."""
        start = time.perf_counter()
        for layer in self._layers:
            layer(self._x_1D, self._policy)
        self._seconds.append(time.perf_counter() - start)

    @property
    def bytes_per_second(self) -> float:
        return self._bytes / statistics.median(self._seconds)


# --- decoding ---


def decode_records(options: Options, batches: Sequence[int] = BATCHES) -> Iterator[Record]:
    """One record of each batch size."""
    for batch in batches:
        check_range("batch", batch, 1, BATCHES[-1])
    tokens = PROMPT + SPARE_STEPS + MAX_STEPS
    subject = Subject(options, max(batches) * tokens, side_by_side=True)
    bandwidth = Bandwidth(subject)
    for batch in batches:
        yield _decode(subject, bandwidth, batch)


def _decode(subject: Subject, bandwidth: Bandwidth, batch: int) -> Record:
    """Alternate steps of a dense and a sparse batch."""
    prompts = subject.prompts(batch, PROMPT, seed=batch)
    new_tokens = SPARE_STEPS + MAX_STEPS
    servers = (subject.dense, subject.sparse)
    batches = [Decoding(server, prompts, new_tokens) for server in servers]
    before = [server.engine.stats.snapshot() for server in servers]
    first = min(batches[1].counts.values())
    times: list[tuple[float, float]] = []
    deadline = time.perf_counter() + subject.options.seconds
    while len(times) < MIN_STEPS or (len(times) < MAX_STEPS and time.perf_counter() < deadline):
        times.append((batches[0].step(), batches[1].step()))
        bandwidth.sample()
    after = [server.engine.stats.snapshot() for server in servers]
    last = min(batches[1].counts.values())
    for server in servers:
        server.engine.end_all("abort")
    reads = [
        (sum(end.experts_loaded) - sum(start.experts_loaded)) / (end.steps - start.steps)
        for start, end in zip(before, after, strict=True)
    ]
    return _decode_record(subject, bandwidth, batch, times, reads, PROMPT + (first + last) // 2)


def _decode_record(
    subject: Subject,
    bandwidth: Bandwidth,
    batch: int,
    times: list[tuple[float, float]],
    experts_read: Sequence[float],
    context: int,
) -> Record:
    milliseconds = [statistics.median(values) for values in zip(*times, strict=True)]
    config, rate = subject.config, bandwidth.bytes_per_second
    experts = config.experts.num_experts * config.num_hidden_layers
    params: dict[str, Any] = {
        **subject.params,
        "batch": batch,
        "routing": subject.options.routing,
        "context": context,
        "steps": len(times),
        "peer_experts_read": experts_read[0] / experts,
        "experts_read": experts_read[1] / experts,
        "bytes_per_second": rate,
    }
    for side, read, ms in zip(("dense", "sparse"), experts_read, milliseconds, strict=True):
        needed = step_bytes(config, read, batch * context, sparse=side != "dense").total
        params[f"{side}_bytes"] = needed
        params[f"{side}_share_of_limit"] = limit_share(needed, rate, ms)
    peer_ms, ms = milliseconds
    return Record("engine_decode", params, ms, "ms", peer_ms, peer_ms / ms)


def print_decode(records: Iterator[Record]) -> list[Record]:
    """Print the table as it grows."""
    print("one step gives each request of the batch a token; ms a step, and tokens a second;")
    print("read: distinct experts of a step; limit: share of what memory allows")
    kept: list[Record] = []
    for record in records:
        first, second = "dense", "sparse"
        if not kept:
            print(
                f"{'batch':>6}{first:>9}{second:>9}{'':>8}{first:>10}{second:>10}"
                f"{f'read: {first}':>14}{second:>8}{f'limit: {first}':>14}{second:>8}"
            )
        kept.append(record)
        assert record.peer_value is not None
        p, batch = record.params, record.params["batch"]
        per_second = [f"{batch * 1e3 / ms:>6.0f} t/s" for ms in (record.peer_value, record.value)]
        print(
            f"{batch:>6}{record.peer_value:>9.2f}{record.value:>9.2f}{record.ratio:>7.2f}x"
            f"{per_second[0]}{per_second[1]}{p['peer_experts_read']:>14.0%}{p['experts_read']:>8.0%}"
            f"{p[f'{first}_share_of_limit']:>14.0%}{p[f'{second}_share_of_limit']:>8.0%}",
            flush=True,
        )
    return kept


# --- prompts ---


def prefill_records(options: Options, lengths: Sequence[int] = PREFILLS) -> Iterator[Record]:
    """One record of each prompt length: milliseconds to the first token of a lone prompt."""
    subject = Subject(options, 2 * max(lengths))
    limit = subject.shape.positions - 1
    for length in lengths:
        check_range("length", length, 1, limit)
        times: list[tuple[float, float]] = []
        deadline = time.perf_counter() + options.seconds
        while len(times) < MIN_PREFILLS + 1 or (
            len(times) < MAX_PREFILLS and time.perf_counter() < deadline
        ):
            seed = length * 1000 + len(times)
            prompt = random_prompt(length, subject.config.vocab_size, seed)
            times.append((prefill_ms(subject.dense, prompt), prefill_ms(subject.sparse, prompt)))
        rounds = times[1:]  # the first is warm-up
        dense, sparse = (statistics.median(values) for values in zip(*rounds, strict=True))
        params = {**subject.params, "length": length, "rounds": len(rounds)}
        yield Record("engine_prefill", params, sparse, "ms", dense, dense / sparse)


def print_prefill(records: Iterator[Record]) -> list[Record]:
    """Print the table as it grows."""
    print("time to the first token of a lone prompt, ms; tokens of the prompt a second")
    print(f"{'tokens':>7}{'dense':>10}{'sparse':>10}{'':>8}{'dense':>12}{'sparse':>12}")
    kept = []
    for record in records:
        kept.append(record)
        assert record.peer_value is not None
        length = record.params["length"]
        rates = (f"{length * 1e3 / ms:>8.0f} t/s" for ms in (record.peer_value, record.value))
        print(
            f"{length:>7}{record.peer_value:>10.2f}{record.value:>10.2f}{record.ratio:>7.2f}x"
            f"{''.join(rates)}",
            flush=True,
        )
    return kept


# --- a load of requests ---


def serve_records(
    options: Options, requests: int = REQUESTS, rate: float = 0.0
) -> Iterator[Record]:
    """Records of both sides at the greatest throughput, then with Poisson arrivals.

    Args:
        options: shape, experts and so on; `seconds` bounds the rounds of each of the two.
        requests: of a load.
        rate: arrivals a second; 0 takes LOAD_SHARE of what dense managed.
    """
    check_range("requests", requests, 1, 256)
    check_range("rate", rate, 0.0, 1e6)
    kv_tokens = min(requests, 64) * (LENGTHS[1] + NEW_TOKENS)
    subject = Subject(options, kv_tokens)
    _serve_rounds(subject, min(requests, 2), math.inf, rounds=1, seed=0)  # warm-up
    dense, sparse = _serve_rounds(subject, requests, math.inf, SERVE_ROUNDS, seed=100)
    yield from _serve_pair(subject, requests, None, dense, sparse)
    rate = rate or LOAD_SHARE * dense.tokens_per_second / NEW_TOKENS
    dense, sparse = _serve_rounds(subject, requests, rate, SERVE_ROUNDS, seed=200)
    yield from _serve_pair(subject, requests, rate, dense, sparse)


def _serve_rounds(
    subject: Subject, requests: int, rate: float, rounds: int, seed: int
) -> tuple[Served, Served]:
    """The median dense and sparse run, by tokens a second, of rounds that take turns."""
    runs: list[tuple[Served, Served]] = []
    deadline = time.perf_counter() + subject.options.seconds
    while not runs or (len(runs) < rounds and time.perf_counter() < deadline):
        load = random_load(
            requests, rate, subject.config.vocab_size, LENGTHS, NEW_TOKENS, seed + len(runs)
        )
        runs.append((serve(subject.dense, load), serve(subject.sparse, load)))
    dense, sparse = zip(*runs, strict=True)
    return median_run(dense), median_run(sparse)


def median_run(runs: Sequence[Served]) -> Served:
    """The run whose tokens a second are the (lower) median."""
    ordered = sorted(runs, key=lambda run: run.tokens_per_second)
    return ordered[(len(ordered) - 1) // 2]


def _serve_pair(
    subject: Subject, requests: int, rate: float | None, dense: Served, sparse: Served
) -> Iterator[Record]:
    """Throughput, with the percentiles of both sides in the parameters."""
    params = {
        **subject.params,
        "requests": requests,
        "arrivals_per_second": rate,
        "prompt_tokens": list(LENGTHS),
        "new_tokens": NEW_TOKENS,
        "dense": dense.to_dict(),
        "sparse": sparse.to_dict(),
    }
    value, peer = sparse.tokens_per_second, dense.tokens_per_second
    yield Record("engine_serve", params, value, "tokens/s", peer, value / peer)


def print_serve(records: Iterator[Record]) -> list[Record]:
    """Print the table as it grows."""
    print("output tokens a second; time to first token and between tokens, ms: p50 / p90 / p99")
    print(f"{'arrivals':>12}{'side':>8}{'tokens/s':>10}{'first token':>24}{'inter-token':>24}")
    kept = []
    for record in records:
        kept.append(record)
        rate = record.params["arrivals_per_second"]
        label = "all at once" if rate is None else f"{rate:.2f}/s"
        for side in ("dense", "sparse"):
            run = Served.from_dict(record.params[side])
            print(
                f"{label:>12}{side:>8}{run.tokens_per_second:>10.1f}"
                f"{_milliseconds(run.first_token):>24}{_milliseconds(run.inter_token):>24}",
                flush=True,
            )
        print(f"{'':12}{'':8}{record.ratio:>9.2f}x")
    return kept


def _milliseconds(times: Percentiles) -> str:
    return " / ".join(f"{seconds * 1e3:.0f}" for seconds in (times.p50, times.p90, times.p99))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; with --json, keep the records."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("decode", "prefill", "serve"))
    parser.add_argument("--shape", default=Options.shape)
    parser.add_argument("--experts", type=int, default=Options.experts)
    parser.add_argument("--routing", default=Options.routing)
    parser.add_argument("--seconds", type=float, default=Options.seconds)
    parser.add_argument("--threads", type=int, default=Options.threads)
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES, help="of decode")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--json", type=Path, help="write the records to this file")
    given = parser.parse_args(arguments)
    options = Options(given.shape, given.experts, given.routing, given.seconds, given.threads)
    torch.manual_seed(0)
    threads = options.threads or torch.get_num_threads()
    print(f"{MACHINE}, {threads} threads, torch {VERSIONS['torch']}")
    chosen = chosen_of(options.experts)
    print(f"{options.shape} shape, random weights, bfloat16, {chosen} of {options.experts} experts")
    if given.command == "decode":
        records = print_decode(decode_records(options, given.batch))
    elif given.command == "prefill":
        records = print_prefill(prefill_records(options))
    else:
        records = print_serve(serve_records(options, given.requests, given.rate))
    if given.json is not None:
        write_records(given.json, records)


if __name__ == "__main__":
    main()
