"""A server at twice its capacity, with clients that misbehave: does it lose, leak or slow down?

    python -m benchmarks.server.soak --minutes 10 --json benchmarks/results/cpu-soak.json

Starts a server of its own, measures what it serves when clients wait for each other, then sends
twice as many requests a second, in random order: streams and whole answers, clients that leave in
the middle, that stop waiting, that set deadlines too short, bodies that are no requests, and wrong
keys. Afterwards, and exit status 1 unless all hold:

- every request whose client stayed has exactly one end: an answer, or an error with its reason;
- no KV block, running or waiting request, or place in the server is left;
- resident memory does not grow by more than --max-slope MiB a minute, from the end of the warm-up
  on, which is a third of the time;
- 99 of 100 times the server's event loop is at most --max-lag seconds late.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx

from benchmarks.records import Record, write_records
from benchmarks.server.http_server import http_server
from engine.checkpoint import STARTER

KEY: Final = "soak-0123456789abcdef"
SETTINGS: Final = {
    "AMBIDEX_API_KEYS": f"soak:{KEY}",
    "AMBIDEX_MAX_CONCURRENT_REQUESTS": "64",
    "AMBIDEX_MAX_WAITING": "32",
    "AMBIDEX_MAX_NUM_SEQS": "16",
    "AMBIDEX_KV_CACHE_BYTES": str(32 << 20),
    "AMBIDEX_SAMPLE_EVERY": "64",
}
CLIENT_SECONDS: Final = 120.0  # a client that stays and hears nothing for so long has lost
POLICIES: Final[tuple[Any, ...]] = ("auto", "dense", {"top_k": 4}, {"mass": 0.8})
WORDS: Final = ("def", "return", "import os", "class", "for x in", "(self)", "==", "\n", "é🙂")
# What a client does, and how often.
BEHAVIOURS: Final = {
    "whole": 30,
    "stream": 30,
    "leaves": 12,
    "gives up": 8,
    "deadline": 10,
    "bad body": 7,
    "bad key": 3,
}
BAD_BODIES: Final = (
    b"{",
    b"null",
    b"[]",
    b'{"inputs": ""}',
    b'{"inputs": "x", "parameters": {"max_new_tokens": -1}}',
    b'{"inputs": "x", "parameters": {"unknown": 1}}',
    b'{"inputs": "\\ud800"}',
    b'{"inputs": "' + b"x" * 100_000 + b'"}',
    b"\xff\xfe",
)


@dataclass
class Tally:
    """What the clients saw."""

    ends: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    sent: int = 0


@dataclass(frozen=True)
class Sample:
    """Resident memory of the server at a moment."""

    seconds: float
    mib: float


class Clients:
    """Sends requests and keeps account of their ends."""

    def __init__(self, http: httpx.AsyncClient, seed: int) -> None:
        self.http = http
        self.random = random.Random(seed)
        self.tally = Tally()

    def body(self) -> dict[str, Any]:
        pick = self.random
        return {
            "inputs": " ".join(pick.choices(WORDS, k=pick.randint(1, 120))),
            "parameters": {
                "max_new_tokens": pick.randint(1, 48),
                "experts": pick.choice(POLICIES),
                "do_sample": pick.random() < 0.5,
                "details": pick.random() < 0.3,
                "stop": pick.choice(([], ["return"], ["\n\n"])),
            },
        }

    async def one(self, behaviour: str) -> None:
        """One client, from its request to its end."""
        self.tally.sent += 1
        try:
            end = await asyncio.wait_for(self._behave(behaviour), CLIENT_SECONDS)
        except Exception as error:  # whatever it is, its client has no answer
            self.tally.lost.append(f"{behaviour}: {type(error).__name__}: {error}"[:200])
            return
        self.tally.ends[f"{behaviour}: {end}"] += 1

    async def _behave(self, behaviour: str) -> str:
        if behaviour == "bad body":
            response = await self.http.post("/generate", content=self.random.choice(BAD_BODIES))
            return _error(response, expected={422, 429})
        if behaviour == "bad key":
            headers = {"Authorization": "Bearer wrong"}
            response = await self.http.post("/generate", json=self.body(), headers=headers)
            return _error(response, expected={401})
        if behaviour == "gives up":
            try:
                seconds = self.random.uniform(0.01, 1.0)
                await asyncio.wait_for(self._whole({}), seconds)
            except TimeoutError:
                return "left"
            return "answered first"
        if behaviour == "deadline":
            headers = {"X-Request-Timeout": f"{self.random.uniform(0.02, 0.6):.3f}"}
            return await self.random.choice((self._whole, self._stream))(headers)
        if behaviour == "leaves":
            return await self._stream({}, leave_after=self.random.randint(1, 12))
        return await (self._stream({}) if behaviour == "stream" else self._whole({}))

    async def _whole(self, headers: dict[str, str]) -> str:
        response = await self.http.post("/generate", json=self.body(), headers=headers)
        if response.status_code == 200:
            assert isinstance(response.json()["generated_text"], str)
            return "answered"
        return _error(response, expected={429, 504} if headers else {429})

    async def _stream(self, headers: dict[str, str], leave_after: int = 0) -> str:
        request = self.http.stream("POST", "/generate_stream", json=self.body(), headers=headers)
        async with request as response:
            if response.status_code != 200:
                await response.aread()
                return _error(response, expected={429, 504} if headers else {429})
            events: list[dict[str, Any]] = []
            async for line in response.aiter_lines():
                if line:
                    events.append(json.loads(line.removeprefix("data: ")))
                if leave_after and len(events) >= leave_after:
                    return "left"
        return _stream_end(events)


def _error(response: httpx.Response, expected: set[int]) -> str:
    """The kind of an error; raises unless it is one that a client must expect."""
    kind = str(response.json()["error_type"])
    if response.status_code not in expected:
        raise ValueError(f"status {response.status_code} ({kind})")
    if response.status_code == 429 and int(response.headers["retry-after"]) < 1:
        raise ValueError("429 without Retry-After")
    return kind


def _stream_end(events: Sequence[dict[str, Any]]) -> str:
    """How a stream ended; raises unless its last event, and no other, says so."""
    ends = [e for e in events if "error" in e or e.get("details")]
    if len(ends) != 1 or ends[0] is not events[-1]:
        raise ValueError(f"{len(ends)} ends in {len(events)} events")
    return str(ends[0].get("error_type", "answered"))


async def capacity(clients: Clients, seconds: float) -> float:
    """Requests a second that 16 clients get who wait for each answer."""
    served, start = 0, time.perf_counter()

    async def loop() -> None:
        nonlocal served
        while time.perf_counter() - start < seconds:
            await clients._whole({})
            served += 1

    await asyncio.gather(*(loop() for _ in range(16)))
    return served / (time.perf_counter() - start)


async def flood(clients: Clients, rate: float, seconds: float) -> None:
    """Poisson arrivals of `rate` requests a second; returns when all have their ends."""
    names, weights = list(BEHAVIOURS), list(BEHAVIOURS.values())
    tasks: set[asyncio.Task[None]] = set()
    start = at = time.perf_counter()
    while at - start < seconds:
        at += clients.random.expovariate(rate)
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        (behaviour,) = clients.random.choices(names, weights)
        task = asyncio.create_task(clients.one(behaviour))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


async def watch_memory(pid: int, samples: list[Sample]) -> None:
    """Note the resident memory every second, for ever."""
    start = time.perf_counter()
    while True:
        samples.append(Sample(time.perf_counter() - start, resident_mib(pid)))
        await asyncio.sleep(1.0)


def resident_mib(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    (line,) = (line for line in text.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


def slope(samples: Sequence[Sample]) -> float:
    """MiB a minute by least squares, after the first third of the time."""
    late = [s for s in samples if s.seconds >= samples[-1].seconds / 3]
    if len(late) < 3:
        return 0.0
    x = sum(s.seconds for s in late) / len(late)
    y = sum(s.mib for s in late) / len(late)
    spread = sum((s.seconds - x) ** 2 for s in late)
    return 60.0 * sum((s.seconds - x) * (s.mib - y) for s in late) / spread


def read_metrics(text: str) -> dict[str, float]:
    """Samples by name and labels, as they are written."""
    pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def quantile(metrics: dict[str, float], name: str, share: float) -> float:
    """Upper bound of the bucket that holds the quantile."""
    prefix = f'{name}_bucket{{le="'
    buckets = {
        float(key.removeprefix(prefix).removesuffix('"}')): value
        for key, value in metrics.items()
        if key.startswith(prefix)
    }
    needed = share * max(buckets.values())
    return min(bound for bound, count in buckets.items() if count >= needed)


LEFT_OVER: Final = (
    *("ambidex_kv_blocks_used", "ambidex_requests_running", "ambidex_requests_waiting"),
    "ambidex_http_requests_active",
)


async def left_over(http: httpx.AsyncClient) -> dict[str, float]:
    """What has not been given back within 20 seconds after the last client."""
    deadline = time.monotonic() + 20
    while True:
        metrics = read_metrics((await http.get("/metrics")).text)
        rest = {name: metrics[name] for name in LEFT_OVER if metrics[name]}
        if not rest or time.monotonic() > deadline:
            return rest
        await asyncio.sleep(0.1)


@dataclass(frozen=True)
class Report:
    """What a soak found."""

    seconds: float
    rate: float
    tally: Tally
    left: dict[str, float]
    slope: float
    memory: list[Sample]
    metrics: dict[str, float]

    @property
    def lag(self) -> float:
        return quantile(self.metrics, "ambidex_event_loop_lag_seconds", 0.99)

    def problems(self, max_slope: float, max_lag: float) -> list[str]:
        """Sentences, none if all is well."""
        found = [f"lost: {text}" for text in self.tally.lost[:20]]
        found += [f"left over: {name} {value:g}" for name, value in self.left.items()]
        if self.slope > max_slope:
            found.append(f"memory grows by {self.slope:.2f} MiB a minute, at most {max_slope:g}")
        if self.lag > max_lag:
            found.append(f"the event loop is {self.lag:g} s late, at most {max_lag:g}")
        return found

    def records(self, model: str) -> list[Record]:
        params = {"model": model, "seconds": self.seconds, "rate": self.rate}
        ends = dict(sorted(self.tally.ends.items()))
        values = {
            "lost": (len(self.tally.lost), "requests"),
            "left_over": (len(self.left), "gauges"),
            "sent": (self.tally.sent, "requests"),
            "memory_slope": (self.slope, "MiB/min"),
            "memory_end": (self.memory[-1].mib, "MiB"),
            "event_loop_lag_p99": (self.lag, "s"),
        }
        return [
            Record(f"soak_{name}", {**params, "ends": ends}, value, unit)
            for name, (value, unit) in values.items()
        ]


async def soak(pid: int, url: str, seconds: float, seed: int) -> Report:
    """Measure the capacity, then send twice as much for `seconds`."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=50)
    headers = {"Authorization": f"Bearer {KEY}"}
    options: dict[str, Any] = {"base_url": url, "trust_env": False, "timeout": CLIENT_SECONDS}
    async with httpx.AsyncClient(**options, headers=headers, limits=limits) as http:
        clients = Clients(http, seed)
        rate = 2 * await capacity(clients, min(10.0, seconds / 6))
        memory: list[Sample] = []
        watching = asyncio.create_task(watch_memory(pid, memory))
        await flood(clients, rate, seconds)
        left = await left_over(http)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        metrics = read_metrics((await http.get("/metrics")).text)
    return Report(seconds, rate, clients.tally, left, slope(memory), memory, metrics)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--model", type=Path, default=STARTER)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-slope", type=float, default=1.0, help="MiB a minute")
    parser.add_argument("--max-lag", type=float, default=0.05, help="seconds, 99th percentile")
    parser.add_argument("--json", type=Path, help="write the records here")
    options = parser.parse_args(arguments)
    with http_server(options.model, SETTINGS) as (child, url):
        report = asyncio.run(soak(child.pid, url, 60 * options.minutes, options.seed))
    for end, count in sorted(report.tally.ends.items()):
        print(f"{count:8} {end}")
    print(f"{report.tally.sent} requests, {report.rate:.1f} a second; ", end="")
    print(f"memory {report.memory[-1].mib:.0f} MiB, {report.slope:+.2f} MiB a minute; ", end="")
    print(f"event loop at most {report.lag:g} s late (p99)")
    if options.json:
        write_records(options.json, report.records(options.model.name))
    problems = report.problems(options.max_slope, options.max_lag)
    print("\n".join(problems) or "nothing lost, nothing left over")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
