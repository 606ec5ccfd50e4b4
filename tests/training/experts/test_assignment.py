"""Balanced assignment: exactly equal, the best there is, and untroubled by ties and bad prices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.errors import ConfigError
from training.experts.assignment import balanced_assignment, cluster_prices


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def total(similarity_FE: Tensor, labels_F: Tensor) -> float:
    return float(similarity_FE.double().gather(1, labels_F[:, None]).sum())


def assert_balanced(labels_F: Tensor, clusters: int) -> None:
    size = labels_F.numel() // clusters
    assert torch.bincount(labels_F, minlength=clusters).tolist() == [size] * clusters


def balanced_labellings(room: list[int]) -> list[list[int]]:
    if not any(room):
        return [[]]
    return [
        [label, *rest]
        for label in range(len(room))
        if room[label]
        for rest in balanced_labellings([r - (i == label) for i, r in enumerate(room)])
    ]


def best_chain_gain(similarity_FE: Tensor, labels_F: Tensor) -> float:
    """What the best cyclic exchange of rows between clusters would gain; 0 at the optimum.

    The reference: a labelling is the best balanced one if and only if no cycle of single moves
    gains (Floyd and Warshall's closure over the clusters, in float64).
    """
    clusters = similarity_FE.shape[1]
    own_F1 = similarity_FE.double().gather(1, labels_F[:, None])
    gain_FE = similarity_FE.double() - own_F1
    gain_EE = torch.stack([gain_FE[labels_F == e].amax(0) for e in range(clusters)])
    for e in range(clusters):
        gain_EE = torch.maximum(gain_EE, gain_EE[:, e, None] + gain_EE[None, e])
    return float(gain_EE.diagonal().max())


@settings(max_examples=40)
@given(st.integers(1, 8), st.integers(1, 9), st.integers(0, 1000), st.booleans())
def test_equal_counts_and_no_exchange_that_gains(
    clusters: int, size: int, seed: int, coarse: bool
) -> None:
    similarity = torch.randn(clusters * size, clusters, generator=generator(seed))
    if coarse:  # many ties
        similarity = similarity.round()
    labels = balanced_assignment(similarity)
    assert_balanced(labels, clusters)
    assert best_chain_gain(similarity, labels) < 1e-7


@pytest.mark.parametrize("seed", range(10))
def test_the_best_of_all_balanced_labellings_is_found(seed: int) -> None:
    """Against brute force over 8 rows in 4 pairs."""
    similarity = torch.rand(8, 4, generator=generator(seed))
    best = max(total(similarity, torch.tensor(x)) for x in balanced_labellings([2] * 4))
    assert total(similarity, balanced_assignment(similarity)) == pytest.approx(best, abs=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_prices_of_another_problem_cost_time_but_no_similarity(seed: int) -> None:
    similarity = torch.randn(96, 8, generator=generator(seed))
    wrong = torch.randn(8, generator=generator(seed + 100))
    good, bad = balanced_assignment(similarity), balanced_assignment(similarity, wrong)
    assert total(similarity, bad) == pytest.approx(total(similarity, good), abs=1e-6)


def test_prices_alone_leave_few_rows_to_move() -> None:
    similarity = torch.randn(4096, 32, generator=generator(1)) + torch.linspace(0, 3, 32)
    loads = torch.bincount((similarity - cluster_prices(similarity)).argmax(1), minlength=32)
    assert int((loads - 128).clamp_min(0).sum()) <= 41  # 1%; without prices it is over a half
    unpriced = torch.bincount(similarity.argmax(1), minlength=32)
    assert int((unpriced - 128).clamp_min(0).sum()) > 2048


def test_warm_prices_are_as_good_as_cold_ones() -> None:
    similarity = torch.randn(1024, 16, generator=generator(2))
    nearby = similarity + 0.05 * torch.randn(1024, 16, generator=generator(3))
    warm = cluster_prices(nearby, cluster_prices(similarity))
    loads = torch.bincount((nearby - warm).argmax(1), minlength=16)
    assert int((loads - 64).clamp_min(0).sum()) <= 10


def test_identical_rows_are_still_split_equally() -> None:
    assert_balanced(balanced_assignment(torch.ones(4096, 64)), 64)
    dead = torch.randn(512, 16, generator=generator(4))
    dead[:300] = 0.0  # neurons without weights
    assert_balanced(balanced_assignment(dead), 16)


def test_the_same_labels_every_time() -> None:
    similarity = torch.randn(512, 16, generator=generator(6))
    assert torch.equal(balanced_assignment(similarity), balanced_assignment(similarity))


def test_experts_that_do_not_divide_the_neurons_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 experts must divide 10 neurons"):
        balanced_assignment(torch.zeros(10, 3))
