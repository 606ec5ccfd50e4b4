"""The FFN that reads each used expert once, against its reference in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.gpu.ffn.used_experts import MOST_TOKENS, ffn, ffn_reference

pytestmark = pytest.mark.usefixtures("poisoned")

RelativeError = Callable[[Tensor, Tensor], float]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def weights(
    tokens: int, width: int, neurons: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    return [torch.randn(n, width).to(device, dtype) for n in (tokens, neurons, neurons)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize(
    ("tokens", "width", "experts", "size", "share"),
    [(1, 100, 5, 24, 0.5), (17, 140, 12, 10, 0.1), (MOST_TOKENS, 36, 3, 70, 1.0)],
)
def test_equals_the_reference(
    tokens: int,
    width: int,
    experts: int,
    size: int,
    share: float,
    activation: str,
    dtype: torch.dtype,
    device: torch.device,
    relative_error: RelativeError,
) -> None:
    x, up, down = weights(tokens, width, experts * size, dtype, device)
    chosen = torch.rand(tokens, experts, device=device) < share
    chosen[0, experts - 1] = True
    actual = ffn(x, up, down, chosen, activation)
    expected = ffn_reference(x.double(), up.double(), down.double(), chosen, activation)
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < TOLERANCE[dtype]


def test_experts_that_nobody_chose_are_not_read(device: torch.device) -> None:
    """Their rows hold NaN, which any product would spread."""
    x, up, down = weights(3, 40, 6 * 20, torch.float32, device)
    chosen = torch.zeros(3, 6, dtype=torch.bool, device=device)
    chosen[0, 1] = chosen[2, 1] = chosen[1, 4] = True
    for tensor in (up, down):
        tensor.view(6, 20, 40)[[0, 2, 3, 5]] = torch.nan
    assert ffn(x, up, down, chosen, "relu").isfinite().all()


def test_a_token_without_experts_gets_zeros(device: torch.device) -> None:
    x, up, down = weights(2, 40, 4 * 8, torch.float32, device)
    chosen = torch.zeros(2, 4, dtype=torch.bool, device=device)
    assert not ffn(x, up, down, chosen, "relu").any()
    chosen[1, 2] = True
    y = ffn(x, up, down, chosen, "relu")
    assert not y[0].any()
    assert y[1].any()
