"""Which neuron is which between two models: permuted, continued, and unrelated ones."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch

from engine.config import ExpertConfig, ModelConfig
from engine.errors import ConfigError
from engine.model.decoder import Decoder
from engine.model.experts import ExpertLayout
from training.experts import correspondence
from training.experts.activation import observe, similarity
from training.experts.conversion import permute_neurons
from training.experts.correspondence import compare, partners

E, S = 8, 8
CONFIG = ModelConfig(
    vocab_size=60,
    hidden_size=64,
    intermediate_size=E * S,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
    experts=ExpertConfig(E, S),
    initializer_range=0.3,
)


def make_model(seed: int = 0, config: ModelConfig = CONFIG) -> Decoder:
    model = Decoder(config)
    model.initialize(torch.Generator().manual_seed(seed))
    return model.requires_grad_(False)


@pytest.fixture
def probe() -> torch.Tensor:
    return torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(1))


def shuffled(model: Decoder, seed: int) -> tuple[Decoder, list[torch.Tensor]]:
    """The same function with the neurons of every layer in another order, and the orders."""
    other = copy.deepcopy(model)
    source = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(E * S, generator=source) for _ in model.ffns()]
    for ffn, order in zip(other.ffns(), orders, strict=True):
        permute_neurons(ffn, ExpertLayout(order, E), None)
    return other, orders


@pytest.mark.parametrize("chunk", [2048, 24, 1])
def test_neurons_that_only_moved_are_all_found(
    chunk: int, probe: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correspondence, "_CHUNK", chunk)
    model = make_model()
    other, orders = shuffled(model, 3)
    for a, b, order in zip(model.ffns(), other.ffns(), orders, strict=True):
        assert partners(a, b).tolist() == order.argsort().tolist()
    for layer in compare(model, other, probe):
        assert (layer.matched, layer.similarity) == (1, 1)
        assert layer.adjusted_rand == pytest.approx(0, abs=0.1)  # a random clustering
        assert layer.active[0] == pytest.approx(layer.active[1], abs=1e-3)
        assert layer.correlation == pytest.approx(1, abs=1e-3)


def test_a_continued_model_is_compared_neuron_by_neuron(probe: torch.Tensor) -> None:
    model = make_model()
    later = copy.deepcopy(model)
    source = torch.Generator().manual_seed(5)
    for parameter in later.parameters():
        parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape, generator=source))
    expected = similarity(observe(model, probe), observe(later, probe))
    moved, _ = shuffled(later, 4)
    layers = compare(model, moved, probe)
    found = [layer.similarity for layer in layers if layer.similarity is not None]
    assert [layer.matched for layer in layers] == [1, 1]
    assert sum(found) / 2 == pytest.approx(expected, abs=1e-6)
    assert 0.7 < expected < 0.999


def test_whole_experts_that_only_moved_are_the_same_clustering(probe: torch.Tensor) -> None:
    model = make_model()
    other = copy.deepcopy(model)
    order = torch.arange(E * S).view(E, S).flip(0, 1).flatten()
    for ffn in other.ffns():
        permute_neurons(ffn, ExpertLayout(order, E), None)
    assert [layer.adjusted_rand for layer in compare(model, other, probe)] == [1, 1]


def test_models_started_apart_share_no_neurons_and_get_no_similarity(probe: torch.Tensor) -> None:
    for layer in compare(make_model(0), make_model(1), probe):
        assert layer.matched < 0.1
        assert (layer.similarity, layer.adjusted_rand) == (None, None)
        assert layer.correlation is not None
        assert abs(layer.correlation) < 1
        json.dumps(layer.to_dict(), allow_nan=False)


def test_half_of_the_neurons_are_enough_and_fewer_are_not(probe: torch.Tensor) -> None:
    model = make_model()
    fresh = make_model(1).ffns()
    for replaced, comparable in ((E * S // 2, True), (E * S // 2 + 1, False)):
        other = copy.deepcopy(model)
        for ffn, new in zip(other.ffns(), fresh, strict=True):
            ffn.up[:replaced], ffn.down[:replaced] = new.up[:replaced], new.down[:replaced]
        layer = compare(model, other, probe)[0]
        assert layer.matched == 1 - replaced / (E * S)
        assert (layer.similarity is not None) is comparable


def test_neurons_without_weights_have_no_partner() -> None:
    model = make_model()
    model.ffns()[0].up[3] = 0
    model.ffns()[0].down[3] = 0
    assert partners(model.ffns()[0], model.ffns()[0])[3] == -1


def test_other_widths_leave_only_the_shares_of_active_neurons(probe: torch.Tensor) -> None:
    wider = dataclasses.replace(
        CONFIG, hidden_size=32, intermediate_size=2 * E * S, experts=ExpertConfig(E, 2 * S)
    )
    layer = compare(make_model(), make_model(0, wider), probe)[0]
    assert (layer.matched, layer.similarity) == (0, None)
    assert 0 < layer.active[1] < 1


def test_a_layer_that_never_fires_has_no_correlation(probe: torch.Tensor) -> None:
    model, silent = make_model(), make_model()
    for ffn in silent.ffns():
        ffn.up.zero_()
    assert compare(model, silent, probe)[0].correlation is None


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"vocab_size": 61}])
def test_models_of_another_shape_are_refused(change: dict[str, int], probe: torch.Tensor) -> None:
    other = make_model(0, dataclasses.replace(CONFIG, **change))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"{next(iter(change))} must be the same"):
        compare(make_model(), other, probe)
