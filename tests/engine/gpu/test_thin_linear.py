"""Products of one token against their references, at widths that fit no block."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.gpu import thin_linear as thin
from engine.gpu.add_norm import Norm

pytestmark = pytest.mark.usefixtures("poisoned")

RelativeError = Callable[[Tensor, Tensor], float]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SIZES = [(100, 36), (64, 129), (33, 7)]


def made(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape).to(device, dtype)


def wide(norm: Norm | None) -> Norm | None:
    return None if norm is None else Norm(norm.weight_D.double(), norm.epsilon)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
@pytest.mark.parametrize("form", ["plain", "normed relu2", "added", "all"])
def test_linear_equals_its_reference(
    inputs: int,
    outputs: int,
    form: str,
    dtype: torch.dtype,
    device: torch.device,
    relative_error: RelativeError,
) -> None:
    x, weight = (made(n, inputs, dtype=dtype, device=device) for n in (1, outputs))
    norm = (
        None if form in ("plain", "added") else Norm(made(inputs, dtype=dtype, device=device), 0.1)
    )
    activation = "relu2" if form == "normed relu2" else "relu" if form == "all" else None
    add_to = made(1, outputs, dtype=dtype, device=device) if form in ("added", "all") else None
    actual = thin.thin_linear(x, weight, norm=norm, activation=activation, add_to=add_to)
    expected = thin.thin_linear_reference(
        x.double(), weight.double(), norm=wide(norm), activation=activation, add_to=add_to
    )
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < TOLERANCE[dtype]
    assert thin.thin_linear(x, weight, dtype=torch.float32).dtype == torch.float32


def test_nan_inputs_stay_nan(device: torch.device) -> None:
    x = torch.full((1, 8), torch.nan, device=device)
    weight = torch.randn(4, 8, device=device)
    assert thin.thin_linear(x, weight, activation="relu").isnan().all()
