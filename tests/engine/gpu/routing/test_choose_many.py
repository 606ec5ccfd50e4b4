"""The choice and the sort of its pairs: the rule, its corners, and what it must never do.

Scores are products of small integers wherever x and a router make them: exact in any order of
summation, so that both sides see the same scores, ties included.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.gpu.routing import pairs
from engine.gpu.routing.choose_many import (
    choose_many,
    choose_many_reference,
    choose_pieces,
    score_pieces,
)
from engine.gpu.routing.pairs import SortedPairs, sort_pairs, sort_pairs_reference
from engine.gpu.routing.rule import Choice, choose_scores_reference

pytestmark = pytest.mark.usefixtures("poisoned")


def integers(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(-2, 3, shape, device=device).to(dtype)


def mixed_limits(num_tokens: int, max_k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every kind of policy in one batch: k from 1 past max_k, mass below and above one."""
    k_T = torch.randint(1, max_k + 2, (num_tokens,), dtype=torch.int32, device=device)
    return k_T, torch.rand(num_tokens, device=device) * 1.5


def choose_scores(scores_TE: Tensor, k_T: Tensor, mass_T: Tensor, max_k: int) -> Choice:
    """Scores that are known already are one piece."""
    return choose_pieces(scores_TE[:, None], k_T, mass_T, max_k)


def sorted_choice(scores_TE: Tensor, k_T: Tensor, mass_T: Tensor, max_k: int) -> SortedPairs:
    return sort_pairs(choose_scores(scores_TE, k_T, mass_T, max_k))


def sorted_reference(scores_TE: Tensor, k_T: Tensor, mass_T: Tensor, max_k: int) -> SortedPairs:
    return sort_pairs_reference(choose_scores_reference(scores_TE, k_T, mass_T, max_k))


def assert_same(actual: SortedPairs, expected: SortedPairs) -> None:
    for name, a, b in zip(SortedPairs._fields, actual, expected, strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("tokens", "width", "experts", "max_k"),
    [
        (1, 100, 1, 1),
        (1, 100, 5, 3),
        (7, 300, 12, 12),
        (16, 48, 32, 6),
        (3, 40, 100, 9),
        (34, 520, 33, 4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_route_equals_the_reference(
    tokens: int, width: int, experts: int, max_k: int, dtype: torch.dtype, device: torch.device
) -> None:
    x_TD = integers(tokens, width, device=device, dtype=dtype)
    router_ED = integers(experts, width, device=device) / 8
    k_T, mass_T = mixed_limits(tokens, max_k, device)
    expected = choose_many_reference(x_TD, router_ED, k_T, mass_T, max_k)
    found = sort_pairs(choose_many(x_TD, router_ED, k_T, mass_T, max_k))
    assert_same(found, sort_pairs_reference(expected))


@pytest.mark.parametrize(("tokens", "experts", "max_k"), [(5, 3, 2), (9, 32, 32), (2, 512, 20)])
def test_route_scores_equals_the_reference(
    tokens: int, experts: int, max_k: int, device: torch.device
) -> None:
    scores_TE = torch.randn(tokens, experts, device=device)
    k_T, mass_T = mixed_limits(tokens, max_k, device)
    expected = sorted_reference(scores_TE, k_T, mass_T, max_k)
    assert_same(sorted_choice(scores_TE, k_T, mass_T, max_k), expected)


def test_pair_sort_takes_many_steps(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "SORT_TOKENS", 4)
    scores_TE = torch.randn(13, 3, device=device)
    k_T, mass_T = mixed_limits(13, 3, device)
    expected = sorted_reference(scores_TE, k_T, mass_T, 3)
    assert_same(sorted_choice(scores_TE, k_T, mass_T, 3), expected)


def test_equal_scores_go_to_the_lower_index(device: torch.device) -> None:
    limits = (
        torch.full((2,), 3, dtype=torch.int32, device=device),
        torch.full((2,), 2.0, device=device),
    )
    choice = choose_scores(torch.zeros(2, 40, device=device), *limits, 5)
    assert choice.ids_TK.tolist() == [[0, 1, 2, -1, -1]] * 2


@pytest.mark.parametrize("experts", [7, 100])
def test_policies_mean_what_they_say(experts: int, device: torch.device) -> None:
    """Dense takes all, top-k takes k, mass p stops as soon as the predicted share reaches p."""
    scores_TE = torch.randn(3, experts, device=device)
    k_T = torch.tensor([experts, 2, experts], dtype=torch.int32, device=device)
    mass_T = torch.tensor([2.0, 2.0, 0.6], device=device)
    chosen_TE, ids_TK = choose_scores(scores_TE, k_T, mass_T, experts)
    assert ids_TK[0].tolist() == list(range(experts))
    assert set(ids_TK[1, :2].tolist()) == set(scores_TE[1].topk(2).indices.tolist())
    assert (ids_TK[1, 2:] == -1).all()
    shares = scores_TE[2].softmax(0)[chosen_TE[2]]
    assert shares.sum() >= 0.6
    assert shares.sum() - shares.min() < 0.6


def test_one_expert_is_chosen_whatever_the_mass(device: torch.device) -> None:
    scores_TE = torch.randn(2, 6, device=device)
    k_T = torch.tensor([1, 3], dtype=torch.int32, device=device)
    chosen_TE = choose_scores(scores_TE, k_T, torch.zeros(2, device=device), 3).chosen_TE
    assert chosen_TE.sum(1).tolist() == [1, 1]
    assert torch.equal(chosen_TE.int().argmax(1), scores_TE.argmax(1))


def test_a_padding_row_chooses_nothing(device: torch.device) -> None:
    scores_TE = torch.randn(3, 6, device=device)
    k_T = torch.tensor([2, 0, 1], dtype=torch.int32, device=device)
    mass_T = torch.full((3,), 2.0, device=device)
    routed = sorted_choice(scores_TE, k_T, mass_T, 3)
    assert routed.chosen_TE.sum(1).tolist() == [2, 0, 1]
    assert routed.ids_TK[1].tolist() == [-1, -1, -1]
    assert 1 not in routed.pair_token_P.tolist()
    expected = sorted_reference(scores_TE, k_T, mass_T, 3)
    assert all(map(torch.equal, routed, expected))


# The interpreter's NumPy warns of inf - inf, which is meant here.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("experts", [6, 70])
def test_damaged_scores_stay_inside_the_outputs(experts: int, device: torch.device) -> None:
    scores_TE = torch.randn(4, experts, device=device)
    scores_TE[0] = torch.nan
    scores_TE[1, 2] = torch.nan
    scores_TE[2, 3] = torch.inf
    scores_TE[3] = -torch.inf
    k_T = torch.full((4,), 3, dtype=torch.int32, device=device)
    mass_T = torch.full((4,), 2.0, device=device)
    expected = sorted_reference(scores_TE, k_T, mass_T, 3)
    assert_same(sorted_choice(scores_TE, k_T, mass_T, 3), expected)
    assert expected.ids_TK.tolist()[0] == [0, -1, -1]
    assert not expected.chosen_TE[1, 2]


def test_a_token_is_routed_alike_in_any_company(device: torch.device) -> None:
    """Scores included, bit for bit: near ties must not fall differently in another batch."""
    x_TD = torch.randn(21, 300, device=device)
    router_ED = torch.randn(24, 300, device=device)
    k_T, mass_T = mixed_limits(21, 8, device)
    together = choose_many(x_TD, router_ED, k_T, mass_T, 8)
    scores_TNE = score_pieces(x_TD, router_ED)
    for t in (0, 3, 16, 20):
        one = slice(t, t + 1)
        alone = choose_many(x_TD[one], router_ED, k_T[one], mass_T[one], 8)
        assert torch.equal(alone.ids_TK, together.ids_TK[one])
        assert torch.equal(score_pieces(x_TD[one], router_ED), scores_TNE[one])


def test_close_scores_lose_no_expert(device: torch.device) -> None:
    """Every rank is taken once, though many scores differ in their last bits alone."""
    tokens, experts, width, k = 64, 64, 1024, 8
    x_TD = torch.randn(tokens, width, device=device)
    router_ED = torch.randn(1, width, device=device) + 1e-6 * torch.randn(
        experts, width, device=device
    )
    k_T = torch.full((tokens,), k, dtype=torch.int32, device=device)
    mass_T = torch.full((tokens,), 2.0, device=device)
    choice = choose_many(x_TD, router_ED, k_T, mass_T, k)
    assert (choice.chosen_TE.sum(1) == k).all()
    assert (choice.ids_TK >= 0).all()
