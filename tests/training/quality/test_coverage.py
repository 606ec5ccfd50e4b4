"""The comparison of groupings and routers: bounded by its oracle, and the model stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch

from engine.errors import ConfigError
from engine.model.decoder import Decoder
from engine.policy import ExpertPolicy
from training.config import TrainConfig
from training.data.batches import Batches
from training.experts.conversion import refresh_router
from training.quality.coverage import compare
from training.quality.evaluation import evaluate


def made(config: TrainConfig) -> tuple[Decoder, list[torch.Tensor], Batches]:
    """A model with planted experts in random order, tokens to fit on, and others."""
    model = Decoder(config.model.model_config(16, 0, "float32"))
    source = torch.Generator().manual_seed(0)
    model.initialize(source)
    for ffn in model.ffns():
        centres = torch.randn(8, 16, generator=source)
        rows = centres.repeat(4, 1) + 0.2 * torch.randn(32, 16, generator=source)
        ffn.up.data.copy_(rows)
        refresh_router(ffn)
    ids = torch.randint(0, 300, (40, 17), generator=source)
    return model, [ids[:32, :-1]], [(ids[32:, :-1], ids[32:, 1:])]


def test_the_comparison_is_bounded_by_its_oracle_and_sees_what_is_there(
    micro: TrainConfig,
) -> None:
    model, fit, held_out = made(micro)
    before = copy.deepcopy(model.state_dict())
    choices = compare(model, fit, held_out, (1, 2, 8), seed=0)
    table = {(c.grouping, c.router, c.k): c for c in choices}
    assert len(table) == len(choices) == 3 * (4 + 3 + 3)
    for (grouping, _, k), choice in table.items():
        assert 0 < choice.coverage <= table[grouping, "oracle", k].coverage + 1e-6
    dense = evaluate(model, held_out, ExpertPolicy.dense()).perplexity
    for choice in choices:
        if choice.k == 8:
            assert choice.coverage == pytest.approx(1.0, abs=1e-5)
            assert choice.perplexity == pytest.approx(dense, rel=1e-4)
    # the planted experts are found by their weights; groups without a reason cover less
    floor = table["random", "oracle", 2].coverage
    assert table["weights", "oracle", 2].coverage > floor + 0.1
    assert table["random", "fitted", 2].coverage > table["random", "centroid", 2].coverage
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_stored_router_is_the_checkpoints_own(micro: TrainConfig) -> None:
    model, fit, held_out = made(micro)
    for ffn in model.ffns():
        ffn.router.neg_()  # the worst of all routers
    table = {
        c.router: c.coverage for c in compare(model, fit, held_out, (2,), 0, groupings=["present"])
    }
    assert table["stored"] < table["centroid"] - 0.1


def test_unknown_groupings_and_impossible_k_are_refused(micro: TrainConfig) -> None:
    model, fit, held_out = made(micro)
    with pytest.raises(ConfigError, match="grouping must be one of present"):
        compare(model, fit, held_out, (1,), 0, groupings=["colour"])
    with pytest.raises(ConfigError, match="k must be between 1 and 8; got 9"):
        compare(model, fit, held_out, (9,), 0)
