"""The one idea: an expert is a slice of neurons, and all experts together are the dense FFN."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine import checkpoint as checkpoints
from engine.checkpoint import Checkpoint
from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.gpu.ffn.activations import activate_reference
from engine.model.decoder import Decoder
from engine.model.experts import (
    ExpertFFN,
    ExpertLayout,
    PolicyBatch,
    Trace,
    centroid_router,
    true_mass,
)
from engine.model.sliced_ffn import sparse_ffn
from engine.serving.request import ExpertPolicy
from training.clustering import balanced_kmeans
from training.conversion import permute_neurons, refresh_router

SHAPES = [(1, 100, 4, 24), (7, 32, 8, 8), (33, 100, 5, 3), (16, 48, 1, 40)]  # T, D, E, S


def random_ffn(
    tokens: int, width: int, experts: int, size: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(tokens * 1000 + width)
    neurons = experts * size
    x, up, down = (
        torch.randn(tokens, width),
        torch.randn(neurons, width),
        torch.randn(neurons, width),
    )
    return x.to(dtype), up.to(dtype), down.to(dtype)


def gradients(y: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return torch.autograd.grad((y * weights).sum(), leaves, materialize_grads=True)


@pytest.mark.parametrize("activation", ["relu", "relu2"])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_experts_equal_dense_in_outputs_and_gradients(
    shape: tuple[int, int, int, int], activation: str
) -> None:
    x, up, down = (t.requires_grad_() for t in random_ffn(*shape))
    dense = activate_reference(x @ up.T, activation) @ down
    sparse = sparse_ffn(x, up, down, torch.ones(shape[0], shape[2], dtype=torch.bool), activation)
    torch.testing.assert_close(sparse, dense)
    torch.testing.assert_close(gradients(sparse, x, up, down), gradients(dense, x, up, down))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_subset_equals_the_dense_ffn_with_the_others_masked(
    shape: tuple[int, int, int, int],
) -> None:
    tokens, _, experts, size = shape
    x, up, down = (t.requires_grad_() for t in random_ffn(*shape))
    chosen = torch.rand(tokens, experts) < 0.4
    chosen[0] = False  # a token may even have none
    mask = chosen.repeat_interleave(size, dim=1)
    masked = ((x @ up.T).relu() * mask) @ down
    sparse = sparse_ffn(x, up, down, chosen, "relu")
    torch.testing.assert_close(sparse, masked)
    torch.testing.assert_close(gradients(sparse, x, up, down), gradients(masked, x, up, down))


def test_a_layout_is_undone_by_its_inverse_and_groups_by_label() -> None:
    labels = torch.tensor([2, 0, 1, 1, 0, 2])
    layout = ExpertLayout.from_labels(labels, 3)
    assert layout.expert_size == 2
    assert layout.apply(labels).tolist() == [0, 0, 1, 1, 2, 2]
    rows = torch.randn(6, 5)
    assert torch.equal(layout.inverse().apply(layout.apply(rows)), rows)


def test_unequal_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match="exactly 2 neurons"):
        ExpertLayout.from_labels(torch.tensor([0, 0, 0, 1]), 2)


def test_centroid_router_rows_are_unit_means_of_their_own_neurons() -> None:
    up = torch.randn(12, 5)
    router = centroid_router(up, 3, norm=4.0)
    torch.testing.assert_close(router.norm(dim=1), torch.full((3,), 4.0))
    mean = torch.nn.functional.normalize(up[4:8], dim=1).mean(0)
    torch.testing.assert_close(router[1], 4.0 * mean / mean.norm())


def test_true_mass_sums_activations_by_expert() -> None:
    x, up, _ = random_ffn(3, 6, 4, 5)
    hidden = (x @ up.T).relu()
    mass = true_mass(x, up, 4, "relu")
    torch.testing.assert_close(mass[:, 2], hidden[:, 10:15].sum(1))


def test_mixed_policies_in_one_batch_each_get_their_own(checkpoint: Checkpoint) -> None:
    ffn = tiny_ffn(checkpoint.config)
    policies = [
        (ExpertPolicy.dense(), 3),
        (ExpertPolicy.top_k(2), 4),
        (ExpertPolicy.mass(0.6), 2),
        (ExpertPolicy.top_k(8), 1),
    ]
    x = torch.randn(10, checkpoint.config.hidden_size)
    trace = Trace(keep_inputs=True)
    mixed = ffn(x, PolicyBatch.build(policies, 8), trace)
    start = 0
    for policy, tokens in policies:
        rows = slice(start, start + tokens)
        alone = ffn(x[rows], PolicyBatch.uniform(policy, tokens, 8))
        torch.testing.assert_close(mixed[rows], alone)
        start += tokens
    counts_LT, union_L = trace.counts()
    counts = counts_LT[0].tolist()
    assert counts[:7] == [8, 8, 8, 2, 2, 2, 2]
    assert counts[9] == 8
    assert all(1 <= count <= 8 for count in counts[7:9])
    assert union_L.tolist() == [8]


def test_oracle_captures_at_least_the_mass_that_the_router_does(checkpoint: Checkpoint) -> None:
    ffn = tiny_ffn(checkpoint.config)
    x = torch.randn(64, checkpoint.config.hidden_size)
    mass = true_mass(x, ffn.up, 8, "relu")
    captured = {}
    for policy in (ExpertPolicy.top_k(3), ExpertPolicy.oracle(3)):
        trace = Trace(keep_inputs=True)
        ffn(x, PolicyBatch.uniform(policy, 64, 8), trace)
        chosen = trace.chosen[0]
        assert chosen is not None
        captured[policy.kind] = (mass * chosen).sum(1)
    assert bool((captured["oracle"] >= captured["top_k"] - 1e-5).all())
    torch.testing.assert_close(captured["oracle"], mass.topk(3, dim=1).values.sum(1))


def tiny_ffn(config: ModelConfig) -> ExpertFFN:
    torch.manual_seed(0)
    ffn = ExpertFFN(config)
    with torch.no_grad():
        ffn.up.normal_()
        ffn.down.normal_()
        ffn.router.copy_(centroid_router(ffn.up, 8, 2.0))
    return ffn.requires_grad_(False)


def recluster(model: Decoder) -> None:
    for ffn in model.ffns():
        generator = torch.Generator().manual_seed(3)
        labels = balanced_kmeans(ffn.up, ffn.num_experts, generator).labels_F
        permute_neurons(ffn, ExpertLayout.from_labels(labels, ffn.num_experts), None)
        refresh_router(ffn)


def test_the_defining_invariant_survives_reclustering_saving_and_loading(
    reference: Decoder, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """All experts chosen = dense, and the dense function itself stays what it was."""
    model = copy.deepcopy(reference)
    ids = torch.randint(0, model.config.vocab_size, (2, 17))
    original = model.logits(ids, ExpertPolicy.dense())
    # mass:1 goes through routing and the sparse path, and every expert is needed for all the mass
    everything = ExpertPolicy.mass(1.0)

    def check(model: Decoder) -> None:
        trace = Trace()
        sparse = model.logits(ids, everything, trace)
        assert bool((trace.counts()[0] == 8).all())
        torch.testing.assert_close(sparse, model.logits(ids, ExpertPolicy.dense()))
        torch.testing.assert_close(sparse, original, rtol=1e-4, atol=1e-4)

    check(model)
    before = model.ffns()[0].up.clone()
    recluster(model)
    assert not torch.equal(before, model.ffns()[0].up), "the neurons should have moved"
    check(model)
    checkpoints.save(tmp_path / "saved", model, checkpoint.tokenizer, {})
    loaded = checkpoints.load(tmp_path / "saved")
    check(loaded.model)
    loaded.model.prepare()
    check(loaded.model)
