"""What the kernel tests share: where they run, poisoned allocations and the error they measure.

Without a CUDA device the kernels run in Triton's interpreter, which must be switched on before they
are imported: `tests/conftest.py` sets TRITON_INTERPRET.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN, True or a wild integer, so what a kernel forgets to write shows."""

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> Tensor:
            fresh = allocate(*args, **kwargs)
            return fresh.fill_(torch.nan if fresh.is_floating_point() else 0x5A5A5A5A)

        return allocate_poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """|actual - expected| / |expected| in float64; NaN anywhere makes it NaN, which fails."""

    def measure(actual: Tensor, expected: Tensor) -> float:
        actual, expected = actual.double(), expected.double()
        return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))

    return measure
