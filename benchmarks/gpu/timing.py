"""How the GPU benchmarks time and check: graph replay, rivals in turn, medians; errors that end.

Without a CUDA device everything runs once, by the host's clock: for trying a benchmark out at tiny
sizes in Triton's interpreter before it costs a GPU's time. Such numbers mean nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.records import Record

ROUNDS = 15
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# One call of what is timed; its argument counts calls, for those who alternate weights.
Call = Callable[[int], object]


def graph_of(call: Call, calls: int) -> torch.cuda.CUDAGraph:
    """A graph of `calls` calls, call i on the i-th weight set; compiled and warm."""
    for i in range(2):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i)
    return graph


def replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def interleaved_us(rivals: Sequence[Call], calls: int) -> list[float]:
    """Median microseconds of one call of each rival, replayed in turn."""
    if DEVICE == "cpu":
        return [host_us(call) for call in rivals]
    graphs = [graph_of(call, calls) for call in rivals]
    rounds = [[replay_ms(graph) for graph in graphs] for _ in range(ROUNDS + 2)][2:]
    return [statistics.median(times) * 1e3 / calls for times in zip(*rounds, strict=True)]


def host_us(call: Call) -> float:
    """Microseconds of a single call on the host."""
    start = time.perf_counter()
    call(0)
    return (time.perf_counter() - start) * 1e6


def eager_us(call: Call) -> float:
    """Median microseconds of one call as Python launches it, the device idle before."""
    if DEVICE == "cpu":
        return host_us(call)

    def once() -> float:
        start: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        start.record()
        call(0)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    return statistics.median([once() for _ in range(ROUNDS + 2)][2:]) * 1e3


def relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())


def check(name: str, error: float, limit: float) -> Record:
    """A record of the error; a wrong kernel ends the benchmark."""
    if not error <= limit:
        raise SystemExit(f"{name}: relative error {error:.3g} exceeds {limit:.3g}")
    return Record(f"error {name}", {}, error, "relative")
