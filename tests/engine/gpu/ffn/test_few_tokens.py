"""The few-token FFN against the reference in float64, at shapes that fit no block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.gpu.add_norm import Norm
from engine.gpu.arrivals import Arrivals
from engine.gpu.ffn.few_tokens import (
    ffn,
    ffn_reference,
    first_product,
    first_product_reference,
    second_product,
    second_product_reference,
)
from engine.model.activations import activate_reference

pytestmark = pytest.mark.usefixtures("poisoned")

RelativeError = Callable[[Tensor, Tensor], float]

# Two roundings, of activations and of the output; the interpreter rounds bfloat16 towards zero.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def weights(
    tokens: int, width: int, neurons: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    x_TD, up_FD, down_FD = (
        torch.randn(rows, width, device=device).to(dtype) for rows in (tokens, neurons, neurons)
    )
    return x_TD, up_FD, down_FD


def random_ids(tokens: int, experts: int, max_k: int, device: torch.device) -> Tensor:
    """Ascending ids, 0 to max_k of them a token."""
    ids_TK = torch.full((tokens, max_k), -1, dtype=torch.int32)
    for row in ids_TK:
        taken = int(torch.randint(0, max_k + 1, ()))
        row[:taken] = torch.randperm(experts)[:taken].sort().values
    return ids_TK.to(device)


def in_float64(
    x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, ids_TK: Tensor, size: int, activation: str
) -> Tensor:
    x_TD, up_FD, down_FD = x_TD.double(), up_FD.double(), down_FD.double()
    return ffn_reference(x_TD, up_FD, down_FD, ids_TK, size, activation)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize(
    ("tokens", "width", "experts", "size", "max_k"),
    [(1, 100, 5, 24, 3), (3, 64, 8, 16, 4), (2, 128, 3, 50, 2)],
)
def test_equals_the_reference(
    tokens: int,
    width: int,
    experts: int,
    size: int,
    max_k: int,
    activation: str,
    dtype: torch.dtype,
    device: torch.device,
    relative_error: RelativeError,
) -> None:
    x_TD, up_FD, down_FD = weights(tokens, width, experts * size, dtype, device)
    ids_TK = random_ids(tokens, experts, max_k, device)
    ids_TK[0, 0] = experts - 1
    ids_TK[0, 1:] = -1
    y_TD = ffn(x_TD, up_FD, down_FD, ids_TK, size, activation, Arrivals(device))
    expected = in_float64(x_TD, up_FD, down_FD, ids_TK, size, activation)
    assert y_TD.dtype == dtype
    assert relative_error(y_TD, expected) < TOLERANCE[dtype]


def test_all_experts_are_the_dense_ffn(device: torch.device, relative_error: RelativeError) -> None:
    x_TD, up_FD, down_FD = weights(2, 100, 6 * 20, torch.float32, device)
    ids_TK = torch.arange(6, dtype=torch.int32, device=device).expand(2, 6)
    y_TD = ffn(x_TD, up_FD, down_FD, ids_TK, 20, "relu", Arrivals(device))
    dense_TD = activate_reference(x_TD.double() @ up_FD.double().T, "relu") @ down_FD.double()
    assert relative_error(y_TD, dense_TD) < 2e-6


def test_a_token_without_experts_gets_zeros(device: torch.device) -> None:
    x_TD, up_FD, down_FD = weights(1, 32, 32, torch.float32, device)
    ids_TK = torch.full((1, 2), -1, dtype=torch.int32, device=device)
    assert (ffn(x_TD, up_FD, down_FD, ids_TK, 16, "relu", Arrivals(device)) == 0).all()


def test_only_the_chosen_rows_take_part(device: torch.device) -> None:
    """Rows of other experts hold NaN, which any read of them would carry into the output."""
    x_TD, up_FD, down_FD = weights(1, 64, 4 * 16, torch.float32, device)
    for tensor in (up_FD, down_FD):
        tensor[:16] = torch.nan
        tensor[32:] = torch.nan
    ids_TK = torch.tensor([[1, -1]], dtype=torch.int32, device=device)
    assert ffn(x_TD, up_FD, down_FD, ids_TK, 16, "relu", Arrivals(device)).isfinite().all()


def test_a_nan_reaches_the_output(device: torch.device) -> None:
    x_TD, up_FD, down_FD = weights(1, 64, 16, torch.float32, device)
    x_TD[0, 5] = torch.nan
    ids_TK = torch.zeros((1, 1), dtype=torch.int32, device=device)
    assert ffn(x_TD, up_FD, down_FD, ids_TK, 16, "relu", Arrivals(device)).isnan().all()


def test_a_token_comes_out_alike_in_any_company(device: torch.device) -> None:
    """Bit for bit: alone or in a batch, and with more unused slots than it needs."""
    x_TD, up_FD, down_FD = weights(3, 100, 8 * 24, torch.bfloat16, device)
    ids_TK = torch.tensor([[1, 6, -1], [0, 2, 7], [3, -1, -1]], dtype=torch.int32, device=device)
    together = ffn(x_TD, up_FD, down_FD, ids_TK, 24, "relu", Arrivals(device))
    for t in range(3):
        ids_1K = ids_TK[t : t + 1, : int((ids_TK[t] >= 0).sum())]
        alone = ffn(x_TD[t : t + 1], up_FD, down_FD, ids_1K, 24, "relu", Arrivals(device))
        assert torch.equal(alone, together[t : t + 1])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "options",
    [
        "gate, relu",
        "biases, relu",
        "gate and biases, relu2",
        "fatrelu",
        "gate and biases, fatrelu",
        "gate, drelu",
    ],
)
def test_gates_and_biases(
    options: str,
    dtype: torch.dtype,
    device: torch.device,
    relative_error: RelativeError,
) -> None:
    width, experts, size = 100, 5, 24
    x_TD, up_FD, down_FD = weights(3, width, experts * size, dtype, device)
    ids_TK = torch.tensor([[1, 4], [0, -1], [-1, -1]], dtype=torch.int32, device=device)
    activation = options.split(", ")[-1]
    extra: dict[str, Any] = {"threshold": 0.7 if activation == "fatrelu" else 0.0}
    if "gate" in options:
        extra["gate_FD"] = torch.randn_like(up_FD.float()).to(dtype)
    if "biases" in options:
        extra["up_bias_F"] = torch.randn(experts * size, device=device).to(dtype) * 5
        extra["down_bias_D"] = torch.randn(width, device=device).to(dtype) * 5
    y_TD = ffn(
        x_TD,
        up_FD,
        down_FD,
        ids_TK,
        size,
        activation,
        Arrivals(device),
        **extra,
    )
    wide = {n: v.double() if isinstance(v, Tensor) else v for n, v in extra.items()}
    expected = ffn_reference(
        x_TD.double(),
        up_FD.double(),
        down_FD.double(),
        ids_TK,
        size,
        activation,
        **wide,
    )
    assert relative_error(y_TD, expected) < TOLERANCE[dtype]
    bias = extra.get("down_bias_D", torch.zeros(width, device=device))
    torch.testing.assert_close(y_TD[2], bias.to(dtype))


def test_the_reference_with_every_expert_is_the_gated_dense_ffn(device: torch.device) -> None:
    x_TD, up_FD, down_FD = weights(2, 20, 4 * 6, torch.float64, device)
    gate_FD, up_bias_F = torch.randn_like(up_FD), torch.randn_like(up_FD[:, 0])
    ids_TK = torch.arange(4, dtype=torch.int32, device=device).expand(2, 4)
    found = ffn_reference(
        x_TD, up_FD, down_FD, ids_TK, 6, "relu2", gate_FD=gate_FD, up_bias_F=up_bias_F
    )
    h_TF = (x_TD @ gate_FD.T).relu().square() * (x_TD @ up_FD.T + up_bias_F)
    torch.testing.assert_close(found, h_TF @ down_FD)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("ids", [[[2, 0, 3]], [[1, -1, -1], [0, 3, -1], [3, 1, 2]]])
def test_norm_and_residual_sum_come_along(
    ids: list[list[int]],
    dtype: torch.dtype,
    device: torch.device,
    relative_error: RelativeError,
) -> None:
    width, size = 130, 70
    x_TD, up_FD, down_FD = weights(len(ids), width, 4 * size, dtype, device)
    ids_TK = torch.tensor(ids, dtype=torch.int32, device=device)
    norm = Norm(torch.randn(width, device=device).to(dtype), 1e-5)
    wide = Norm(norm.weight_D.double(), norm.epsilon)
    h_TKS = first_product(x_TD, up_FD, ids_TK, size, "relu2", norm=norm)
    expected = first_product_reference(
        x_TD.double(), up_FD.double(), ids_TK, size, "relu2", norm=wide
    )
    used = ids_TK >= 0
    assert relative_error(h_TKS[used], expected[used]) < TOLERANCE[dtype]

    arrivals = Arrivals(device)
    y_TD = second_product(h_TKS, down_FD, ids_TK, arrivals, add_to=x_TD)
    expected = second_product_reference(
        h_TKS.double(), down_FD.double(), ids_TK, add_to=x_TD.double()
    )
    assert relative_error(y_TD, expected) < TOLERANCE[dtype]
    assert not arrivals.of("down", 1).any(), "counters are left at zero"


def test_silent_neurons_are_not_read(device: torch.device) -> None:
    """Their rows may hold anything: here NaN, which any product would spread."""
    h_TKS = torch.tensor([[[0.0, 2.0, 0.0]]], device=device)
    down_FD = torch.full((6, 40), torch.nan, device=device)
    down_FD[4] = 3.0
    ids_TK = torch.tensor([[1]], dtype=torch.int32, device=device)
    y_TD = second_product(h_TKS, down_FD, ids_TK, Arrivals(device))
    assert torch.equal(y_TD, torch.full((1, 40), 6.0, device=device))
