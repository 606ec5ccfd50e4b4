"""Balanced k-means: groups of exactly equal size among the rows of a matrix.

As in the released code of MoEfication and SSD, an FFN's neurons are clustered by their
L2-normalised rows of `up`, and every cluster gets exactly F / E of them. Assignment under that
constraint is an auction (Bertsekas, 1988; also BASE Layers, Lewis et al. 2021): neurons bid for
clusters, a full cluster keeps its highest bidders, and its price rises until all are placed.

Shapes: F rows, D columns, E clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import require

_PRICE_STEP = 1e-3  # how far from optimal a row may end up, in cosine similarity
_MAX_ROUNDS = 2000


@dataclass(frozen=True)
class Clustering:
    """Labels [F] with equal counts, their unit centroids [E, D], and the inertia.

    Inertia is the mean cosine distance to the centroids that the rows were assigned by.
    """

    labels_F: Tensor
    centroids_ED: Tensor
    inertia: float


def balanced_assignment(similarity_FE: Tensor) -> Tensor:
    """Labels [F], F / E rows each, of nearly the largest total similarity.

    Raises:
        ConfigError: unless the number of clusters divides the number of rows.
    """
    rows, clusters = similarity_FE.shape
    require(rows % clusters == 0, f"{clusters} experts must divide {rows} neurons")
    if clusters == 1:
        return torch.zeros(rows, dtype=torch.long, device=similarity_FE.device)
    capacity = rows // clusters
    prices_E = similarity_FE.new_zeros(clusters)
    labels_F = torch.full((rows,), -1, dtype=torch.long, device=similarity_FE.device)
    bids_F = similarity_FE.new_zeros(rows)
    for _ in range(_MAX_ROUNDS):
        open_rows = (labels_F < 0).nonzero().flatten()
        if open_rows.numel() == 0:
            return labels_F
        _bid(similarity_FE, prices_E, labels_F, bids_F, open_rows)
        _keep_highest(prices_E, labels_F, bids_F, capacity)
    return _fill(similarity_FE, labels_F, capacity)


def _bid(
    similarity_FE: Tensor, prices_E: Tensor, labels_F: Tensor, bids_F: Tensor, rows: Tensor
) -> None:
    """Each open row moves to its best cluster and offers up to its advantage over the second."""
    best = (similarity_FE[rows] - prices_E).topk(2, dim=1)
    target = best.indices[:, 0]
    labels_F[rows] = target
    bids_F[rows] = prices_E[target] + best.values[:, 0] - best.values[:, 1] + _PRICE_STEP


def _keep_highest(prices_E: Tensor, labels_F: Tensor, bids_F: Tensor, capacity: int) -> None:
    """Over-full clusters drop their lowest bids; a full cluster's price is its lowest kept bid."""
    clusters = prices_E.numel()
    by_bid = bids_F.argsort(descending=True, stable=True)
    order_F = by_bid[labels_F[by_bid].argsort(stable=True)]  # by cluster, then by bid
    counts_E = torch.bincount(labels_F, minlength=clusters)
    starts_E = counts_E.cumsum(0) - counts_E
    rank_F = torch.arange(order_F.numel(), device=order_F.device) - starts_E[labels_F[order_F]]
    full_E = counts_E >= capacity
    lowest = order_F[(starts_E + capacity - 1)[full_E]]
    prices_E[full_E] = bids_F[lowest]
    labels_F[order_F[rank_F >= capacity]] = -1


def _fill(similarity_FE: Tensor, labels_F: Tensor, capacity: int) -> Tensor:
    """Put what the auction left open into the clusters that still have room."""
    room = capacity - torch.bincount(labels_F[labels_F >= 0], minlength=similarity_FE.shape[1])
    for row in (labels_F < 0).nonzero().flatten().tolist():
        cluster = int(similarity_FE[row].masked_fill(room <= 0, -torch.inf).argmax())
        labels_F[row] = cluster
        room[cluster] -= 1
    return labels_F


def _lloyd(unit_FD: Tensor, centroids_ED: Tensor, iterations: int) -> Clustering:
    """Alternate balanced assignment and centroids; the best labelling seen is kept."""
    best: Clustering | None = None
    for _ in range(iterations):
        similarity_FE = unit_FD @ centroids_ED.T
        labels_F = balanced_assignment(similarity_FE)
        inertia = 1.0 - float(similarity_FE.gather(1, labels_F[:, None]).mean())
        if best is not None and inertia >= best.inertia - 1e-5:
            break
        sums_ED = torch.zeros_like(centroids_ED).index_add(0, labels_F, unit_FD)
        centroids_ED = F.normalize(sums_ED, dim=1)
        best = Clustering(labels_F, centroids_ED, inertia)
    assert best is not None
    return best


def balanced_kmeans(
    rows_FD: Tensor,
    num_clusters: int,
    generator: torch.Generator,
    warm_start_ED: Tensor | None = None,
    iterations: int = 20,
) -> Clustering:
    """Cluster the directions of `rows_FD` into `num_clusters` groups of equal size.

    Args:
        rows_FD: rows to cluster; only their directions count.
        num_clusters: must divide the number of rows.
        generator: draws the fresh start's seeds.
        warm_start_ED: centroids to start from as well; the better of both results is kept.
        iterations: of Lloyd's algorithm at most, per start.

    Raises:
        ConfigError: unless `num_clusters` divides the number of rows.
    """
    unit_FD = F.normalize(rows_FD.detach().float(), dim=1)
    seeds = torch.randperm(unit_FD.shape[0], generator=generator)[:num_clusters]
    best = _lloyd(unit_FD, unit_FD[seeds.to(unit_FD.device)], iterations)
    if warm_start_ED is not None:
        warm = _lloyd(unit_FD, F.normalize(warm_start_ED.float(), dim=1), iterations)
        best = min(best, warm, key=lambda c: c.inertia)
    return best
