"""What HTTP costs: tokens a second of streamed requests, against the engine alone.

    python -m benchmarks.server.http_overhead [--model starter] [--stream-interval 0] [--json FILE]

A server and an engine, each in a process of its own, with the same checkpoint and settings, take
turns at the same load: 32 requests at once, 64 prompt tokens and 128 output tokens each, greedy, on
the same CPU. The engine's process counts tokens; the server's are streamed by /v1/completions to
one client, which runs on the same CPU too and reads bytes without taking the JSON apart. So what is
missing to 1 is the server's work and the client's together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import torch

from benchmarks.load import Arrival, Served, random_load
from benchmarks.models import EngineServer, model_config, random_checkpoint, shape_named
from benchmarks.peers.peer import Peer
from benchmarks.peers.vllm_worker import answer_all
from benchmarks.records import MACHINE, VERSIONS, Record, write_records
from benchmarks.server.http_server import http_server
from engine.checkpoint import STARTER, load, save
from engine.config import EngineConfig, ModelConfig, check_range
from engine.console import check_writable
from engine.policy import ExpertPolicy
from engine.serving.engine import Engine
from server.settings import Settings

REQUESTS: Final = 32
PROMPT_TOKENS: Final = 64
NEW_TOKENS: Final = 128
KV_BYTES: Final = 1 << 30
EXPERTS: Final = 32  # of a random model
CLIENT_SECONDS: Final = 600.0


@dataclass(frozen=True)
class Case:
    """A checkpoint, and how many experts its tokens use."""

    name: str
    path: Path
    vocabulary: int
    top_k: int


@contextmanager
def case_of(name: str, top_k: int) -> Iterator[Case]:
    """The packaged starter, or a random model of a shape in a temporary directory."""
    if name == "starter":
        config = ModelConfig.from_dict(json.loads((STARTER / "config.json").read_text()))
        yield Case(name, STARTER, config.vocab_size, top_k)
        return
    config = model_config(shape_named(name), EXPERTS, torch.bfloat16)
    with tempfile.TemporaryDirectory(prefix="ambidex-overhead-") as directory:
        path = Path(directory) / name
        made = random_checkpoint(config)
        save(path, made.model, made.tokenizer, {})
        yield Case(name, path, config.vocab_size, top_k)


def work() -> None:
    """The engine alone, as a `Peer` of the measurement: it says what it serves first."""
    about = json.loads(sys.stdin.readline())
    engine = Engine(load(about["path"]), EngineConfig(kv_cache_bytes=KV_BYTES))
    server = EngineServer(engine, ExpertPolicy.top_k(about["top_k"]))

    def answer(line: str) -> None:
        print(line, flush=True)

    answer(json.dumps(about))
    answer_all(server, sys.stdin, answer)


def alone(peer: Peer, arrivals: Sequence[Arrival]) -> float:
    """Tokens a second of the engine alone."""
    served = peer.ask({"do": "serve", "arrivals": [asdict(arrival) for arrival in arrivals]})
    return Served.from_dict(served).tokens_per_second


async def stream(host: str, port: int, body: dict[str, Any]) -> int:
    """Tokens that one streamed completion says it has had; read to its end."""
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    tail = b""
    while piece := await reader.read(1 << 16):
        tail = (tail + piece)[-4096:]
    writer.close()
    events = [line for line in tail.split(b"\n") if line.startswith(b"data: {")]
    if b"data: [DONE]" not in tail or not events:
        raise SystemExit(f"a stream ended early: {tail[-300:]!r}")
    return int(json.loads(events[-1].removeprefix(b"data: "))["usage"]["completion_tokens"])


async def streamed(url: str, case: Case, arrivals: Sequence[Arrival]) -> float:
    """Tokens a second of all requests together, from the first byte sent to the last received."""
    place = urlsplit(url)
    assert place.hostname is not None
    assert place.port is not None
    options = {
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "experts": {"top_k": case.top_k},
    }
    start = time.perf_counter()
    bodies = [{"prompt": arrival.prompt, **options} for arrival in arrivals]
    streams = (stream(place.hostname, place.port, body) for body in bodies)
    counts = await asyncio.wait_for(asyncio.gather(*streams), CLIENT_SECONDS)
    seconds = time.perf_counter() - start
    if counts != [NEW_TOKENS] * len(arrivals):
        raise SystemExit(f"streams of {sorted(set(counts))} tokens, not {NEW_TOKENS}")
    return sum(counts) / seconds


def measure(case: Case, rounds: int, stream_interval: float) -> Record:
    """Both sides in turn; one load before, which is not counted."""
    settings = {
        "AMBIDEX_KV_CACHE_BYTES": str(KV_BYTES),
        "AMBIDEX_SAMPLE_EVERY": "0",
        "AMBIDEX_STREAM_INTERVAL": str(stream_interval),
    }
    command = [sys.executable, "-m", "benchmarks.server.http_overhead", "--worker"]
    about = {"path": str(case.path), "top_k": case.top_k}
    lengths = (PROMPT_TOKENS, PROMPT_TOKENS)
    pairs: list[tuple[float, float]] = []
    with http_server(case.path, settings) as (_, url), Peer(command, about, {}) as engine:
        for seed in range(rounds + 1):
            load = random_load(REQUESTS, math.inf, case.vocabulary, lengths, NEW_TOKENS, seed)
            pairs.append((asyncio.run(streamed(url, case, load)), alone(engine, load)))
    http, peer_values = zip(*pairs[1:], strict=True)
    params = {
        "model": case.name,
        "top_k": case.top_k,
        "requests": REQUESTS,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "stream_interval": stream_interval,
        "values": http,
        "peer_values": peer_values,
    }
    ratio = statistics.median(h / e for h, e in pairs[1:])
    value, peer = statistics.median(http), statistics.median(peer_values)
    return Record("http_overhead", params, value, "tokens/s", peer, ratio)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line a model; with --json, keep the records."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", default=["starter", "opt-125m"], metavar="NAME")
    parser.add_argument("--top-k", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    usual = Settings.model_fields["stream_interval"].default
    parser.add_argument("--stream-interval", type=float, default=usual, help="of the server")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        work()
        return
    check_range("rounds", given.rounds, 1, 100)
    check_writable(given.json)
    print(f"{MACHINE}, torch {VERSIONS['torch']}, {REQUESTS} requests at once, tokens a second")
    records = []
    for name in given.model:
        with case_of(name, given.top_k) as case:
            record = measure(case, given.rounds, given.stream_interval)
        records.append(record)
        print(f"{name:>10}  streamed {record.value:8.0f}  engine {record.peer_value:8.0f}", end="")
        print(f"  {record.ratio:.2f}", flush=True)
    if given.json is not None:
        write_records(given.json, records)


if __name__ == "__main__":
    main()
