"""The activation study against plain loops, and the adjusted Rand index against known values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import ExpertConfig, ModelConfig
from engine.errors import ConfigError
from engine.model.decoder import Decoder
from engine.model.experts import ExpertLayout
from training.data.corpus import read_paths
from training.data.vocabulary import train_tokenizer
from training.errors import DataError
from training.experts.activation import ffn_inputs, observe
from training.experts.conversion import build_experts, permute_neurons, refresh_router
from training.experts.study import (
    ActivationStudy,
    LayerStudy,
    adjusted_rand_index,
    cofiring,
    study,
    text_probe,
)

E, S, K = 8, 6, 3


def make_model(activation: str = "relu") -> Decoder:
    config = ModelConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=E * S,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        experts=ExpertConfig(E, S),
        hidden_act=activation,
        initializer_range=0.3,
    )
    model = Decoder(config)
    model.initialize(torch.Generator().manual_seed(0))
    return model.requires_grad_(False)


@pytest.fixture
def probe() -> torch.Tensor:
    return torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(1))


def by_loops(model: Decoder, probe: torch.Tensor, layer: int) -> dict[str, Any]:
    """Every figure of the study the slow way, token by token and expert by expert."""
    ffn, x = model.ffns()[layer], ffn_inputs(model, probe)[layer]
    hidden = torch.relu(x @ ffn.up.T).double()
    hidden = hidden**2 if ffn.activation == "relu2" else hidden
    tokens = hidden.shape[0]
    mass = [[float(row[e * S : (e + 1) * S].sum()) for e in range(E)] for row in hidden]
    total = sum(map(sum, mass))
    scores = x @ ffn.router.T
    chosen = [sorted(range(E), key=lambda e: -float(row[e]))[:K] for row in scores]
    fires = (hidden > 0).tolist()
    within, between = [], []
    for i in range(E * S):
        on = [row for row in fires if row[i]]
        if on:
            rate = [sum(row[j] for row in on) / len(on) for j in range(E * S)]
            own = [rate[j] for j in range(E * S) if j // S == i // S and j != i]
            within.append(sum(own) / len(own))
            other = [rate[j] for j in range(E * S) if j // S != i // S]
            between.append(sum(other) / len(other))
    return {
        "active": sum(map(sum, fires)) / (tokens * E * S),
        "never": sum(not any(row[i] for row in fires) for i in range(E * S)) / (E * S),
        "oracle": sum(sum(sorted(row)[-K:]) for row in mass) / total,
        "1/8": sum(max(row) for row in mass) / total,
        "1/4": sum(sum(sorted(row)[-2:]) for row in mass) / total,
        "coverage": sum(mass[t][e] for t in range(tokens) for e in chosen[t]) / total,
        "load": [sum(e in c for c in chosen) / (tokens * K / E) for e in range(E)],
        "within": sum(within) / len(within),
        "between": sum(between) / len(between),
    }


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_a_study_is_what_plain_loops_count(activation: str, probe: torch.Tensor) -> None:
    model = make_model(activation)
    for ffn in model.ffns():
        ffn.up[5] = 0.0  # a neuron that never fires
        refresh_router(ffn)
    result = study(model, probe, K)
    assert (result.tokens, result.top_k, len(result.layers)) == (40, K, 2)
    for index, layer in enumerate(result.layers):
        expected = by_loops(model, probe, index)
        for name in ("active", "never", "oracle", "coverage", "within", "between"):
            assert getattr(layer, name) == pytest.approx(expected[name], abs=2e-6), name
        assert layer.never > 0.02
        assert layer.concentration[1:] == pytest.approx(
            [expected["1/8"], expected["1/4"]], abs=2e-6
        )
        assert layer.load == pytest.approx(expected["load"], abs=2e-6)
        assert layer.coverage is not None
        assert layer.coverage <= layer.oracle
        assert layer.active == pytest.approx(observe(model, probe).active_shares[index], abs=1e-6)


def test_before_any_clustering_there_is_no_routing_to_report(probe: torch.Tensor) -> None:
    for layer in study(make_model(), probe, K).layers:
        assert (layer.coverage, layer.load, layer.load_entropy) == (None, (), None)
        assert 0 < layer.oracle < 1


def test_a_layer_that_never_fires_has_finite_figures(probe: torch.Tensor) -> None:
    model = make_model()
    for ffn in model.ffns():
        refresh_router(ffn)
        ffn.up.zero_()
    layer = study(model, probe, K).layers[0]
    assert (layer.active, layer.never, layer.within, layer.cohesion) == (0, 1, 0, 1)
    assert (layer.oracle, layer.coverage) == (1, 1)


def test_all_experts_hold_all_the_mass_evenly(probe: torch.Tensor) -> None:
    model = make_model()
    for ffn in model.ffns():
        refresh_router(ffn)
    layer = study(model, probe, E).layers[0]
    assert (layer.oracle, layer.coverage, layer.dead_experts) == (1, 1, 0)
    assert layer.load == (1,) * E
    assert layer.load_entropy == pytest.approx(1)


def test_the_summary_of_a_load() -> None:
    layer = LayerStudy(0.1, 0, (0.1, 0.2, 0.3), 0.4, 0.3, (2, 2, 0, 0), 0.3, 0.1)
    assert layer.dead_experts == 2
    assert layer.load_entropy == pytest.approx(0.5)
    assert layer.cohesion == pytest.approx(3)


def test_neurons_that_fire_together_are_seen_only_where_they_share_an_expert() -> None:
    source = torch.Generator().manual_seed(0)
    groups_TE = (torch.rand(400, 4, generator=source) < 0.25).float()
    together_TF = groups_TE.repeat_interleave(5, dim=1)
    within, between = cofiring(together_TF, 4)
    assert within == pytest.approx(1)
    assert between == pytest.approx(0.25, abs=0.05)
    apart_TF = together_TF.view(-1, 4, 5).transpose(1, 2).reshape(400, 20)
    within, between = cofiring(apart_TF, 5)
    assert within == pytest.approx(0.25, abs=0.05)
    assert between > within


def test_single_neurons_and_a_single_expert_have_nobody_to_fire_with() -> None:
    active_TF = torch.ones(3, 4)
    assert cofiring(active_TF, 4) == (0, 1)
    assert cofiring(active_TF, 1) == (1, 0)


def test_clustering_raises_cohesion_of_planted_groups(probe: torch.Tensor) -> None:
    """Rows of `up` that are alike fire together; building experts must bring them together."""
    model = make_model()
    source = torch.Generator().manual_seed(2)
    for ffn in model.ffns():
        centres = torch.randn(E, 16, generator=source)
        rows = centres.repeat(S, 1) + 0.05 * torch.randn(E * S, 16, generator=source)
        ffn.up.copy_(rows)
        refresh_router(ffn)
    before = study(model, probe, K)
    build_experts(model, None, probe, torch.Generator().manual_seed(1), warm_start=False)
    after = study(model, probe, K)
    for old, new in zip(before.layers, after.layers, strict=True):
        assert new.active == pytest.approx(old.active, abs=1e-6)
        assert new.within > old.within + 0.2
        assert new.oracle > old.oracle


def test_a_permutation_of_whole_experts_changes_only_the_order_of_the_load(
    probe: torch.Tensor,
) -> None:
    model = make_model()
    for ffn in model.ffns():
        refresh_router(ffn)
    before = study(model, probe, K).layers[0]
    order = torch.arange(E * S).view(E, S).flip(0).flatten()
    permute_neurons(model.ffns()[0], ExpertLayout(order, E), None)
    refresh_router(model.ffns()[0])
    after = study(model, probe, K).layers[0]
    assert after.load == before.load[::-1]
    assert after.coverage == pytest.approx(before.coverage, abs=1e-5)


def test_a_study_survives_json(probe: torch.Tensor) -> None:
    model = make_model()
    first = study(model, probe, K)
    for ffn in model.ffns():
        refresh_router(ffn)
    for result in (first, study(model, probe, K)):
        text = json.dumps(result.to_dict(), allow_nan=False)
        assert ActivationStudy.from_dict(json.loads(text)) == result


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"colour": 1}, "unknown keys: colour"),
        ({"load": ["x"]}, "layer"),
        ({"concentration": {"1/16": 1.0}}, "1/8"),
        ({"active": None}, "layer"),
    ],
)
def test_a_damaged_study_is_refused(
    change: dict[str, Any], sentence: str, probe: torch.Tensor
) -> None:
    values = study(make_model(), probe, K).to_dict()
    values["layers"][0] |= change
    with pytest.raises(ConfigError, match=sentence):
        ActivationStudy.from_dict(values)


@pytest.mark.parametrize("k", [0, E + 1])
def test_k_out_of_range_is_refused(k: int, probe: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match="top_k must be between 1 and 8"):
        study(make_model(), probe, k)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([0, 0, 1, 1], [5, 5, 3, 3], 1.0),  # names do not matter
        ([0, 0, 1, 1], [0, 0, 1, 2], 4 / 7),
        ([0, 0, 1, 1], [0, 1, 0, 1], -0.5),
        ([0, 0, 0, 0], [0, 1, 2, 3], 0.0),
        ([0, 0, 0], [1, 1, 1], 1.0),
        ([0], [7], 1.0),
        # The 3 x 3 contingency table [[1, 1, 0], [1, 2, 1], [0, 0, 4]]: together 7, groups 13 and
        # 14 of 45 pairs, so (7 - 13*14/45) / ((13 + 14)/2 - 13*14/45).
        ([0, 0, 1, 1, 1, 1, 2, 2, 2, 2], [0, 1, 0, 1, 1, 2, 2, 2, 2, 2], 266 / 851),
    ],
)
def test_adjusted_rand_index(first: list[int], second: list[int], expected: float) -> None:
    assert adjusted_rand_index(first, second) == pytest.approx(expected, abs=1e-12)
    assert adjusted_rand_index(torch.tensor(second), torch.tensor(first)) == pytest.approx(expected)


def test_random_labelings_agree_by_chance_alone() -> None:
    source = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 8, (2, 4000), generator=source)
    assert abs(adjusted_rand_index(a, b)) < 0.01


def test_labelings_of_different_things_are_refused() -> None:
    with pytest.raises(ConfigError, match="got 2 and 3 labels"):
        adjusted_rand_index([0, 1], [0, 1, 1])


@pytest.mark.gpu
def test_cuda_counts_what_the_cpu_counts(probe: torch.Tensor) -> None:
    model = make_model()
    for ffn in model.ffns():
        refresh_router(ffn)
    here = study(model, probe, K)
    there = study(model.cuda(), probe.cuda(), K)
    for a, b in zip(here.layers, there.layers, strict=True):
        assert a.active == pytest.approx(b.active, abs=2e-3)
        assert a.load == pytest.approx(b.load, abs=0.1)
        assert a.within == pytest.approx(b.within, abs=5e-3)


def test_a_text_probe_is_fixed_and_of_the_size_asked_for(tmp_path: Path) -> None:
    for number in range(30):
        words = " ".join(f"word{i * number % 97}" for i in range(60))
        (tmp_path / f"{number}.txt").write_text(words)
    tokenizer = train_tokenizer((d.text for d in read_paths([tmp_path])), 300)
    probe_BL = text_probe(tokenizer, [tmp_path], length=16, tokens=64)
    assert probe_BL.shape == (4, 16)
    assert torch.equal(probe_BL, text_probe(tokenizer, [tmp_path], length=16, tokens=64))
    assert len({tuple(row) for row in probe_BL.tolist()}) == 4
    few_BL = text_probe(tokenizer, [tmp_path], length=2048, tokens=1 << 20)
    assert 1 <= few_BL.shape[0] < 8  # as many whole sequences as the text fills, none twice
    with pytest.raises(DataError, match="fewer than one sequence"):
        text_probe(tokenizer, [tmp_path / "0.txt"], length=2048)
