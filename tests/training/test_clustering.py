"""Balanced k-means: exactly equal groups, planted groups found, the better start kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from training.clustering import balanced_assignment, balanced_kmeans


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 9), st.integers(0, 1000))
def test_every_cluster_gets_exactly_its_share(clusters: int, size: int, seed: int) -> None:
    similarity = torch.randn(clusters * size, clusters, generator=generator(seed))
    labels = balanced_assignment(similarity)
    assert torch.bincount(labels, minlength=clusters).tolist() == [size] * clusters


def test_identical_rows_are_still_split_equally() -> None:
    labels = balanced_assignment(torch.ones(24, 6))
    assert torch.bincount(labels, minlength=6).tolist() == [4] * 6


def test_assignment_is_close_to_the_best_possible() -> None:
    """Against brute force over all balanced labellings of 6 rows into 3 pairs."""
    similarity = torch.rand(6, 3, generator=generator(5))
    best = max(
        sum(float(similarity[row, label]) for row, label in enumerate(labels))
        for labels in balanced_labellings([2, 2, 2])
    )
    found = similarity.gather(1, balanced_assignment(similarity)[:, None]).sum()
    assert float(found) >= best - 6 * 2e-3


def balanced_labellings(room: list[int]) -> list[list[int]]:
    if not any(room):
        return [[]]
    return [
        [label, *rest]
        for label in range(len(room))
        if room[label]
        for rest in balanced_labellings([r - (i == label) for i, r in enumerate(room)])
    ]


def test_planted_clusters_are_found() -> None:
    centres = torch.eye(4, 12)
    truth = torch.arange(4).repeat_interleave(8)[torch.randperm(32, generator=generator(1))]
    rows = centres[truth] * 5 + 0.1 * torch.randn(32, 12, generator=generator(2))
    found = balanced_kmeans(rows, 4, generator(3), warm_start_ED=centres)
    for label in range(4):
        assert truth[found.labels_F == label].unique().numel() == 1


def test_the_better_of_fresh_and_warm_is_kept() -> None:
    rows = torch.randn(64, 8, generator=generator(4))
    fresh = balanced_kmeans(rows, 8, generator(0))
    good, bad = fresh.centroids_ED, torch.eye(8) + 100.0
    assert balanced_kmeans(rows, 8, generator(7), warm_start_ED=good).inertia <= fresh.inertia
    assert balanced_kmeans(rows, 8, generator(0), warm_start_ED=bad).inertia <= fresh.inertia


def test_experts_that_do_not_divide_the_neurons_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 experts must divide 10 neurons"):
        balanced_kmeans(torch.randn(10, 4), 3, generator())
