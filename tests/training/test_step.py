"""What a step minimises, against direct computation; its gradients, whole or in micro-batches."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.decoder import Decoder
from engine.model.trace import Trace
from engine.policy import ExpertPolicy
from training.config import SwitchConfig, TrainConfig
from training.experts.conversion import refresh_router
from training.step import Objective, accumulate, objective, outside_share

EXPERTS = 8


@pytest.fixture
def model(micro: TrainConfig) -> Decoder:
    """Random weights large enough that routers choose differently from token to token."""
    config = dataclasses.replace(micro.model.model_config(16, 0, "float32"), initializer_range=0.3)
    model = Decoder(config)
    model.initialize(torch.Generator().manual_seed(0))
    for ffn in model.ffns():
        refresh_router(ffn)
    return model


def tokens(sequences: int = 2) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, 300, (sequences, 17), generator=torch.Generator().manual_seed(5))
    return ids[:, :-1], ids[:, 1:]


def without_penalty(switch: SwitchConfig) -> SwitchConfig:
    return dataclasses.replace(switch, penalty=0.0, dense_penalty=0.0)


def gradients(model: Decoder) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("every", [1, 3, 8])
@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_the_outside_share_is_the_mass_that_no_chosen_expert_holds(
    model: Decoder, top_k: int | None, every: int
) -> None:
    """Token by token, from activations, in every layer; dense passes choose as the router would."""
    k = top_k or 2
    policy = ExpertPolicy.dense() if top_k is None else ExpertPolicy.top_k(top_k)
    trace = Trace(keep_inputs=True, mass_every=every)
    model.logits(tokens()[0], policy, trace)
    shares = []
    for ffn, x_TD in zip(model.ffns(), trace.inputs, strict=True):
        inside = total = 0.0
        for x_D in x_TD[::every].detach():
            mass_E = torch.relu(ffn.up.detach() @ x_D).view(EXPERTS, -1).sum(1)
            best = sorted(range(EXPERTS), key=lambda e, x=x_D, f=ffn: -float(f.router[e] @ x))[:k]
            inside += float(mass_E[best].sum())
            total += float(mass_E.sum())
        shares.append(1 - inside / total)
    assert min(shares) > 0.05
    assert max(shares) < 0.95
    found = outside_share(model, trace, k)
    assert found.item() == pytest.approx(sum(shares) / len(shares), abs=1e-5)


@pytest.mark.parametrize("top_k", [None, 2])
def test_the_penalty_draws_activation_into_the_chosen_experts(
    model: Decoder, top_k: int | None, micro: TrainConfig
) -> None:
    """Steps down its gradient lower the share outside, and each layer has a gradient."""
    inputs, targets = tokens()
    switch = dataclasses.replace(micro.switch, penalty_tokens=1.0)
    optimizer = torch.optim.SGD([p for ffn in model.ffns() for p in (ffn.up,)], lr=0.5)
    seen = []
    for _ in range(4):
        optimizer.zero_grad()
        outside = objective(model, inputs, targets, top_k, switch).outside
        assert outside is not None
        outside.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        assert all(ffn.up.grad is not None and bool(ffn.up.grad.any()) for ffn in model.ffns())
        optimizer.step()
        seen.append(outside.item())
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] < seen[0] - 0.01


@pytest.mark.parametrize(("top_k", "weight"), [(None, 0.7), (3, 0.4)])
def test_the_objective_is_the_loss_and_the_weighted_penalty(
    model: Decoder, micro: TrainConfig, top_k: int | None, weight: float
) -> None:
    inputs, targets = tokens()
    switch = dataclasses.replace(micro.switch, penalty=0.4, dense_penalty=0.7)
    found = objective(model, inputs, targets, top_k, switch)
    policy = ExpertPolicy.dense() if top_k is None else ExpertPolicy.top_k(top_k)
    logits = model.logits(inputs, policy)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert found.loss.item() == pytest.approx(loss.item(), abs=1e-6)
    assert found.outside is not None
    assert found.total.item() == pytest.approx(loss.item() + weight * found.outside.item())


def test_dense_and_sparse_steps_differ(model: Decoder, micro: TrainConfig) -> None:
    inputs, targets = tokens()
    losses = {objective(model, inputs, targets, k, micro.switch).loss.item() for k in (None, 2, 3)}
    assert len(losses) == 3


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_weight_of_zero_computes_no_masses(
    model: Decoder, micro: TrainConfig, top_k: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces: list[Trace | None] = []
    logits = model.logits

    def watched(ids: Tensor, policy: ExpertPolicy, trace: Trace | None = None) -> Tensor:
        traces.append(trace)
        return logits(ids, policy, trace)

    monkeypatch.setattr(model, "logits", watched)
    found = objective(model, *tokens(), top_k, without_penalty(micro.switch))
    assert found.outside is None
    assert found.total is found.loss
    assert traces == [None]


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5])
def test_micro_batches_give_the_gradients_of_the_whole_batch(
    model: Decoder, micro: TrainConfig, top_k: int | None, micro_batch_size: int
) -> None:
    """Five sequences: two do not divide them, and the last micro-batch counts by its size."""
    switch, sizes = without_penalty(micro.switch), []

    def forward(inputs_BL: Tensor, targets_BL: Tensor) -> Objective:
        sizes.append(inputs_BL.shape[0])
        return objective(model, inputs_BL, targets_BL, top_k, switch)

    config = dataclasses.replace(micro, batch_size=5)
    whole, nothing = accumulate(forward, *tokens(5), config)
    expected = gradients(model)
    split = dataclasses.replace(config, micro_batch_size=micro_batch_size)
    loss, _ = accumulate(forward, *tokens(5), split)
    found = gradients(model)
    expected_sizes = {1: [1] * 5, 2: [2, 2, 1], 3: [3, 2], 5: [5]}
    assert sizes == [5, *expected_sizes[micro_batch_size]]
    assert nothing is None
    assert loss.item() == pytest.approx(whole.item(), abs=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_outside_share_of_micro_batches_is_weighted_by_their_size(
    model: Decoder, micro: TrainConfig
) -> None:
    inputs, targets = tokens(3)
    config = dataclasses.replace(micro, batch_size=3, micro_batch_size=2)

    def forward(inputs_BL: Tensor, targets_BL: Tensor) -> Objective:
        return objective(model, inputs_BL, targets_BL, 2, micro.switch)

    _, outside = accumulate(forward, inputs, targets, config)
    parts = [forward(inputs[rows], targets[rows]).outside for rows in (slice(2), slice(2, 3))]
    assert outside is not None
    assert parts[0] is not None
    assert parts[1] is not None
    expected = parts[0].item() * 2 / 3 + parts[1].item() / 3
    assert outside.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("top_k", [None, 2])
def test_autocast_gives_float32_gradients_near_the_exact_ones(
    model: Decoder, micro: TrainConfig, top_k: int | None
) -> None:
    def forward(inputs_BL: Tensor, targets_BL: Tensor) -> Objective:
        return objective(model, inputs_BL, targets_BL, top_k, micro.switch)

    exact, _ = accumulate(forward, *tokens(), micro)
    expected = gradients(model)
    rounded, _ = accumulate(forward, *tokens(), dataclasses.replace(micro, precision="bfloat16"))
    found = gradients(model)
    assert rounded.item() != exact.item()
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert bool(gradient.isfinite().all())
        cosine = F.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.95, name
