"""The compact FFN of groups of tokens equals the masked dense layer, with every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.gpu.ffn.compact_ffn import compact_ffn, compact_ffn_reference
from engine.gpu.routing.shared_choice import (
    Groups,
    choose_groups_reference,
    share_choice,
)

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2}
THRESHOLD = 0.5


def layer(
    tokens: int, width: int, neurons: int, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Leaves x, up and down, and a gradient of the output."""
    generator = torch.Generator().manual_seed(tokens + width)
    shapes = ((tokens, width), (neurons, width), (neurons, width), (tokens, width))
    scales = (1.0, width**-0.5, neurons**-0.5, 1.0)
    x, up, down, dy = (
        (torch.randn(shape, generator=generator) * scale).to(device, dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    )
    return (x.requires_grad_(), up.requires_grad_(), down.requires_grad_()), dy


def choice(
    tokens: int, experts: int, chosen: int, group: int, device: torch.device
) -> tuple[Groups, Groups]:
    """The kernels' choice from random scores, and the reference's."""
    generator = torch.Generator().manual_seed(experts)
    scores_TE = torch.randn(tokens, experts, generator=generator).to(device)
    theta_1 = torch.full((1,), THRESHOLD, device=device)
    return (
        share_choice(scores_TE, theta_1, chosen, group),
        choose_groups_reference(scores_TE, theta_1, chosen, group),
    )


CASES = [
    # tokens, width, experts, expert size, chosen, group
    (1, 16, 4, 16, 1, 16),
    (37, 40, 6, 20, 2, 16),
    (70, 72, 12, 24, 5, 32),
    (100, 100, 10, 12, 10, 16),
    (300, 64, 8, 24, 1, 256),
]


@pytest.mark.parametrize(("tokens", "width", "experts", "size", "chosen", "group"), CASES)
def test_groups_equal_the_reference(
    tokens: int, width: int, experts: int, size: int, chosen: int, group: int, device: torch.device
) -> None:
    actual, expected = choice(tokens, experts, chosen, group, device)
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        assert torch.equal(a, e), name


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("tokens", "width", "experts", "size", "chosen", "group"), CASES)
def test_output_and_gradients_equal_the_reference(
    tokens: int,
    width: int,
    experts: int,
    size: int,
    chosen: int,
    group: int,
    dtype: torch.dtype,
    activation: str,
    own: bool,
    device: torch.device,
) -> None:
    leaves, dy_TD = layer(tokens, width, experts * size, dtype, device)
    groups, _ = choice(tokens, experts, chosen, group, device)
    y_TD = compact_ffn(*leaves, groups, activation, group, own)
    actual = (y_TD, *torch.autograd.grad(y_TD, leaves, dy_TD))
    doubles = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    expected_TD = compact_ffn_reference(*doubles, groups, activation, group, own)
    expected = (expected_TD, *torch.autograd.grad(expected_TD, doubles, dy_TD.double()))
    for a, e in zip(actual, expected, strict=True):
        error = (a.detach().double() - e.detach()).norm()
        assert float(error) <= LIMITS[dtype] * float(e.detach().norm())


def test_all_experts_give_the_dense_layer(device: torch.device) -> None:
    leaves, dy_TD = layer(50, 32, 8 * 16, torch.float32, device)
    groups, _ = choice(50, 8, 8, 16, device)
    y_TD = compact_ffn(*leaves, groups, "relu", 16)
    dense_TD = (leaves[0] @ leaves[1].T).relu() @ leaves[2]
    torch.testing.assert_close(y_TD, dense_TD, rtol=1e-5, atol=1e-5)
    actual = torch.autograd.grad(y_TD, leaves, dy_TD)
    expected = torch.autograd.grad(dense_TD, leaves, dy_TD)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_experts_that_no_group_chose_get_zeros(device: torch.device) -> None:
    leaves, dy_TD = layer(40, 16, 8 * 16, torch.float32, device)
    groups, _ = choice(40, 8, 2, 32, device)
    y_TD = compact_ffn(*leaves, groups, "relu", 32)
    _, dup_FD, ddown_FD = torch.autograd.grad(y_TD, leaves, dy_TD)
    idle_E = (groups.slots_NE < 0).all(0)
    assert bool(idle_E.any())
    for gradient_FD in (dup_FD, ddown_FD):
        assert bool((gradient_FD.view(8, -1)[idle_E] == 0).all())


def test_runs_repeat_bit_for_bit(device: torch.device) -> None:
    leaves, dy_TD = layer(70, 32, 12 * 24, torch.bfloat16, device)
    groups, _ = choice(70, 12, 5, 32, device)
    runs = []
    for _ in range(2):
        y_TD = compact_ffn(*leaves, groups, "relu", 32, own=True)
        runs.append((y_TD, *torch.autograd.grad(y_TD, leaves, dy_TD)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_operators_are_what_they_say(device: torch.device) -> None:
    """Schemas, shapes of fake tensors and autograd, as torch.compile relies on them."""
    leaves, _ = layer(40, 16, 8 * 16, torch.float32, device)
    groups, _ = choice(40, 8, 2, 32, device)
    torch.library.opcheck(
        torch.ops.ambidex.compact_ffn.default, (*leaves, *groups, "relu", 32, True)
    )
    torch.library.opcheck(
        torch.ops.ambidex.choose_groups.default, (groups.scores_TE, groups.theta_1, 2, 32)
    )
