"""The CPU's own kernels, compiled on first use (build.py): how they are called, and their memory.

torch's operators read a weight at half the memory's bandwidth when tokens are few, and cost tens of
microseconds each. These kernels are C (source/), called with pointers. Their Python faces are
linear.py, experts.py, elementwise.py, cache.py and layers.py, and each says what its arguments are.
Their references are torch's operators and engine/model.

A token's result does not depend on the batch: every sum is taken in an order that the token's own
data decide, whatever else is in the batch, however many threads run, and whichever path is taken.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading
from typing import Any, Final

import torch
from torch import Tensor

from engine.cpu.build import library

DTYPES: Final = (torch.float32, torch.bfloat16)
INT, LONG, FLOAT, POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_local = threading.local()


def available() -> bool:
    """Whether the kernels could be compiled here."""
    return library() is not None


def supports(dtype: torch.dtype, hidden_size: int, head_dim: int = 32) -> bool:
    """Whether the kernels take a model of this type and shape: each row must fill whole vectors.

    `head_dim` is the width of an attention head; leave it out for an FFN alone.
    """
    return available() and dtype in DTYPES and hidden_size % 32 == 0 and head_dim % 32 == 0


def compiled() -> ctypes.CDLL:
    """The compiled kernels, where they are `available`."""
    lib = library()
    assert lib is not None
    return lib


def call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    """Call the kernel for weights of this type, on as many threads as torch uses."""
    assert dtype in DTYPES
    function = getattr(compiled(), f"{name}_{'half' if dtype == torch.bfloat16 else 'float'}")
    function(*arguments, INT(torch.get_num_threads()))


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return POINTER(None if tensor is None else tensor.data_ptr())


def scratch(name: str, elements: int, dtype: torch.dtype) -> Tensor:
    """Working memory of this thread, overwritten by the next call that asks for this name."""
    held: dict[tuple[str, torch.dtype], Tensor] = _local.__dict__.setdefault("held", {})
    found = held.get((name, dtype))
    if found is None or found.numel() < elements:
        with torch.inference_mode(False):
            found = held[name, dtype] = torch.empty(elements, dtype=dtype)
    return found


def lanes() -> int:
    """float32 numbers of one vector of this processor."""
    return int(compiled().lanes())


_HUGE_PAGE: Final = 2 << 20
_MADV_HUGEPAGE: Final = 14  # Linux, <asm-generic/mman-common.h>


def weight_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for weights, in huge pages where Linux grants them.

    Rows of a weight are a page or more apart: in small pages, looking addresses up costs a tenth to
    a third of the time.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _HUGE_PAGE or sys.platform != "linux":
        return torch.empty(shape, dtype=dtype)
    held = torch.empty(size + _HUGE_PAGE, dtype=torch.uint8)
    offset = -held.data_ptr() % _HUGE_PAGE
    address = POINTER(held.data_ptr() + offset)
    # advice only: the kernel may refuse it
    ctypes.CDLL(None).madvise(address, ctypes.c_size_t(size), _MADV_HUGEPAGE)
    return held[offset : offset + size].view(dtype).view(shape)
