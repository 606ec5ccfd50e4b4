"""Balanced k-means: planted groups found, the better start kept, as good as ever, repeatable."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.errors import ConfigError
from training.experts.clustering import balanced_kmeans


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_planted_clusters_are_found() -> None:
    centres = torch.eye(4, 12)
    truth = torch.arange(4).repeat_interleave(8)[torch.randperm(32, generator=generator(1))]
    rows = centres[truth] * 5 + 0.1 * torch.randn(32, 12, generator=generator(2))
    found = balanced_kmeans(rows, 4, generator(3), warm_start_ED=centres)
    for label in range(4):
        assert len(set(truth[found.labels_F == label].tolist())) == 1


def test_the_better_of_fresh_and_warm_is_kept() -> None:
    rows = torch.randn(64, 8, generator=generator(4))
    fresh = balanced_kmeans(rows, 8, generator(0))
    good, bad = fresh.centroids_ED, torch.eye(8) + 100.0
    assert balanced_kmeans(rows, 8, generator(7), warm_start_ED=good).inertia <= fresh.inertia
    assert balanced_kmeans(rows, 8, generator(0), warm_start_ED=bad).inertia <= fresh.inertia


def test_experts_that_do_not_divide_the_neurons_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 experts must divide 10 neurons"):
        balanced_kmeans(torch.randn(10, 4), 3, generator())


def test_rows_that_are_not_finite_are_refused() -> None:
    rows = torch.randn(8, 4)
    rows[3, 1] = torch.nan
    with pytest.raises(ConfigError, match="finite"):
        balanced_kmeans(rows, 2, generator())


def test_the_inertia_is_that_of_the_labelling() -> None:
    rows = torch.randn(96, 16, generator=generator(8))
    found = balanced_kmeans(rows, 8, generator(9))
    assert torch.bincount(found.labels_F).tolist() == [12] * 8
    unit = F.normalize(rows, dim=1)
    for label in range(8):
        mean = F.normalize(unit[found.labels_F == label].mean(0), dim=0)
        torch.testing.assert_close(found.centroids_ED[label], mean)
    distance = 1 - (unit * found.centroids_ED[found.labels_F]).sum(1).mean()
    assert found.inertia == pytest.approx(float(distance), abs=1e-6)


def test_lloyd_lowers_the_inertia_and_repeats_itself() -> None:
    rows = torch.randn(256, 8, generator=generator(10))
    short = balanced_kmeans(rows, 8, generator(11), iterations=1)
    long = balanced_kmeans(rows, 8, generator(11))
    again = balanced_kmeans(rows, 8, generator(11))
    assert long.inertia < 0.97 * short.inertia
    assert torch.equal(long.labels_F, again.labels_F)


def test_identical_rows_are_split_all_the_same() -> None:
    found = balanced_kmeans(torch.ones(64, 4), 16, generator())
    assert torch.bincount(found.labels_F).tolist() == [4] * 16
