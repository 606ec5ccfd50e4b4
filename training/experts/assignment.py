"""Balanced assignment: every cluster gets exactly F / E rows, of the largest total similarity.

A transportation problem, solved in two parts.

1. Prices. At the right price of each cluster, every row can simply take the cluster with the best
   similarity minus price, and all clusters come out equally full. The prices minimise the dual;
   smoothed by an entropy term (Cuturi, 2013) it has E unknowns, a cheap Hessian, and a handful of
   Newton steps at falling temperatures solve it. No step waits for the device.
2. The rest. A few rows sit on a border and leave some clusters over-full. They go where there is
   room along the cheapest chains of moves (successive shortest paths: Ahuja, Magnanti and Orlin,
   Network Flows, 1993, section 9.7), on the CPU, with E nodes. The labelling is then the best of
   all balanced ones, whatever the prices were.

Shapes: F rows, E clusters.
"""

from __future__ import annotations

import itertools
from typing import Final

import torch
from torch import Tensor

from engine.errors import require

# Temperatures of the Newton steps, in standard deviations of the similarities. Warm prices are
# heated up again: beginning at 0.1 left k-means at up to 3% higher inertia on trained rows.
_COLD: Final = (1.0, 1.0, 0.3, 0.3, 0.1, 0.1, 0.03, 0.03, 0.01, 0.003)
_WARM: Final = (1.0, 0.3, 0.1, 0.03, 0.01)
_LONGEST_STEP: Final = 4.0  # in temperatures: beyond it the quadratic model means little
_RIDGE: Final = 1e-3  # of a cluster's load: the Hessian is singular along equal prices
_TIE: Final = 1e-9  # differences of similarity below this are none


def cluster_prices(similarity_FE: Tensor, warm_E: Tensor | None = None) -> Tensor:
    """Prices [E] at which rows that take their best offer fill all clusters almost equally.

    Args:
        similarity_FE: float32 or float64, finite.
        warm_E: prices of a similar problem, such as Lloyd's previous iteration; saves half.
    """
    rows, clusters = similarity_FE.shape
    scale = similarity_FE.std(correction=0).clamp_min(_TIE)
    prices_E = similarity_FE.new_zeros(clusters) if warm_E is None else warm_E
    for temperature in _COLD if warm_E is None else _WARM:
        step_E = _newton_step((similarity_FE - prices_E) / (temperature * scale), rows / clusters)
        prices_E = prices_E + temperature * scale * step_E
    return prices_E


def _newton_step(logits_FE: Tensor, capacity: float) -> Tensor:
    """The change of prices, in temperatures, that makes the smoothed loads equal."""
    share_FE = logits_FE.softmax(1)
    load_E = share_FE.sum(0)
    hessian_EE = torch.diag(load_E + _RIDGE * capacity) - share_FE.T @ share_FE
    factor_EE, _ = torch.linalg.cholesky_ex(
        hessian_EE
    )  # unlike `cholesky` it does not wait for an error code
    step_E = torch.cholesky_solve((load_E - capacity)[:, None], factor_EE)[:, 0]
    return step_E.nan_to_num().clamp(-_LONGEST_STEP, _LONGEST_STEP)


def balanced_assignment(similarity_FE: Tensor, prices_E: Tensor | None = None) -> Tensor:
    """Labels [F], int64, exactly F / E of each, of the largest possible total similarity.

    Exact up to 1e-9 of similarity a row; the same labels every time on the same device.

    Args:
        similarity_FE: finite.
        prices_E: from `cluster_prices`, if at hand; they save time and change no optimum.

    Raises:
        ConfigError: unless the number of clusters divides the number of rows.
    """
    rows, clusters = similarity_FE.shape
    require(rows % clusters == 0, f"{clusters} experts must divide {rows} neurons")
    if prices_E is None:
        prices_E = cluster_prices(similarity_FE)
    offers_FE = (similarity_FE.double() - prices_E.double()).cpu()
    labels_F = offers_FE.argmax(1)
    _level(offers_FE, labels_F)
    return labels_F.to(similarity_FE.device)


def _level(offers_FE: Tensor, labels_F: Tensor) -> None:
    """Move rows, in place, from over-full to under-full clusters along the cheapest chains.

    Every row starts at its best offer, so the labelling is the best one of its own counts, and
    cheapest chains keep it so.
    """
    rows, clusters = offers_FE.shape
    surplus_E = torch.bincount(labels_F, minlength=clusters) - rows // clusters
    cost_EE = torch.stack([_move_costs(offers_FE, labels_F, e) for e in range(clusters)])
    while bool((surplus_E > 0).any()):
        chain = _cheapest_chain(cost_EE, surplus_E)
        links = list(itertools.pairwise(chain))
        movers = [
            _tied_rows(offers_FE, labels_F, a, b, float(cost_EE[a, b]) + _TIE) for a, b in links
        ]
        room = min(int(surplus_E[chain[0]]), -int(surplus_E[chain[-1]]))
        count = min(room, *(m.numel() for m in movers))
        for (_, b), mover in zip(links, movers, strict=True):
            labels_F[mover[:count]] = b
        surplus_E[chain[0]] -= count
        surplus_E[chain[-1]] += count
        for cluster in chain:
            cost_EE[cluster] = _move_costs(offers_FE, labels_F, cluster)


def _move_costs(offers_FE: Tensor, labels_F: Tensor, cluster: int) -> Tensor:
    """How much the cheapest row of `cluster` loses by moving to each other cluster, [E]."""
    members = (labels_F == cluster).nonzero().flatten()
    if members.numel() == 0:
        return offers_FE.new_full((offers_FE.shape[1],), torch.inf)
    offers_nE = offers_FE[members]
    return (offers_nE[:, cluster, None] - offers_nE).amin(0)


def _tied_rows(offers_FE: Tensor, labels_F: Tensor, a: int, b: int, limit: float) -> Tensor:
    """The rows of cluster a that lose at most `limit` by moving to b, in order."""
    loss_F = offers_FE[:, a] - offers_FE[:, b]
    return ((labels_F == a) & (loss_F <= limit)).nonzero().flatten()


def _cheapest_chain(cost_EE: Tensor, surplus_E: Tensor) -> list[int]:
    """Clusters from an over-full to an under-full one, of the least summed cost (Bellman-Ford)."""
    clusters = surplus_E.numel()
    distance_E = torch.where(surplus_E > 0, 0.0, torch.inf).double()
    previous_E = torch.full((clusters,), -1)
    for _ in range(clusters):
        nearest = (distance_E[:, None] + cost_EE).min(0)
        closer_E = nearest.values < distance_E - _TIE
        if not bool(closer_E.any()):
            break
        distance_E = torch.where(closer_E, nearest.values, distance_E)
        previous_E = torch.where(closer_E, nearest.indices, previous_E)
    chain = [int(distance_E.masked_fill(surplus_E >= 0, torch.inf).argmin())]
    while (previous := int(previous_E[chain[-1]])) >= 0:
        chain.append(previous)
    return chain[::-1]
