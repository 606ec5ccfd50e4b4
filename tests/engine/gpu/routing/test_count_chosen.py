"""Counting a step's experts against sums of the choice."""

from __future__ import annotations

import pytest
import torch

from engine.gpu.routing.count_chosen import count_chosen, count_chosen_reference

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 7, 12), (2, 400, 32), (30, 2, 512)])
def test_counts_equal_the_reference(shape: tuple[int, int, int], device: torch.device) -> None:
    chosen_LTE = torch.rand(*shape, device=device) < 0.2
    assert torch.equal(count_chosen(chosen_LTE), count_chosen_reference(chosen_LTE))


def test_nothing_chosen_is_counted_as_nothing(device: torch.device) -> None:
    assert not count_chosen(torch.zeros(2, 3, 4, dtype=torch.bool, device=device)).any()
