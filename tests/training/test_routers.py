"""Routers in training: centroids follow the weights, learned ones begin there and learn."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from engine.model.decoder import Decoder
from engine.model.experts import centroid_router
from engine.model.trace import Trace
from engine.policy import ExpertPolicy
from training.config import TrainConfig
from training.conversion import build_experts
from training.router import share_loss, true_shares
from training.routers import Routers

EXPERTS = 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def model(micro: TrainConfig) -> Decoder:
    """Experts of very different norms, which centroids know nothing of."""
    model = Decoder(micro.model.model_config(64, 0, "float32"))
    model.initialize(generator())
    with torch.no_grad():
        for ffn in model.ffns():
            ffn.up *= torch.linspace(1, 40, EXPERTS).repeat_interleave(4)[:, None]
    return model.requires_grad_(False)


def probe(seed: int = 1, sequences: int = 8) -> Tensor:
    return torch.randint(0, 300, (sequences, 64), generator=generator(seed))


def trace_of(model: Decoder, ids_BL: Tensor, every: int = 1) -> Trace:
    trace = Trace(keep_inputs=True, mass_every=every)
    model.logits(ids_BL, ExpertPolicy.dense(), trace)
    return trace


def quality(model: Decoder, trace: Trace, k: int = 2) -> list[tuple[float, float]]:
    """(cross-entropy to the true shares, share of the mass in the best k experts) of each layer."""
    found = []
    layers = zip(model.ffns(), trace.inputs, trace.masses, strict=True)
    for ffn, x_TD, mass_TE in layers:
        scores_TE = x_TD[:: trace.mass_every] @ ffn.router.T
        inside = mass_TE.gather(1, scores_TE.topk(k).indices).sum() / mass_TE.sum()
        found.append((float(share_loss(scores_TE, true_shares(mass_TE))), float(inside)))
    return found


def routers_of(model: Decoder) -> list[Tensor]:
    return [ffn.router.clone() for ffn in model.ffns()]


@pytest.mark.parametrize("kind", ["centroid", "learned"])
def test_until_a_clustering_routers_follow_the_weights(model: Decoder, kind: str) -> None:
    routers = Routers(model, kind)
    for _ in range(2):
        for ffn in model.ffns():
            ffn.up.normal_(generator=generator(3))
        routers.before_step()
        assert not routers.learning
        for ffn in model.ffns():
            torch.testing.assert_close(ffn.router, centroid_router(ffn.up, EXPERTS))
    assert routers.tensors() == {}


def test_centroids_follow_the_weights_after_a_clustering_at_their_calibrated_norm(
    model: Decoder,
) -> None:
    routers = Routers(model, "centroid")
    build_experts(model, None, probe(), generator(2), warm_start=False)
    routers.clustered()
    norms = [float(router.norm(dim=1).mean()) for router in routers_of(model)]
    for ffn in model.ffns():
        ffn.up.normal_(generator=generator(4))
    routers.before_step()
    assert not routers.learning
    for ffn, norm in zip(model.ffns(), norms, strict=True):
        torch.testing.assert_close(ffn.router, centroid_router(ffn.up, EXPERTS, norm))


def test_learned_routers_begin_at_the_clustering_and_leave_the_centroids(model: Decoder) -> None:
    routers = Routers(model, "learned")
    build_experts(model, None, probe(), generator(2), warm_start=False, learn=True)
    routers.clustered()
    assert routers.learning
    before = routers_of(model)
    for ffn in model.ffns():
        ffn.up.normal_(generator=generator(4))
    routers.before_step()
    assert all(torch.equal(a, b) for a, b in zip(before, routers_of(model), strict=True))
    routers.hear(trace_of(model, probe()))
    assert not any(torch.equal(a, b) for a, b in zip(before, routers_of(model), strict=True))


@pytest.mark.parametrize("every", [1, 4])
def test_what_is_heard_improves_routing_on_those_tokens_and_on_others(
    model: Decoder, every: int
) -> None:
    """From calibrated centroids, by updates alone, on samples of the tokens."""
    build_experts(model, None, probe(), generator(2), warm_start=False)
    routers = Routers(model, "learned")
    routers.clustered()
    heard, unheard = trace_of(model, probe(5), every), trace_of(model, probe(6))
    before = quality(model, heard), quality(model, unheard)
    for _ in range(60):
        routers.hear(heard)
    after = quality(model, heard), quality(model, unheard)
    for was, now in zip(before, after, strict=True):
        for (loss, inside), (new_loss, new_inside) in zip(was, now, strict=True):
            assert new_loss < loss - 0.005
            assert new_inside > inside


def test_another_clustering_forgets_what_was_learned_of_the_old_experts(model: Decoder) -> None:
    routers = Routers(model, "learned")
    build_experts(model, None, probe(), generator(2), warm_start=False, learn=True)
    routers.clustered()
    routers.hear(trace_of(model, probe()))
    assert all(int(t) == 1 for name, t in routers.tensors().items() if name.endswith("count"))
    routers.clustered()
    assert routers.tensors()
    assert not any(bool(tensor.any()) for tensor in routers.tensors().values())


def test_the_state_goes_on_bit_for_bit(model: Decoder) -> None:
    build_experts(model, None, probe(), generator(2), warm_start=False, learn=True)
    routers = Routers(model, "learned")
    routers.clustered()
    for seed in (5, 6):
        routers.hear(trace_of(model, probe(seed)))
    saved = {name: tensor.clone() for name, tensor in routers.tensors().items()}
    assert sorted(saved) == sorted(
        f"{layer}.{name}" for layer in range(2) for name in ("first", "second", "count")
    )
    present = routers_of(model)
    routers.hear(trace_of(model, probe(7)))
    expected = routers_of(model)
    for ffn, router in zip(model.ffns(), present, strict=True):
        ffn.router.copy_(router)
    restored = Routers.restored(model, "learned", saved)
    assert restored.learning
    restored.hear(trace_of(model, probe(7)))
    assert all(torch.equal(a, b) for a, b in zip(expected, routers_of(model), strict=True))


def test_layers_are_restored_in_the_order_of_their_numbers(micro: TrainConfig) -> None:
    """Ten layers and more: 10 comes after 9, not after 1."""
    shape = dataclasses.replace(micro.model, num_hidden_layers=12)
    model = Decoder(shape.model_config(16, 0, "float32"))
    tensors = {}
    for layer in sorted(range(12), key=str):
        shape_ED = (EXPERTS, 16)
        tensors[f"{layer}.first"] = torch.full(shape_ED, float(layer))
        tensors[f"{layer}.second"] = torch.zeros(shape_ED)
        tensors[f"{layer}.count"] = torch.tensor(layer)
    restored = Routers.restored(model, "learned", tensors).tensors()
    assert [int(restored[f"{layer}.count"]) for layer in range(12)] == list(range(12))
    assert all(bool((restored[f"{n}.first"] == n).all()) for n in range(12))


@pytest.mark.parametrize("every", [1, 8])
def test_learning_under_autocast_is_in_float32(model: Decoder, every: int) -> None:
    """The same masses and inputs teach the same, whatever precision the pass around them has."""
    build_experts(model, None, probe(), generator(2), warm_start=False)
    trace, start = trace_of(model, probe(5), every), routers_of(model)
    found = []
    for enabled in (False, True):
        for ffn, router in zip(model.ffns(), start, strict=True):
            ffn.router.copy_(router)
        routers = Routers(model, "learned")
        routers.clustered()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            routers.hear(trace)
        found.append(routers_of(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
