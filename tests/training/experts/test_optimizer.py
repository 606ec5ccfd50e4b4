"""Sparse optimiser steps: what they leave alone, and that the rest is torch's AdamW."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.decoder import Decoder
from engine.model.experts import ExpertLayout
from engine.policy import ExpertPolicy
from training.config import TrainConfig
from training.experts.conversion import permute_neurons
from training.experts.optimizer import ExpertAdamW, build_optimizer

EXPERTS, SIZE, WIDTH = 6, 3, 16
SETTINGS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
TOUCHED = [0, 1, 4]


def weights(seed: int = 0, width: int = WIDTH) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(EXPERTS * SIZE, width, generator=generator))


def optimizer_of(parameter: nn.Parameter) -> ExpertAdamW:
    return ExpertAdamW([{"params": [parameter], "num_experts": EXPERTS}], **SETTINGS)


def gradient(step: int, experts: list[int] | None = None, width: int = WIDTH) -> Tensor:
    """Random, and zero outside `experts`."""
    generator = torch.Generator().manual_seed(100 + step)
    full = torch.randn(EXPERTS, SIZE, width, generator=generator)
    if experts is not None:
        full *= torch.isin(torch.arange(EXPERTS), torch.tensor(experts))[:, None, None]
    return full.view(-1, width)


def rows_of(experts: list[int]) -> Tensor:
    return torch.isin(torch.arange(EXPERTS * SIZE) // SIZE, torch.tensor(experts))


def tensors(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    state = optimizer.state[parameter]
    return [t.detach().clone() for t in (parameter, state["exp_avg"], state["exp_avg_sq"])]


def test_rows_without_gradient_keep_every_bit_and_the_others_move() -> None:
    parameter = weights()
    optimizer = optimizer_of(parameter)
    parameter.grad = gradient(0)
    optimizer.step()
    before = tensors(optimizer, parameter)
    for step in (1, 2):
        parameter.grad = gradient(step, TOUCHED)
        optimizer.sparse_step()
    touched = rows_of(TOUCHED)
    for old, new in zip(before, tensors(optimizer, parameter), strict=True):
        assert torch.equal(old[~touched], new[~touched])
        assert bool((old[touched] != new[touched]).all())
    assert optimizer.state[parameter]["step"].item() == 3


@pytest.mark.parametrize("width", [WIDTH, 5])
def test_touched_rows_are_adamw_on_those_rows_alone(width: int) -> None:
    parameter = weights(width=width)
    optimizer = optimizer_of(parameter)
    alone = {e: nn.Parameter(parameter.detach()[rows_of([e])].clone()) for e in TOUCHED}
    reference = torch.optim.AdamW(list(alone.values()), **SETTINGS)
    for step in range(4):
        parameter.grad = gradient(step, TOUCHED, width)
        for expert, rows in alone.items():
            rows.grad = parameter.grad[rows_of([expert])].clone()
        optimizer.sparse_step()
        reference.step()
    for expert, rows in alone.items():
        found = [t[rows_of([expert])] for t in tensors(optimizer, parameter)]
        torch.testing.assert_close(found, tensors(reference, rows), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("sparse", [False, True])
def test_with_every_expert_touched_both_steps_are_torchs_bit_for_bit(sparse: bool) -> None:
    parameter, twin = weights(), weights()
    optimizer = optimizer_of(parameter)
    reference = torch.optim.AdamW([twin], **SETTINGS)
    for step in range(4):
        parameter.grad, twin.grad = gradient(step), gradient(step)
        if sparse:
            optimizer.sparse_step()
        else:
            optimizer.step()
        reference.step()
    found, expected = tensors(optimizer, parameter), tensors(reference, twin)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_dense_step_moves_rows_without_gradient_as_torch_does() -> None:
    parameter, twin = weights(), weights()
    optimizer, reference = optimizer_of(parameter), torch.optim.AdamW([twin], **SETTINGS)
    for step, experts in enumerate((None, TOUCHED)):
        parameter.grad, twin.grad = gradient(step, experts), gradient(step, experts)
        optimizer.step()
        reference.step()
    assert torch.equal(parameter, twin)


def test_a_step_without_any_gradient_changes_nothing_but_the_count() -> None:
    parameter = weights()
    optimizer = optimizer_of(parameter)
    before = parameter.detach().clone()
    parameter.grad = torch.zeros_like(parameter)
    optimizer.sparse_step()
    assert torch.equal(parameter, before)
    assert optimizer.state[parameter]["step"].item() == 1
    assert not optimizer.state[parameter]["exp_avg"].any()


def test_a_nan_counts_as_a_gradient() -> None:
    """What should have stopped the step must not be hidden by leaving the row alone."""
    parameter = weights()
    optimizer = optimizer_of(parameter)
    parameter.grad = gradient(0, [0])
    parameter.grad[7, 3] = float("nan")
    optimizer.sparse_step()
    assert parameter.isnan().any()


@pytest.mark.parametrize("value", [1e-30, -1e-30])
def test_the_smallest_gradient_of_either_sign_counts(value: float) -> None:
    parameter = weights()
    optimizer = optimizer_of(parameter)
    parameter.grad = torch.zeros_like(parameter)
    parameter.grad[4, 2] = value
    before = parameter.detach().clone()
    optimizer.sparse_step()
    assert (parameter != before).any(1).tolist() == rows_of([1]).tolist()


def test_gradients_are_still_there_afterwards_and_hooks_run_once() -> None:
    parameter = weights()
    optimizer = optimizer_of(parameter)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    parameter.grad = expected = gradient(0, TOUCHED)
    optimizer.sparse_step()
    assert parameter.grad is expected
    assert calls == [1]


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    parameter = weights()
    optimizer = optimizer_of(parameter)
    for step in range(2):
        parameter.grad = gradient(step, TOUCHED)
        optimizer.sparse_step()
    twin = nn.Parameter(parameter.detach().clone())
    resumed = optimizer_of(twin)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step, experts in ((2, [2, 5]), (3, None)):
        for p, o in ((parameter, optimizer), (twin, resumed)):
            p.grad = gradient(step, experts)
            o.sparse_step()
    found, expected = tensors(resumed, twin), tensors(optimizer, parameter)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def sparse_model_step(model: Decoder, optimizer: ExpertAdamW, ids: Tensor, top_k: int) -> None:
    logits = model.logits(ids[:, :-1], ExpertPolicy.top_k(top_k))
    optimizer.zero_grad()
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    optimizer.sparse_step()


def small_model(config: TrainConfig) -> tuple[Decoder, ExpertAdamW, Tensor]:
    model = Decoder(config.model.model_config(16, 0, "float32"))
    model.initialize(torch.Generator().manual_seed(0))
    for ffn in model.ffns():
        ffn.router.normal_(generator=torch.Generator().manual_seed(1))
    ids = torch.randint(0, 300, (1, 4), generator=torch.Generator().manual_seed(2))
    return model, build_optimizer(model, config), ids


def test_a_models_sparse_step_moves_exactly_the_experts_that_tokens_chose(
    micro: TrainConfig,
) -> None:
    model, optimizer, ids = small_model(micro)
    sparse_model_step(model, optimizer, ids, 8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sparse_model_step(model, optimizer, ids, 1)
    untouched = 0
    for name, p in model.named_parameters():
        if name.endswith(("ffn.up", "ffn.down")):
            assert p.grad is not None
            has_gradient = p.grad.view(8, -1).ne(0).any(1)
            moved = (p != before[name]).view(8, -1).any(1)
            assert torch.equal(moved, has_gradient)
            untouched += int((~moved).sum())
        else:
            assert not torch.equal(p, before[name])
    assert untouched > 8, "three tokens with one expert each leave most of 8 experts alone"


def test_every_parameter_is_in_one_group_and_only_matrices_decay(micro: TrainConfig) -> None:
    model, optimizer, _ = small_model(micro)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for p in model.parameters():
        assert decay[id(p)] == (micro.optimizer.weight_decay if p.dim() >= 2 else 0.0)


def test_moving_neurons_between_sparse_steps_takes_their_moments_along(
    micro: TrainConfig,
) -> None:
    """Whole experts trade places: sparse steps go on as if they had not."""
    model, optimizer, ids = small_model(micro)
    twin, twin_optimizer, _ = small_model(micro)
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        sparse_model_step(m, o, ids, 2)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(5))
    neurons = (order[:, None] * 4 + torch.arange(4)).flatten()
    layout = ExpertLayout(neurons, 8)
    for ffn in model.ffns():
        permute_neurons(ffn, layout, optimizer)
        ffn.router.copy_(ffn.router[order])
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        sparse_model_step(m, o, ids, 2)
    for ffn, other in zip(model.ffns(), twin.ffns(), strict=True):
        for a, b in ((ffn.up, other.up), (ffn.down, other.down)):
            found, expected = tensors(optimizer, a), tensors(twin_optimizer, b)
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x, layout.apply(y), rtol=1e-5, atol=1e-7)
