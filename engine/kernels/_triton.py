"""The one place that imports Triton, so that the references also load where Triton does not exist.

Triton is published for Linux only. Elsewhere `jit` leaves a kernel as the plain function it is,
which nobody calls: the launchers are for CUDA tensors, or for CPU tensors under Triton's
interpreter (`TRITON_INTERPRET=1`, set before this module is imported).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = [
    "AVAILABLE",
    "INTERPRETED",
    "TensorDescriptor",
    "cdiv",
    "jit",
    "next_power_of_2",
    "tl",
]

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ModuleNotFoundError:
    triton = tl = TensorDescriptor = None

AVAILABLE: bool = triton is not None

# The interpreter multiplies bfloat16 operands of tl.dot as the integers that hold them, so kernels
# widen them first when this is set; on a GPU the widening would lose the tensor cores.
INTERPRETED: bool = triton is not None and bool(triton.knobs.runtime.interpret)


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit` with a type, so that kernels stay checked functions for mypy."""
    return kernel if triton is None else triton.jit(kernel)


def cdiv(a: int, b: int) -> int:
    """The least integer not below a / b."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two not below n >= 1: the only sizes a Triton block may have."""
    return 1 << (n - 1).bit_length()
