"""The choice in one launch against the sorting reference."""

from __future__ import annotations

import pytest
import torch

from engine.gpu.add_norm import Norm
from engine.gpu.arrivals import Arrivals
from engine.gpu.routing.choose_few import choose_few, choose_few_reference

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize(
    ("tokens", "experts", "width", "max_k"),
    [(1, 5, 20, 2), (3, 12, 300, 12), (13, 32, 100, 6), (9, 130, 36, 7), (1, 512, 16, 3)],
)
@pytest.mark.parametrize("normed", [False, True])
def test_choice_equals_the_reference(
    tokens: int, experts: int, width: int, max_k: int, normed: bool, device: torch.device
) -> None:
    x = torch.randn(tokens, width, device=device)
    router = torch.randn(experts, width, device=device) / width**0.5
    k = torch.randint(0, max_k + 3, (tokens,), dtype=torch.int32, device=device)
    mass = torch.rand(tokens, device=device) * 1.5
    norm = Norm(torch.rand(width, device=device) + 0.5, 1e-5) if normed else None
    arrivals = Arrivals(device)
    actual = choose_few(x, router, k, mass, max_k, arrivals, norm)
    expected = choose_few_reference(x, router, k, mass, max_k, norm)
    assert torch.equal(actual.chosen_TE, expected.chosen_TE)
    assert torch.equal(actual.ids_TK, expected.ids_TK)
    assert not arrivals.of("route", 1).any(), "counters are left at zero"


def test_ties_fall_to_the_lower_index_and_nan_is_last(device: torch.device) -> None:
    router = torch.tensor([[1.0, 0.0], [2.0, 0.0], [2.0, 0.0], [torch.nan, 0.0]], device=device)
    x = torch.tensor([[1.0, 1.0]], device=device)
    k, mass = (
        torch.tensor([3], dtype=torch.int32, device=device),
        torch.tensor([2.0], device=device),
    )
    into = torch.empty(1, 4, dtype=torch.bool, device=device)
    found = choose_few(x, router, k, mass, 3, Arrivals(device), chosen_TE=into)
    assert found.chosen_TE is into
    assert found.ids_TK.tolist() == [[0, 1, 2]]
    one = choose_few(x, router, k.clamp(max=1), mass, 3, Arrivals(device))
    assert one.ids_TK.tolist() == [[1, -1, -1]]


def test_company_changes_no_choice(device: torch.device) -> None:
    """Nor does the size of a group: scores so close that any other sum would reorder them."""
    x = torch.randn(12, 600, device=device).bfloat16()
    router = torch.randn(1, 600, device=device) + 1e-6 * torch.randn(32, 600, device=device)
    k = torch.full((12,), 5, dtype=torch.int32, device=device)
    mass = torch.full((12,), 2.0, device=device)
    norm = Norm(torch.ones(600, device=device), 1e-5)
    together = choose_few(x, router, k, mass, 5, Arrivals(device), norm)
    for t in range(12):
        row = slice(t, t + 1)
        alone = choose_few(x[row], router, k[row], mass[row], 5, Arrivals(device), norm)
        assert torch.equal(alone.ids_TK, together.ids_TK[row])
    assert (together.ids_TK >= 0).all(), "close scores lose no expert"
