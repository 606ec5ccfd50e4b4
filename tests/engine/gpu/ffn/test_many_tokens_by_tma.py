"""The products whose weights come by TMA, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.gpu.ffn import many_tokens
from engine.gpu.ffn.many_tokens import ffn, ffn_reference
from engine.gpu.ffn.product_blocks import product_blocks
from engine.gpu.ffn.products import Pairs, combine, gather, spread_to_slots, supports_tma
from engine.gpu.routing.pairs import SortedPairs, sort_pairs_reference
from engine.gpu.routing.rule import choose_scores_reference

pytestmark = pytest.mark.usefixtures("poisoned")

RelativeError = Callable[[Tensor, Tensor], float]

TOLERANCE = {torch.bfloat16: 1.2e-2, torch.float16: 1.2e-3}


@pytest.fixture(autouse=True)
def _has_tma(device: torch.device) -> None:
    if not supports_tma(torch.empty(1, 16, device=device).bfloat16(), 16):
        pytest.skip("this device has no TMA")


def random_pairs(
    tokens: int, experts: int, max_k: int, device: torch.device, scores_TE: Tensor | None = None
) -> SortedPairs:
    """None to max_k experts a token."""
    if scores_TE is None:
        scores_TE = torch.randn(tokens, experts, device=device)
    k_T = torch.randint(0, max_k + 1, (tokens,), dtype=torch.int32, device=device)
    k_T[0] = max_k
    mass_T = torch.full_like(scores_TE[:, 0], 2.0)
    return sort_pairs_reference(choose_scores_reference(scores_TE, k_T, mass_T, max_k))


def weights(
    tokens: int, width: int, neurons: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    x_TD, up_FD, down_FD = (
        torch.randn(rows, width, device=device).to(dtype) for rows in (tokens, neurons, neurons)
    )
    return x_TD, up_FD, down_FD


@pytest.mark.parametrize("dtype", TOLERANCE)
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
    dtype: torch.dtype,
    device: torch.device,
    relative_error: RelativeError,
) -> None:
    x_TD, up_FD, down_FD = weights(tokens, width, experts * size, dtype, device)
    pairs = random_pairs(tokens, experts, max_k, device)
    order = Pairs.of(pairs)
    first, second = product_blocks(16, 32, 64, 4, 3), product_blocks(16, 16, 64, 4, 3)
    h_PS = gather(x_TD, up_FD, order, activation, tma=True, blocks=first)
    second["WHOLE"] = False
    slots_TKD = spread_to_slots(h_PS, down_FD, order, tma=True, blocks=second)
    y_TD = combine(slots_TKD, pairs.ids_TK)
    wide = x_TD.double(), up_FD.double(), down_FD.double()
    expected = ffn_reference(*wide, pairs, activation)
    assert relative_error(y_TD, expected) < TOLERANCE[dtype]
    assert bool((y_TD[(pairs.ids_TK < 0).all(1)] == 0).all())


def test_the_ffn_takes_them_from_enough_pairs_on(
    device: torch.device, relative_error: RelativeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the tiles in use, with experts that are empty and not read."""
    x_TD, up_FD, down_FD = weights(40, 64, 8 * 32, torch.bfloat16, device)
    scores_TE = torch.randn(40, 8, device=device)
    scores_TE[:, [0, 3, 7]] = -1e4
    pairs = random_pairs(40, 8, 3, device, scores_TE)
    wide = x_TD.double(), up_FD.double(), down_FD.double()
    expected = ffn_reference(*wide, pairs, "relu")
    for expert in (0, 3, 7):
        up_FD[expert * 32 : (expert + 1) * 32] = torch.nan
        down_FD[expert * 32 : (expert + 1) * 32] = torch.nan
    taken: list[bool] = []

    def note(*arguments: Any, tma: bool, **options: Any) -> Tensor:
        taken.append(tma)
        return gather(*arguments, tma=tma, **options)

    monkeypatch.setattr(many_tokens, "gather", note)
    for least, by_tma in ((10**6, False), (16, False), (15, True)):
        monkeypatch.setattr(many_tokens, "LEAST_PAIRS_FOR_TMA", least)
        y_TD = ffn(x_TD, up_FD, down_FD, pairs, "relu")
        assert relative_error(y_TD, expected) < 1.2e-2
        assert taken.pop() == by_tma
    again = ffn(x_TD, up_FD, down_FD, pairs, "relu", tma=True)
    assert torch.equal(again, y_TD), "a run must repeat bit for bit"


def test_gates_are_multiplied_without(device: torch.device, relative_error: RelativeError) -> None:
    x_TD, up_FD, down_FD = weights(200, 64, 32, torch.bfloat16, device)
    gate_FD = torch.randn_like(up_FD.float()).bfloat16()
    pairs = random_pairs(200, 1, 1, device)
    y_TD = ffn(x_TD, up_FD, down_FD, pairs, "relu", gate_FD=gate_FD)
    wide = x_TD.double(), up_FD.double(), down_FD.double()
    expected = ffn_reference(*wide, pairs, "relu", gate_FD=gate_FD.double())
    assert relative_error(y_TD, expected) < 1.2e-2


def test_what_is_not_supported(device: torch.device) -> None:
    x_TD = torch.empty(2, 64, device=device)
    assert not supports_tma(x_TD, 32)
    assert supports_tma(x_TD.half(), 32)
    assert not supports_tma(x_TD.half(), 24)
    assert not supports_tma(x_TD[:, :60].half(), 32)
