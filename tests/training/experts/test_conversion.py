"""Building experts moves neurons and everything known about them; the function stays."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.decoder import Decoder
from engine.model.experts import ExpertLayout, centroid_router, true_mass
from engine.policy import ExpertPolicy
from training.config import TrainConfig
from training.experts.conversion import build_experts, calibrate_router
from training.experts.optimizer import build_optimizer


def trained(config: TrainConfig, steps: int = 3) -> tuple[Decoder, torch.optim.Optimizer, Tensor]:
    model = Decoder(config.model.model_config(16, 0, "float32"))
    model.initialize(torch.Generator().manual_seed(0))
    optimizer = build_optimizer(model, config)
    ids = torch.randint(0, 300, (4, 17), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        dense_step(model, optimizer, ids)
    return model, optimizer, ids


def dense_step(model: Decoder, optimizer: torch.optim.Optimizer, ids: Tensor) -> float:
    logits = model.logits(ids[:, :-1], ExpertPolicy.dense())
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    optimizer.step()
    return loss.item()


def build(
    model: Decoder, optimizer: torch.optim.Optimizer | None, ids: Tensor
) -> list[ExpertLayout]:
    layouts = build_experts(
        model, optimizer, ids[:, :-1], torch.Generator().manual_seed(2), warm_start=False
    )
    moved = [not torch.equal(x.order_F, torch.arange(x.order_F.numel())) for x in layouts]
    assert all(moved), "some neurons should have moved"
    return layouts


def drift_after_steps(config: TrainConfig, *, move_moments: bool) -> float:
    """Largest difference of a weight, between a converted model and its twin, after more steps."""
    model, optimizer, ids = trained(config)
    twin, twin_optimizer, _ = trained(config)
    layouts = build(model, optimizer if move_moments else None, ids)
    for _ in range(4):
        dense_step(model, optimizer, ids)
        dense_step(twin, twin_optimizer, ids)
    rows = zip(layouts, model.ffns(), twin.ffns(), strict=True)
    return max(float((layout.apply(b.up.data) - a.up.data).abs().max()) for layout, a, b in rows)


def test_the_steps_that_follow_are_what_they_would_have_been(micro: TrainConfig) -> None:
    """The moments move with the neurons, so training goes on as if nothing had happened."""
    assert drift_after_steps(micro, move_moments=True) < 1e-5


def test_forgetting_the_moments_would_show(micro: TrainConfig) -> None:
    """The test above can fail: without the optimiser's permutation the paths part."""
    assert drift_after_steps(micro, move_moments=False) > 1e-4


def test_calibration_keeps_rankings_and_lowers_the_error_of_predicted_shares(
    micro: TrainConfig,
) -> None:
    model, _, _ = trained(micro, steps=1)
    ffn = model.requires_grad_(False).ffns()[0]
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(3))
    unit = centroid_router(ffn.up, ffn.num_experts)
    mass = true_mass(x, ffn.up, ffn.num_experts, "relu")
    share = mass / mass.sum(1, keepdim=True)

    def error(router: Tensor) -> float:
        return float(-(share * (x @ router.T).log_softmax(1)).sum(1).mean())

    best = calibrate_router(ffn, x)
    assert best <= error(unit) + 1e-6
    assert best <= error(unit * 30.0)
    assert abs(best - error(ffn.router)) < 1e-4
    assert torch.equal((x @ unit.T).argsort(1), (x @ ffn.router.T).argsort(1))


def test_building_twice_from_a_warm_start_keeps_the_function(micro: TrainConfig) -> None:
    model, _, ids = trained(micro)
    original = copy.deepcopy(model).logits(ids[:, 1:], ExpertPolicy.dense())
    for seed, warm in ((1, False), (2, True)):
        build_experts(model, None, ids[:, 1:], torch.Generator().manual_seed(seed), warm_start=warm)
        torch.testing.assert_close(model.logits(ids[:, 1:], ExpertPolicy.dense()), original)
