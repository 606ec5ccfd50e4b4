"""How long an import will take on this machine, from how fast it multiplies matrices."""

from __future__ import annotations

import time
from typing import Final

import torch

from training.importing.formats.source import dtype_of
from training.importing.plan import Plan

_ROWS, _INNER, _COLUMNS = 1024, 1024, 2048
_ROUNDS: Final = 3


def estimate_seconds(plan: Plan) -> float:
    """About how many seconds the import needs; takes a fraction of one.

    Its kernels are faster than the product that is timed, and clustering mostly ends before its
    bounds: attention, norms and files take what that leaves, and for a large model not all of it.
    """
    weights = plan.flops / _flops_per_second(dtype_of(plan.config.torch_dtype))
    return weights + plan.single_flops / _flops_per_second(torch.float32)


def _flops_per_second(dtype: torch.dtype) -> float:
    """The speed of a product of matrices that fit no cache, the best of a few tries."""
    x, weight = torch.randn(_ROWS, _INNER).to(dtype), torch.randn(_COLUMNS, _INNER).to(dtype)
    best = float("inf")
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        x @ weight.T
        best = min(best, time.perf_counter() - began)
    return 2.0 * _ROWS * _INNER * _COLUMNS / best
