"""The fitted router finds the truth where there is one and helps on unseen tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import ConfigError
from engine.model.experts import centroid_router, true_mass
from training.experts.router_fit import fit_router, share_loss, true_shares

TOKENS, WIDTH, EXPERTS = 4096, 24, 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(seed: int, count: int = TOKENS) -> Tensor:
    return torch.randn(count, WIDTH, generator=generator(seed))


def layer() -> tuple[Tensor, Tensor]:
    """(up, centroid router) whose experts are not clusters: their norms and directions differ."""
    up = torch.randn(EXPERTS * 6, WIDTH, generator=generator(1))
    up *= torch.linspace(0.2, 2.0, EXPERTS).repeat_interleave(6)[:, None]
    return up, centroid_router(up, EXPERTS)


def mass_of(x_TD: Tensor, up_FD: Tensor) -> Tensor:
    return true_mass(x_TD, up_FD, EXPERTS, "relu")


def loss(router_ED: Tensor, x_TD: Tensor, mass_TE: Tensor) -> float:
    return float(share_loss(x_TD @ router_ED.T, true_shares(mass_TE)))


def coverage(router_ED: Tensor, x_TD: Tensor, mass_TE: Tensor, k: int = 2) -> float:
    best = (x_TD @ router_ED.T).topk(k, dim=1).indices
    return float(mass_TE.gather(1, best).sum() / mass_TE.sum())


def test_a_linear_truth_is_found() -> None:
    """Where the shares are softmax(x @ truth), the truth is the optimum, up to a common row."""
    truth = torch.randn(EXPERTS, WIDTH, generator=generator(2))
    x = tokens(3, 10_000)
    start = truth + torch.randn(EXPERTS, WIDTH, generator=generator(4))
    found = fit_router(x, (x @ truth.T).softmax(1), start, iterations=100)
    error = F.normalize(found - found.mean(0), dim=1) - F.normalize(truth - truth.mean(0), dim=1)
    assert float(error.abs().max()) < 0.03


def test_the_fit_helps_on_tokens_that_it_has_not_seen() -> None:
    up, start = layer()
    x, unseen = tokens(5), tokens(6)
    found = fit_router(x, mass_of(x, up), start)
    mass = mass_of(unseen, up)
    assert loss(found, unseen, mass) < loss(start, unseen, mass) - 0.05
    assert coverage(found, unseen, mass) > coverage(start, unseen, mass) + 0.05


def test_few_tokens_do_not_lead_far_from_the_start() -> None:
    """The pull of the centroids: a fit on ten tokens is no worse on others than 3% of the start."""
    up, start = layer()
    x, unseen = tokens(7, 10), tokens(8)
    found = fit_router(x, mass_of(x, up), start)
    mass = mass_of(unseen, up)
    assert coverage(found, unseen, mass) > coverage(start, unseen, mass) - 0.03
    moved = [
        float((fit_router(y, mass_of(y, up), start) - start).norm()) for y in (x, tokens(7, 2000))
    ]
    assert moved[0] < moved[1]


def test_the_fit_repeats_itself_and_leaves_its_input_alone() -> None:
    up, start = layer()
    before, x = start.clone(), tokens(9, 500)
    first, second = (fit_router(x, mass_of(x, up), start) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(start, before)
    assert not first.requires_grad


def test_tokens_on_which_nothing_fires_do_no_harm() -> None:
    up, start = layer()
    x = tokens(10, 200)
    mass = mass_of(x, up)
    mass[:50] = 0
    assert bool(fit_router(x, mass, start).isfinite().all())


def test_what_does_not_fit_together_is_refused() -> None:
    up, start = layer()
    x = tokens(15, 10)
    mass = mass_of(x, up)
    with pytest.raises(ConfigError, match="do not fit together"):
        fit_router(x[:5], mass, start)
    with pytest.raises(ConfigError, match="must not be zero"):
        fit_router(x, mass, torch.zeros_like(start))
    with pytest.raises(ConfigError, match="do not fit together"):
        fit_router(x[:, :3], mass, start)
