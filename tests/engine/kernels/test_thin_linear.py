"""Products of a few tokens against their references, at widths that fit no block."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.kernels import thin_linear as thin
from engine.kernels.arrivals import Arrivals
from engine.kernels.thin_linear import Norm

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
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("form", ["plain", "normed relu2", "added", "all"])
def test_linear_equals_its_reference(
    tokens: int,
    inputs: int,
    outputs: int,
    form: str,
    dtype: torch.dtype,
    device: torch.device,
    relative_error: RelativeError,
) -> None:
    x, weight = (made(n, inputs, dtype=dtype, device=device) for n in (tokens, outputs))
    norm = (
        None if form in ("plain", "added") else Norm(made(inputs, dtype=dtype, device=device), 0.1)
    )
    activation = "relu2" if form == "normed relu2" else "relu" if form == "all" else None
    add_to = made(tokens, outputs, dtype=dtype, device=device) if form in ("added", "all") else None
    actual = thin.thin_linear(x, weight, norm=norm, activation=activation, add_to=add_to)
    expected = thin.thin_linear_reference(
        x.double(), weight.double(), norm=wide(norm), activation=activation, add_to=add_to
    )
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < TOLERANCE[dtype]
    assert thin.thin_linear(x, weight, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("width", "size"), [(100, 24), (36, 5), (130, 70)])
@pytest.mark.parametrize("ids", [[[2, 0, 3]], [[1, -1, -1], [0, 3, -1], [3, 1, 2]]])
def test_experts_equal_their_references(
    ids: list[list[int]],
    width: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    relative_error: RelativeError,
) -> None:
    ids_TK = torch.tensor(ids, dtype=torch.int32, device=device)
    x = made(len(ids), width, dtype=dtype, device=device)
    up, down = (made(4 * size, width, dtype=dtype, device=device) for _ in range(2))
    norm = Norm(made(width, dtype=dtype, device=device), 1e-5)
    h = thin.expert_up(x, up, ids_TK, size, "relu2", norm)
    expected = thin.expert_up_reference(x.double(), up.double(), ids_TK, size, "relu2", wide(norm))
    used = ids_TK >= 0
    assert relative_error(h[used], expected[used]) < TOLERANCE[dtype]

    arrivals = Arrivals(device)
    y = thin.expert_down(h, down, ids_TK, x, arrivals)
    expected = thin.expert_down_reference(h.double(), down.double(), ids_TK, x.double())
    assert relative_error(y, expected) < TOLERANCE[dtype]
    assert not arrivals.of("down", 1).any(), "counters are left at zero"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("neurons", "width"), [(300, 140), (5, 33)])
@pytest.mark.parametrize("tokens", [1, 4])
def test_down_equals_the_plain_product(
    tokens: int,
    neurons: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    relative_error: RelativeError,
) -> None:
    h = made(tokens, neurons, dtype=dtype, device=device)
    down = made(neurons, width, dtype=dtype, device=device)
    add_to = made(tokens, width, dtype=dtype, device=device)
    y = thin.thin_down(h, down, add_to, Arrivals(device))
    expected = h.double() @ down.double() + add_to.double()
    assert relative_error(y, expected) < TOLERANCE[dtype]


def test_company_and_empty_slots_change_no_bit(device: torch.device) -> None:
    width, size = 96, 20
    x = made(4, width, dtype=torch.bfloat16, device=device)
    up, down = (made(8 * size, width, dtype=torch.bfloat16, device=device) for _ in range(2))
    norm = Norm(torch.ones(width, device=device), 1e-5)
    wide_ids = torch.full((4, 6), -1, dtype=torch.int32, device=device)
    wide_ids[:, :2] = torch.tensor([[1, 4], [0, 1], [1, 7], [3, 4]])
    arrivals = Arrivals(device)
    together = thin.expert_down(
        thin.expert_up(x, up, wide_ids, size, "relu", norm), down, wide_ids, x, arrivals
    )
    dense = thin.thin_down(thin.thin_linear(x, up, norm=norm, activation="relu"), down, x, arrivals)
    for t in range(4):
        ids, row = wide_ids[t : t + 1, :2].contiguous(), x[t : t + 1]
        h = thin.expert_up(row, up, ids, size, "relu", norm)
        assert torch.equal(thin.expert_down(h, down, ids, row, arrivals), together[t : t + 1])
        h = thin.thin_linear(row, up, norm=norm, activation="relu")
        assert torch.equal(thin.thin_down(h, down, row, arrivals), dense[t : t + 1])


def test_silent_neurons_are_not_read(device: torch.device) -> None:
    """Their rows may hold anything: here NaN, which any product would spread."""
    h = torch.tensor([[[0.0, 2.0, 0.0]]], device=device)
    down = torch.full((6, 40), torch.nan, device=device)
    down[4] = 3.0
    ids = torch.tensor([[1]], dtype=torch.int32, device=device)
    y = thin.expert_down(h, down, ids, torch.zeros(1, 40, device=device), Arrivals(device))
    assert torch.equal(y, torch.full((1, 40), 6.0, device=device))


def test_nan_inputs_stay_nan(device: torch.device) -> None:
    x = torch.full((1, 8), torch.nan, device=device)
    weight = torch.randn(4, 8, device=device)
    assert thin.thin_linear(x, weight, activation="relu").isnan().all()
    ids = torch.tensor([[0]], dtype=torch.int32, device=device)
    assert thin.expert_up(x, weight, ids, 2, "relu2").isnan().all()
