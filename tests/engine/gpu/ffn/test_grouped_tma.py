"""The products by TMA against the reference in float64, one program a tile and walking."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.gpu.ffn import grouped_tma
from engine.gpu.ffn.grouped_ffn import combine, grouped_ffn, grouped_ffn_reference
from engine.gpu.routing.routing import Routing, route_scores_reference

pytestmark = pytest.mark.usefixtures("poisoned")

RelativeError = Callable[[Tensor, Tensor], float]

TOLERANCE = {torch.bfloat16: 1.2e-2, torch.float16: 1.2e-3}


@pytest.fixture(autouse=True)
def _has_tma(device: torch.device) -> None:
    if not grouped_tma.supports(torch.empty(1, 16, device=device).bfloat16(), 16, 1):
        pytest.skip("this device has no TMA")


def random_routing(
    tokens: int, experts: int, max_k: int, device: torch.device, scores_TE: Tensor | None = None
) -> Routing:
    """None to max_k experts a token."""
    if scores_TE is None:
        scores_TE = torch.randn(tokens, experts, device=device)
    k_T = torch.randint(0, max_k + 1, (tokens,), dtype=torch.int32, device=device)
    k_T[0] = max_k
    return route_scores_reference(scores_TE, k_T, torch.full_like(scores_TE[:, 0], 2.0), max_k)


def weights(
    tokens: int, width: int, neurons: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    x_TD, up_FD, down_FD = (
        torch.randn(rows, width, device=device).to(dtype) for rows in (tokens, neurons, neurons)
    )
    return x_TD, up_FD, down_FD


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("per_sm", [0, 1])
@pytest.mark.parametrize(
    ("tokens", "width", "experts", "size", "max_k", "activation"),
    [
        (1, 104, 5, 32, 3, "relu"),
        (40, 72, 6, 48, 2, "relu2"),
        (70, 136, 4, 16, 3, "relu"),
        (33, 64, 1, 272, 1, "relu"),
    ],
)
def test_equals_the_reference(
    tokens: int,
    width: int,
    experts: int,
    size: int,
    max_k: int,
    activation: str,
    per_sm: int,
    dtype: torch.dtype,
    device: torch.device,
    relative_error: RelativeError,
) -> None:
    x_TD, up_FD, down_FD = weights(tokens, width, experts * size, dtype, device)
    routing = random_routing(tokens, experts, max_k, device)
    up = grouped_tma.tile(16, 32, 64, 4, 3, per_sm=per_sm)
    down = grouped_tma.tile(16, 16, 64, 4, 3, per_sm=per_sm)
    h_PS, slot_P = grouped_tma.up_product(x_TD, up_FD, routing, activation, up)
    slots_TKD = grouped_tma.down_product(h_PS, slot_P, down_FD, routing, down)
    y_TD = combine(slots_TKD, routing.ids_TK)
    wide = x_TD.double(), up_FD.double(), down_FD.double()
    expected = grouped_ffn_reference(*wide, routing, activation)
    assert relative_error(y_TD, expected) < TOLERANCE[dtype]
    assert bool((y_TD[(routing.ids_TK < 0).all(1)] == 0).all())


def test_grouped_ffn_takes_them_from_enough_pairs_on(
    device: torch.device, relative_error: RelativeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the tiles in use, with experts that are empty and not read."""
    x_TD, up_FD, down_FD = weights(40, 64, 8 * 32, torch.bfloat16, device)
    scores_TE = torch.randn(40, 8, device=device)
    scores_TE[:, [0, 3, 7]] = -1e4
    routing = random_routing(40, 8, 3, device, scores_TE)
    wide = x_TD.double(), up_FD.double(), down_FD.double()
    expected = grouped_ffn_reference(*wide, routing, "relu")
    for expert in (0, 3, 7):
        up_FD[expert * 32 : (expert + 1) * 32] = torch.nan
        down_FD[expert * 32 : (expert + 1) * 32] = torch.nan
    taken: list[int] = []
    launch = grouped_tma._launch
    monkeypatch.setattr(grouped_tma, "_launch", lambda *a: (taken.append(1), launch(*a)))
    for least, launches in ((10**6, 0), (16, 0), (15, 2)):
        monkeypatch.setattr(grouped_tma, "LEAST_PAIRS", least)
        y_TD = grouped_ffn(x_TD, up_FD, down_FD, routing, "relu")
        assert relative_error(y_TD, expected) < 1.2e-2
        assert len(taken) == launches
    monkeypatch.setattr(grouped_tma, "LEAST_PAIRS", 1)
    again = grouped_ffn(x_TD, up_FD, down_FD, routing, "relu")
    assert torch.equal(again, y_TD), "a run must repeat bit for bit"


def test_what_is_not_supported(device: torch.device) -> None:
    x_TD = torch.empty(2, 64, device=device)
    assert not grouped_tma.supports(x_TD, 32, 4)
    assert grouped_tma.supports(x_TD.half(), 32, 4)
    assert not grouped_tma.supports(x_TD.half(), 24, 4)
    assert not grouped_tma.supports(x_TD[:, :60].half(), 32, 4)
    assert not grouped_tma.supports(x_TD.half(), 32, grouped_tma.MAX_K + 1)
