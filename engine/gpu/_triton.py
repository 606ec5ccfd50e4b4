"""The one place that imports Triton, so that the references also load where Triton does not exist.

Triton is published for Linux only. Elsewhere `jit` leaves a kernel as the plain function it is,
which nobody calls: the launchers are for CUDA tensors, or for CPU tensors under Triton's
interpreter (`TRITON_INTERPRET=1`, set before this module is imported).
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch

__all__ = [
    "AVAILABLE",
    "INTERPRETED",
    "TensorDescriptor",
    "cache_problem",
    "cdiv",
    "chain",
    "gdc_launch_dependents",
    "gdc_wait",
    "jit",
    "next_power_of_2",
    "tl",
]

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
    from triton.tools.tensor_descriptor import TensorDescriptor
except ModuleNotFoundError:
    triton = tl = gdc_launch_dependents = gdc_wait = TensorDescriptor = None

AVAILABLE: bool = triton is not None

# The interpreter multiplies bfloat16 operands of tl.dot as the integers that hold them, so kernels
# widen them first when this is set; on a GPU the widening would lose the tensor cores.
INTERPRETED: bool = triton is not None and bool(triton.knobs.runtime.interpret)


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit` with a type, so that kernels stay checked functions for mypy."""
    return kernel if triton is None else triton.jit(kernel)


def cache_problem() -> str | None:
    """Why Triton cannot store compiled kernels, as a sentence; None if it can.

    Without a folder to write to, the first step would fail.
    """
    if triton is None:
        return "Triton is not installed"
    folder = triton.knobs.cache.dir
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return f"Triton cannot keep its kernels in {folder} (TRITON_CACHE_DIR): {error.strerror}"


@functools.cache
def chain(device: torch.device) -> dict[str, bool]:
    """Launch options of kernels that follow each other by programmatic dependent launch.

    Such a kernel starts while the one before it still runs, fetches what no kernel writes (the
    weights), and touches everything else only after `gdc_wait`, which returns when the one before
    has ended: each of its programs must call it, whatever it does then. Hopper and newer.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {"CHAINED": False}
    return {"CHAINED": True, "launch_pdl": True}


def cdiv(a: int, b: int) -> int:
    """The least integer not below a / b."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two not below n >= 1: the only sizes a Triton block may have."""
    return 1 << (n - 1).bit_length()
