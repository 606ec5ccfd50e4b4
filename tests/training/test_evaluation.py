"""Perplexity by policy, against plain arithmetic."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from engine import checkpoint as checkpoints
from engine.model import Decoder
from engine.request import ExpertPolicy
from training.config import TrainConfig
from training.conversion import refresh_router
from training.errors import DataError
from training.evaluation import evaluate, evaluate_paths, quality_curve
from training.trainer import Trainer


@pytest.fixture
def model(micro: TrainConfig) -> Decoder:
    model = Decoder(micro.model.model_config(16, 0, "float32"))
    model.initialize(torch.Generator().manual_seed(0))
    for ffn in model.requires_grad_(False).ffns():
        refresh_router(ffn)
    return model


def test_perplexity_is_the_exponential_of_the_mean_loss(model: Decoder) -> None:
    ids = torch.randint(0, 300, (3, 17), generator=torch.Generator().manual_seed(1))
    batches = [(ids[:2, :-1], ids[:2, 1:]), (ids[2:, :-1], ids[2:, 1:])]
    result = evaluate(model, batches, ExpertPolicy.top_k(3))
    logprobs = model.logits(ids[:, :-1], ExpertPolicy.top_k(3)).log_softmax(-1)
    mean = -logprobs.gather(2, ids[:, 1:, None]).mean()
    assert result.perplexity == pytest.approx(math.exp(float(mean)), rel=1e-5)
    assert result.activated_ratio == pytest.approx(3 / 8)
    assert 3 / 8 < result.coverage < 1


def test_the_curve_has_every_share_and_recommends_the_sparsest_good_one(model: Decoder) -> None:
    ids = torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(1))
    curve = quality_curve(model, [(ids[:, :-1], ids[:, 1:])])
    assert sorted(curve.routed) == [1, 2, 4]
    assert curve.dense.coverage == 1.0
    for k, oracle in curve.oracle.items():
        assert oracle.coverage >= curve.routed[k].coverage - 1e-6
    assert curve.recommended(8, tolerance=10.0) == "top_k:1"
    assert curve.recommended(8, tolerance=-10.0) == "dense"


def test_a_checkpoint_is_evaluated_on_files_or_on_what_it_held_out(
    micro: TrainConfig, corpus: Path, tmp_path: Path
) -> None:
    path = Trainer(micro, tmp_path / "run", [corpus]).train()
    checkpoint = checkpoints.load(path, dtype="float32")
    curve = evaluate_paths(checkpoint, [corpus], 2000)
    assert math.isfinite(curve.dense.perplexity)
    with pytest.raises(DataError, match="give --data"):
        evaluate_paths(checkpoint, [], 2000)
