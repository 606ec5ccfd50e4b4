"""Capturing a CUDA graph of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def capture(compute: Callable[[], object], pool: Any) -> torch.cuda.CUDAGraph:
    """Run `compute` once on a side stream, to compile its kernels, then record what it launches.

    That run writes the same keys and values as the replay that follows.

    Args:
        compute: reads and writes tensors that stay where they are.
        pool: memory from `torch.cuda.graph_pool_handle`, shared by graphs that never run together.
    """
    current = torch.cuda.current_stream()
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    with torch.cuda.stream(side):
        compute()
    current.wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Only this thread's calls must be capturable: others may use the device meanwhile.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        compute()
    return graph
