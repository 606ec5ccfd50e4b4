"""The choice with one k for all tokens: equal to the general rule's reference, in every field."""

from __future__ import annotations

import pytest
import torch

from engine.gpu.routing import pairs
from engine.gpu.routing.choose_top_k import choose_top_k, choose_top_k_reference
from engine.gpu.routing.pairs import SortedPairs

pytestmark = pytest.mark.usefixtures("poisoned")


def assert_same(actual: SortedPairs, expected: SortedPairs) -> None:
    for name, a, b in zip(SortedPairs._fields, actual, expected, strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "experts", "k"),
    [(1, 1, 1), (1, 5, 3), (7, 12, 12), (300, 6, 2), (70, 100, 9), (34, 512, 16)],
)
def test_equals_the_reference(
    tokens: int, experts: int, k: int, dtype: torch.dtype, device: torch.device
) -> None:
    scores_TE = torch.randn(tokens, experts, device=device).to(dtype)
    assert_same(choose_top_k(scores_TE, k), choose_top_k_reference(scores_TE, k))


def test_many_chunks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More chunks than one step of the sum over chunks takes."""
    monkeypatch.setattr(pairs, "CHUNK_FLAGS", 32)
    scores_TE = torch.randn(50, 7, device=device)
    assert_same(choose_top_k(scores_TE, 3), choose_top_k_reference(scores_TE, 3))


def test_equal_scores_go_to_the_lower_index(device: torch.device) -> None:
    assert choose_top_k(torch.zeros(2, 40, device=device), 3).ids_TK.tolist() == [[0, 1, 2]] * 2


def test_damaged_scores_stay_inside_the_outputs(device: torch.device) -> None:
    """Every token takes k experts whatever it holds, and NaN ranks below all."""
    scores_TE = torch.randn(4, 6, device=device)
    scores_TE[0] = torch.nan
    scores_TE[1, 2] = torch.nan
    scores_TE[2, 3] = torch.inf
    scores_TE[3] = -torch.inf
    routed = choose_top_k(scores_TE, 5)
    assert routed.ids_TK[[0, 3]].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert routed.ids_TK[1].tolist() == [0, 1, 3, 4, 5]
    assert routed.chosen_TE[2, 3]
    assert routed.counts_E.sum() == routed.pair_token_P.numel() == 20
    assert routed.pair_token_P.bincount().tolist() == [5] * 4
