"""Residual sum and RMSNorm in one launch, against the reference and PyTorch's own."""

from __future__ import annotations

import pytest
import torch

from engine.gpu.add_norm import add_norm, add_norm_reference

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 100), (3, 2), (2, 520)])
def test_equals_the_reference(
    tokens: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    x_TD, delta_TD = torch.randn(2, tokens, width).to(device, dtype).unbind(0)
    weight_D = torch.randn(width).to(device, dtype)
    # The interpreter cuts bfloat16 off where a device rounds.
    bounds = (
        {"rtol": 2e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 2e-3, "atol": 1e-6}
    )
    found = add_norm(x_TD, delta_TD, weight_D, 1e-5)
    for actual, expected in zip(
        found, add_norm_reference(x_TD, delta_TD, weight_D, 1e-5), strict=True
    ):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, **bounds)


def test_the_reference_is_the_norm_of_the_sum() -> None:
    x_TD, delta_TD, weight_D = torch.randn(4, 12), torch.randn(4, 12), torch.randn(12)
    total_TD, normed_TD = add_norm_reference(x_TD, delta_TD, weight_D, 1e-3)
    torch.testing.assert_close(total_TD, x_TD + delta_TD)
    expected = torch.nn.functional.rms_norm(x_TD + delta_TD, (12,), weight_D, 1e-3)
    torch.testing.assert_close(normed_TD, expected)
