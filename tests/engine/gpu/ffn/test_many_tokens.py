"""The many-token FFN against the reference in float64, through every choice of tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.gpu.ffn import few_tokens
from engine.gpu.ffn.many_tokens import ffn, ffn_reference
from engine.gpu.routing.pairs import SortedPairs, sort_pairs_reference
from engine.gpu.routing.rule import choose_scores_reference
from engine.model.activations import activate_reference

pytestmark = pytest.mark.usefixtures("poisoned")

RelativeError = Callable[[Tensor, Tensor], float]

# Activations and each pair's result are rounded to the dtype on the way.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.2e-3}


def weights(
    tokens: int, width: int, neurons: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    x_TD, up_FD, down_FD = (
        torch.randn(rows, width, device=device).to(dtype) for rows in (tokens, neurons, neurons)
    )
    return x_TD, up_FD, down_FD


def random_pairs(
    tokens: int, experts: int, max_k: int, device: torch.device, scores_TE: Tensor | None = None
) -> SortedPairs:
    """1 to max_k experts a token."""
    if scores_TE is None:
        scores_TE = torch.randn(tokens, experts, device=device)
    k_T = torch.randint(1, max_k + 1, (tokens,), dtype=torch.int32, device=device)
    return sort_pairs_reference(
        choose_scores_reference(scores_TE, k_T, torch.full_like(scores_TE[:, 0], 2.0), max_k)
    )


def in_float64(
    x_TD: Tensor, up_FD: Tensor, down_FD: Tensor, pairs: SortedPairs, activation: str
) -> Tensor:
    x_TD, up_FD, down_FD = x_TD.double(), up_FD.double(), down_FD.double()
    return ffn_reference(x_TD, up_FD, down_FD, pairs, activation)


def test_both_references_agree(device: torch.device, relative_error: RelativeError) -> None:
    x_TD, up_FD, down_FD = weights(9, 40, 6 * 16, torch.float64, device)
    pairs = random_pairs(9, 6, 4, device)
    grouped = ffn_reference(x_TD, up_FD, down_FD, pairs, "relu2")
    by_token = few_tokens.ffn_reference(x_TD, up_FD, down_FD, pairs.ids_TK, 16, "relu2")
    assert relative_error(grouped, by_token) < 1e-14


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("tokens", "width", "experts", "size", "max_k", "activation"),
    [
        (1, 100, 5, 24, 3, "relu"),
        (40, 100, 6, 24, 2, "relu2"),
        (60, 64, 8, 48, 4, "relu"),
        (90, 136, 4, 20, 3, "relu"),
        (140, 32, 1, 264, 1, "relu2"),
        (5, 64, 20, 16, 12, "relu"),
    ],
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
    pairs = random_pairs(tokens, experts, max_k, device)
    y_TD = ffn(x_TD, up_FD, down_FD, pairs, activation)
    expected = in_float64(x_TD, up_FD, down_FD, pairs, activation)
    assert y_TD.dtype == dtype
    assert relative_error(y_TD, expected) < TOLERANCE[dtype]


def test_experts_may_be_empty_and_are_not_read(
    device: torch.device, relative_error: RelativeError
) -> None:
    x_TD, up_FD, down_FD = weights(33, 64, 8 * 16, torch.float32, device)
    scores_TE = torch.randn(33, 8, device=device)
    scores_TE[:, [0, 3, 4, 7]] = -1e4
    pairs = random_pairs(33, 8, 3, device, scores_TE)
    assert pairs.counts_E[[0, 3, 4, 7]].sum() == 0
    expected = in_float64(x_TD, up_FD, down_FD, pairs, "relu")
    for expert in (0, 3, 4, 7):
        up_FD[expert * 16 : (expert + 1) * 16] = torch.nan
        down_FD[expert * 16 : (expert + 1) * 16] = torch.nan
    y_TD = ffn(x_TD, up_FD, down_FD, pairs, "relu")
    assert relative_error(y_TD, expected) < 2e-6


def test_all_experts_are_the_dense_ffn(device: torch.device, relative_error: RelativeError) -> None:
    x_TD, up_FD, down_FD = weights(17, 100, 6 * 20, torch.float32, device)
    scores_TE = torch.randn(17, 6, device=device)
    k_T = torch.full((17,), 6, dtype=torch.int32, device=device)
    pairs = sort_pairs_reference(
        choose_scores_reference(scores_TE, k_T, torch.full_like(scores_TE[:, 0], 2.0), 6)
    )
    y_TD = ffn(x_TD, up_FD, down_FD, pairs, "relu")
    dense_TD = activate_reference(x_TD.double() @ up_FD.double().T, "relu") @ down_FD.double()
    assert relative_error(y_TD, dense_TD) < 2e-6


def test_runs_repeat_bit_for_bit(device: torch.device) -> None:
    x_TD, up_FD, down_FD = weights(50, 64, 6 * 16, torch.bfloat16, device)
    pairs = random_pairs(50, 6, 3, device)
    first = ffn(x_TD, up_FD, down_FD, pairs, "relu")
    assert torch.equal(first, ffn(x_TD, up_FD, down_FD, pairs, "relu"))


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
    options: str, dtype: torch.dtype, device: torch.device, relative_error: RelativeError
) -> None:
    width, experts, size = 72, 5, 24
    x_TD, up_FD, down_FD = weights(33, width, experts * size, dtype, device)
    pairs = random_pairs(33, experts, 3, device)
    activation = options.split(", ")[-1]
    extra: dict[str, Any] = {"threshold": 0.7 if activation == "fatrelu" else 0.0}
    if "gate" in options:
        extra["gate_FD"] = torch.randn_like(up_FD.float()).to(dtype)
    if "biases" in options:
        extra["up_bias_F"] = torch.randn(experts * size, device=device).to(dtype) * 5
        extra["down_bias_D"] = torch.randn(width, device=device).to(dtype) * 50
    y_TD = ffn(x_TD, up_FD, down_FD, pairs, activation, **extra)
    wide = {n: v.double() if isinstance(v, Tensor) else v for n, v in extra.items()}
    expected = ffn_reference(
        x_TD.double(),
        up_FD.double(),
        down_FD.double(),
        pairs,
        activation,
        **wide,
    )
    assert relative_error(y_TD, expected) < TOLERANCE[dtype]
    by_token = few_tokens.ffn_reference(
        x_TD.double(),
        up_FD.double(),
        down_FD.double(),
        pairs.ids_TK,
        size,
        activation,
        **wide,
    )
    assert relative_error(expected, by_token) < 1e-12
