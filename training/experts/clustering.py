"""Balanced k-means: groups of exactly equal size among the rows of a matrix.

As in the released code of MoEfication and SSD, rows count by their direction alone, every cluster
gets exactly F / E of them, and a warm start competes with a fresh one. Lloyd's iterations take the
assignment at nearly balanced prices, which each hands to the next; the last one is exact.

Shapes: F rows, D columns, E clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import require
from training.experts.assignment import balanced_assignment, cluster_prices

_SEED_WIDTH: Final = 128  # columns that suffice to tell far rows from near ones
_SETTLED: Final = 2e-4  # stop when an iteration lowers the inertia by less than this share of it


@dataclass(frozen=True)
class Clustering:
    """Labels [F] with equal counts, their unit centroids [E, D], and the inertia.

    Inertia is the rows' mean cosine distance to the centroid of their own cluster.
    """

    labels_F: Tensor
    centroids_ED: Tensor
    inertia: float


def _centre(unit_FD: Tensor, labels_F: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Unit centroids [E, D] of a labelling and its inertia, 0-dim.

    The sum over a cluster of the cosines to its centroid is the length of its rows' sum.
    """
    if unit_FD.is_cuda:  # index_add adds in no fixed order there, a product does
        member_EF = labels_F == torch.arange(clusters, device=labels_F.device)[:, None]
        sums_ED = member_EF.float() @ unit_FD
    else:
        sums_ED = unit_FD.new_zeros(clusters, unit_FD.shape[1]).index_add(0, labels_F, unit_FD)
    return F.normalize(sums_ED, dim=1), 1 - sums_ED.norm(dim=1).sum() / unit_FD.shape[0]


def _seeds(unit_FD: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Rows [E, D] drawn one after another, each in proportion to its distance from those before.

    k-means++ (Arthur and Vassilvitskii, 2007); half the squared distance of unit rows is their
    cosine distance, here between random projections of wide rows, since it need not be exact. The
    random numbers are drawn first: no step waits for the device.
    """
    rows, width = unit_FD.shape
    race_EF = torch.empty(clusters, rows).exponential_(generator=generator).to(unit_FD.device)
    if width > _SEED_WIDTH:
        mix_DR = torch.randn(width, _SEED_WIDTH, generator=generator).to(unit_FD.device)
        narrow_FR = F.normalize(unit_FD @ mix_DR, dim=1)
    else:
        narrow_FR = unit_FD
    distance_F = unit_FD.new_ones(rows)
    seeds = []
    for race_F in race_EF.unbind():
        # The winner of a race at these speeds is drawn in proportion to them. Cumulative sums would
        # serve too, but CUDA adds those in no fixed order.
        seed = (distance_F / race_F).argmax()
        seeds.append(seed)
        nearness_F = narrow_FR @ narrow_FR.index_select(0, seed[None])[0]
        distance_F = torch.minimum(distance_F, (1 - nearness_F).clamp_min(0))
    return unit_FD[torch.stack(seeds)]


def _lloyd(unit_FD: Tensor, centroids_ED: Tensor, iterations: int) -> Clustering:
    """Alternate nearly balanced assignment and centroids, then assign exactly once."""
    clusters = centroids_ED.shape[0]
    prices_E: Tensor | None = None
    last = torch.inf
    for _ in range(iterations):
        similarity_FE = unit_FD @ centroids_ED.T
        prices_E = cluster_prices(similarity_FE, prices_E)
        labels_F = (similarity_FE - prices_E).argmax(1)
        centroids_ED, distance = _centre(unit_FD, labels_F, clusters)
        inertia = float(distance)
        if inertia > last * (1 - _SETTLED):
            break
        last = inertia
    similarity_FE = unit_FD @ centroids_ED.T
    labels_F = balanced_assignment(similarity_FE, cluster_prices(similarity_FE, prices_E))
    centroids_ED, distance = _centre(unit_FD, labels_F, clusters)
    return Clustering(labels_F, centroids_ED, float(distance))


def balanced_kmeans(
    rows_FD: Tensor,
    num_clusters: int,
    generator: torch.Generator,
    warm_start_ED: Tensor | None = None,
    iterations: int = 30,
) -> Clustering:
    """Cluster the directions of `rows_FD` into `num_clusters` groups of equal size.

    The same result every time on the same device, given the generator.

    Args:
        rows_FD: rows to cluster; only their directions count.
        num_clusters: must divide the number of rows.
        generator: draws the fresh start's seeds; on the CPU.
        warm_start_ED: centroids to start from as well; the better of both results is kept.
        iterations: how many iterations of Lloyd's algorithm each start takes at most.

    Raises:
        ConfigError: unless `num_clusters` divides the number of rows and these are finite.
    """
    rows = rows_FD.shape[0]
    require(rows % num_clusters == 0, f"{num_clusters} experts must divide {rows} neurons")
    unit_FD = F.normalize(rows_FD.detach().float(), dim=1)
    require(bool(unit_FD.isfinite().all()), "rows to cluster must be finite")
    best = _lloyd(unit_FD, _seeds(unit_FD, num_clusters, generator), iterations)
    if warm_start_ED is not None:
        warm = _lloyd(unit_FD, F.normalize(warm_start_ED.float(), dim=1), iterations)
        best = min(best, warm, key=lambda c: c.inertia)
    return best
