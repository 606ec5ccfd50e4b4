"""The FFN by dense products: the in-place activation against its reference, and the whole."""

from __future__ import annotations

import pytest
import torch

from engine.gpu.ffn.all_experts import activate_chosen, activate_chosen_reference, ffn
from engine.model.activations import ACTIVATIONS
from engine.model.sliced_ffn import sparse_ffn_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("tokens", "experts", "size"), [(1, 5, 7), (3, 4, 300), (2, 1, 16)])
def test_activations_equal_the_reference(
    tokens: int,
    experts: int,
    size: int,
    activation: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    h_TF = torch.randn(tokens, experts * size, device=device).to(dtype)
    chosen_TE = torch.rand(tokens, experts, device=device) < 0.5
    expected = activate_chosen_reference(h_TF.clone(), chosen_TE, activation)
    found = activate_chosen(h_TF, chosen_TE, activation)
    assert found is h_TF
    torch.testing.assert_close(found, expected)
    assert bool((found[:, ~chosen_TE.any(0).repeat_interleave(size)] == 0).all())


def test_nan_stays_where_it_is_chosen_and_nowhere_else(device: torch.device) -> None:
    h_TF = torch.full((1, 8), torch.nan, device=device)
    chosen_TE = torch.tensor([[True, False]], device=device)
    activate_chosen(h_TF, chosen_TE, "relu")
    assert bool(h_TF[0, :4].isnan().all())
    assert bool((h_TF[0, 4:] == 0).all())


def test_the_ffn_is_the_sparse_one(device: torch.device) -> None:
    x_TD, up_FD, down_FD = (torch.randn(n, 20, device=device) for n in (5, 48, 48))
    chosen_TE = torch.rand(5, 6, device=device) < 0.5
    torch.testing.assert_close(
        ffn(x_TD, up_FD, down_FD, chosen_TE, "relu2"),
        sparse_ffn_reference(x_TD, up_FD, down_FD, chosen_TE, "relu2"),
    )
