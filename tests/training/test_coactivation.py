"""Rows of co-activation: neurons that fire together come out alike, whatever their weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.gpu.ffn.activations import activate_reference
from training.clustering import balanced_kmeans
from training.coactivation import coactivation_rows


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def firing(up: Tensor, activation: str) -> Callable[[Tensor], Tensor]:
    return lambda x: activate_reference(x @ up.T, activation)


def neurons() -> tuple[Tensor, Tensor, Tensor]:
    """(x, up, truth): four groups fire on four kinds of tokens, for reasons of their own.

    A token of kind g switches on eight columns, one for each neuron of the group; the neurons of a
    group have no column in common, so their weights are orthogonal.
    """
    kinds = torch.randint(0, 4, (1000,), generator=generator(1))
    owner = torch.randperm(32, generator=generator(2)) % 4  # the group of each column and neuron
    on = owner[None, :] == kinds[:, None]
    x = torch.where(on, torch.rand(1000, 32, generator=generator(3)) + 0.5, -0.1)
    return x, torch.eye(32), owner


@pytest.mark.parametrize("columns", [2000, 256])
def test_neurons_that_fire_together_are_grouped_together(columns: int) -> None:
    x, up, truth = neurons()
    rows = coactivation_rows(x, firing(up, "relu"), generator(4), columns)
    assert rows.shape == (32, min(columns, 1000))
    found = balanced_kmeans(rows, 4, generator(5))
    assert all(len(set(truth[found.labels_F == label].tolist())) == 1 for label in range(4))


def test_the_weights_alone_do_not_know() -> None:
    """The test above can fail: by their orthogonal weights the same neurons are mixed up."""
    _, up, truth = neurons()
    found = balanced_kmeans(up, 4, generator(5))
    assert any(len(set(truth[found.labels_F == label].tolist())) > 1 for label in range(4))


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_few_tokens_are_taken_as_they_are(activation: str) -> None:
    x, up = torch.randn(9, 6, generator=generator(6)), torch.randn(12, 6, generator=generator(7))
    expected = activate_reference(x @ up.T, activation).sqrt().T
    torch.testing.assert_close(coactivation_rows(x, firing(up, activation), generator()), expected)


def test_projection_keeps_the_angles_over_several_chunks() -> None:
    x = torch.randn(9000, 16, generator=generator(8))
    up = torch.randn(20, 16, generator=generator(9))
    exact = F.normalize(activate_reference(x @ up.T, "relu").sqrt().T, dim=1)
    near = F.normalize(coactivation_rows(x, firing(up, "relu"), generator(10), columns=512), dim=1)
    assert float((near @ near.T - exact @ exact.T).abs().max()) < 0.15  # 3.4 standard errors
