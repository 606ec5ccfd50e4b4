"""Training's sparse FFN against the masked dense one: the output and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.gpu.ffn.activations import activate_reference
from engine.model.sliced_ffn import sparse_ffn, sparse_ffn_reference

# Tokens, width, experts, neurons per expert: one of each, odd sizes, and a usual one.
SHAPES = [(1, 100, 4, 24), (1, 1, 1, 1), (7, 32, 8, 8), (33, 101, 5, 3), (16, 48, 1, 40)]
ACTIVATIONS = ["relu", "relu2"]


def leaves(
    tokens: int, width: int, experts: int, size: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """x, up, down."""
    generator = torch.Generator().manual_seed(tokens * 1000 + width)
    shapes = ((tokens, width), (experts * size, width), (experts * size, width))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def random_choice(tokens: int, experts: int, share: float) -> Tensor:
    generator = torch.Generator().manual_seed(tokens + experts)
    return torch.rand(tokens, experts, generator=generator) < share


def with_gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad(y, inputs, weights)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("share", [0.0, 0.15, 0.6, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_those_of_the_masked_dense_ffn(
    shape: tuple[int, int, int, int], share: float, activation: str
) -> None:
    inputs = leaves(*shape)
    chosen = random_choice(shape[0], shape[2], share)
    expected = with_gradients(sparse_ffn_reference(*inputs, chosen, activation), inputs)
    found = with_gradients(sparse_ffn(*inputs, chosen, activation), inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_experts_are_the_dense_ffn_in_float32(activation: str) -> None:
    x, up, down = inputs = leaves(96, 64, 8, 24, torch.float32)
    chosen = torch.ones(96, 8, dtype=torch.bool)
    expected = with_gradients(activate_reference(x @ up.T, activation) @ down, inputs)
    found = with_gradients(sparse_ffn(*inputs, chosen, activation), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)


def test_gradients_agree_with_finite_differences() -> None:
    inputs = leaves(5, 6, 4, 3)
    chosen = random_choice(5, 4, 0.5)
    assert torch.autograd.gradcheck(lambda *t: sparse_ffn(*t, chosen, "relu2"), inputs)


def test_experts_without_tokens_get_exactly_zero_gradient_and_the_others_some() -> None:
    inputs = leaves(20, 16, 6, 4)
    chosen = torch.zeros(20, 6, dtype=torch.bool)
    chosen[:, 1] = chosen[3:9, 4] = True
    _, _, up, down = with_gradients(sparse_ffn(*inputs, chosen, "relu"), inputs)
    for gradient in (up, down):
        touched = gradient.view(6, -1).ne(0).any(1)
        assert touched.tolist() == [False, True, False, False, True, False]


def test_a_token_without_experts_gets_zeros_and_changes_nothing_else() -> None:
    inputs = leaves(9, 16, 4, 4)
    chosen = random_choice(9, 4, 0.7)
    chosen[2] = False
    y, x_grad, *_ = with_gradients(sparse_ffn(*inputs, chosen, "relu"), inputs)
    assert not y[2].any()
    assert not x_grad[2].any()
    others = torch.arange(9) != 2
    x, up, down = inputs
    alone = sparse_ffn(x[others], up, down, chosen[others], "relu")
    torch.testing.assert_close(y[others], alone)


def test_a_gradient_that_is_not_contiguous_is_read_rightly() -> None:
    """`sum()` hands back an expanded scalar, a transposed product strides of its own."""
    inputs = leaves(12, 10, 5, 4)
    chosen = random_choice(12, 5, 0.5)
    for reduce in (Tensor.sum, lambda y: (y.T @ torch.eye(12, dtype=y.dtype)).square().sum()):
        expected = torch.autograd.grad(
            reduce(sparse_ffn_reference(*inputs, chosen, "relu")), inputs
        )
        found = torch.autograd.grad(reduce(sparse_ffn(*inputs, chosen, "relu")), inputs)
        torch.testing.assert_close(found, expected)


def test_two_runs_give_the_same_bits() -> None:
    inputs = leaves(200, 64, 16, 8, torch.float32)
    chosen = random_choice(200, 16, 0.3)
    runs = [with_gradients(sparse_ffn(*inputs, chosen, "relu"), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_it_runs_without_gradients_and_refuses_a_second_derivative() -> None:
    inputs = leaves(6, 8, 4, 2)
    chosen = random_choice(6, 4, 0.5)
    with torch.inference_mode():
        y = sparse_ffn(*inputs, chosen, "relu2")
    torch.testing.assert_close(y, sparse_ffn_reference(*inputs, chosen, "relu2").detach())
    first = torch.autograd.grad(
        sparse_ffn(*inputs, chosen, "relu2").square().sum(), inputs, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first[0].sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
