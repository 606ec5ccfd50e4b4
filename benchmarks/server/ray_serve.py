"""What Ray Serve costs and what replicas bring, on one machine: tokens a second, and latency.

    .venv-ray/bin/python -m benchmarks.server.ray_serve [--model starter] [--json FILE]

The plain server, the application of deploy/ray with one replica and with two take turns at the same
load: 32 streamed completions at once, then one alone; 64 prompt tokens and 128 output tokens each,
greedy. All of them run on the same CPU, and so do the client, Ray's own processes and whoever waits
for its turn: two replicas have half the cores each, so this shows what the way through Ray costs,
and not what a second machine brings. The plain server is the peer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import ray
from ray import serve

from benchmarks.load import Arrival, random_load
from benchmarks.records import MACHINE, VERSIONS, Record, write_records
from benchmarks.server.http_overhead import Case, case_of
from benchmarks.server.http_server import http_server
from deploy.ray.app import application
from deploy.ray.options import Options
from engine.config import check_range
from engine.console import check_writable
from server.settings import Settings

REQUESTS: Final = 32
PROMPT_TOKENS: Final = 64
NEW_TOKENS: Final = 128
KV_BYTES: Final = 256 << 20
CLIENT_SECONDS: Final = 300.0
OBJECT_STORE_BYTES: Final = 100_000_000
PORT: Final = 8799
PLAIN: Final = "plain server"
MEASURES: Final = (  # (0 for the many requests, 1 for the one; attribute of Outcome; unit)
    (0, "tokens_per_second", "tokens/s"),
    (0, "first_token", "s"),
    (0, "inter_token", "s"),
    (1, "first_token", "s"),
    (1, "inter_token", "s"),
)


@dataclass(frozen=True)
class Outcome:
    """One load on one side.

    Attributes:
        tokens_per_second: of all requests together.
        first_token: median of the seconds to a request's first event.
        inter_token: median over requests of their mean seconds between two tokens.
    """

    tokens_per_second: float
    first_token: float
    inter_token: float


@dataclass(frozen=True)
class Streamed:
    """One streamed completion: seconds to its first and its last event, from its request."""

    first: float
    last: float


async def streamed(url: str, body: dict[str, Any]) -> Streamed:
    """Send one completion and read its stream to the end, which must have all its tokens."""
    place = urlsplit(url)
    assert place.hostname is not None
    reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=1 << 20)
    content = json.dumps(body).encode()
    head = f"POST {place.path}/v1/completions HTTP/1.1\r\nHost: {place.hostname}\r\n"
    head += f"Connection: close\r\nContent-Length: {len(content)}\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    start = time.perf_counter()
    writer.write(head.encode() + content)
    times: list[float] = []
    tail = [b"", b""]  # the usage, and the end
    while line := await reader.readline():
        if line.startswith(b"data: "):
            times.append(time.perf_counter() - start)
            tail = [tail[1], line.removeprefix(b"data: ").strip()]
    writer.close()
    if tail[1] != b"[DONE]":
        raise SystemExit(f"a stream ended early: {tail[1][-300:]!r}")
    if (count := json.loads(tail[0])["usage"]["completion_tokens"]) != NEW_TOKENS:
        raise SystemExit(f"a stream of {count} tokens, not {NEW_TOKENS}")
    return Streamed(times[0], times[-3])


async def outcome(url: str, case: Case, arrivals: Sequence[Arrival]) -> Outcome:
    """Send all requests at once and read their streams."""
    options = {
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "experts": {"top_k": case.top_k},
    }
    streams = (streamed(url, {"prompt": each.prompt, **options}) for each in arrivals)
    start = time.perf_counter()
    all_times = await asyncio.wait_for(asyncio.gather(*streams), CLIENT_SECONDS)
    seconds = time.perf_counter() - start
    return Outcome(
        NEW_TOKENS * len(arrivals) / seconds,
        statistics.median(each.first for each in all_times),
        statistics.median((each.last - each.first) / (NEW_TOKENS - 1) for each in all_times),
    )


@contextmanager
def on_ray(case: Case) -> Iterator[dict[str, str]]:
    """The application with one and with two replicas; yields their URLs by what they are."""
    cores = os.cpu_count() or 1
    ray.init(
        "local",  # never somebody else's
        num_cpus=2 * cores,  # both applications have all cores, one after the other
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        urls = {}
        for replicas in (1, 2):
            threads = max(1, cores // replicas)
            engine: dict[str, Any] = {
                "kv_cache_bytes": KV_BYTES,
                "sample_every": 0,
                "num_threads": threads,
            }
            settings = Settings(model=case.path, **engine)
            options = Options(min_replicas=replicas, max_replicas=replicas, cpus=threads)
            name = f"replicas-{replicas}"
            serve.run(application(settings, options), name=name, route_prefix=f"/{name}")
            urls[f"Ray, {replicas} replica{'s' * (replicas > 1)}"] = (
                f"http://127.0.0.1:{PORT}/{name}"
            )
        yield urls
    finally:
        serve.shutdown()
        ray.shutdown()


def measure(case: Case, rounds: int) -> dict[str, list[tuple[Outcome, Outcome]]]:
    """(32 requests, one request) of each side in each round; one round before is not counted."""
    lengths = (PROMPT_TOKENS, PROMPT_TOKENS)
    found: dict[str, list[tuple[Outcome, Outcome]]] = {}
    with ExitStack() as stack:
        settings = {"AMBIDEX_KV_CACHE_BYTES": str(KV_BYTES), "AMBIDEX_SAMPLE_EVERY": "0"}
        _, url = stack.enter_context(http_server(case.path, settings))
        sides = {PLAIN: url, **stack.enter_context(on_ray(case))}
        for seed in range(rounds + 1):
            load = random_load(REQUESTS, math.inf, case.vocabulary, lengths, NEW_TOKENS, seed)
            for name, url in sides.items():
                many = asyncio.run(outcome(url, case, load))
                # a prompt of its own: the first load has left its prompts in the cache
                single = random_load(1, math.inf, case.vocabulary, lengths, NEW_TOKENS, 1000 + seed)
                one = asyncio.run(outcome(url, case, single))
                found.setdefault(name, []).append((many, one))
    return {name: outcomes[1:] for name, outcomes in found.items()}


def records_of(case: Case, found: dict[str, list[tuple[Outcome, Outcome]]]) -> list[Record]:
    """Medians over rounds, and of the ratios of each round."""

    def record(side: str, which: int, measure: str, unit: str) -> Record:
        """`which` is 0 for the many requests and 1 for the one."""
        values = [getattr(each[which], measure) for each in found[side]]
        peers = [getattr(each[which], measure) for each in found[PLAIN]]
        params: dict[str, Any] = {
            "model": case.name,
            "side": side,
            "measure": measure,
            "requests": (REQUESTS, 1)[which],
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": NEW_TOKENS,
            "values": values,
            "peer": PLAIN,
            "peer_values": peers,
            "ray": ray.__version__,
        }
        ratio = statistics.median(a / b for a, b in zip(values, peers, strict=True))
        value, peer = statistics.median(values), statistics.median(peers)
        return Record("ray_serve", params, value, unit, peer, ratio)

    return [
        record(side, which, measure, unit)
        for side in found
        if side != PLAIN
        for which, measure, unit in MEASURES
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line a measure; with --json, keep the records."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", default=["starter", "opt-125m"], metavar="NAME")
    parser.add_argument("--top-k", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the records to this file")
    given = parser.parse_args(arguments)
    check_range("rounds", given.rounds, 1, 100)
    check_writable(given.json)
    print(f"{MACHINE}, torch {VERSIONS['torch']}, Ray {ray.__version__}")
    records = []
    for name in given.model:
        with case_of(name, given.top_k) as case:
            found = measure(case, given.rounds)
        for record in records_of(case, found):
            records.append(record)
            about = record.params
            label = f"{name}, {about['side']}, {about['requests']} at once, {about['measure']}"
            print(f"{label:<60}  {record.value:10.4g}  plain {record.peer_value:10.4g}", end="")
            print(f" {record.unit}  {record.ratio:.2f}", flush=True)
    if given.json is not None:
        write_records(given.json, records)


if __name__ == "__main__":
    main()
