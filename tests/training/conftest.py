"""A small corpus, a tiny checkpoint and a training configuration that runs in seconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.model.decoder import Decoder
from tests.models import make_corpus, word_tokenizer
from training.config import ModelShape, SwitchConfig, TrainConfig
from training.experts.conversion import refresh_router


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return make_corpus(tmp_path / "corpus")


@pytest.fixture
def micro() -> TrainConfig:
    """Twenty steps of a model of two layers, through all phases."""
    torch.set_num_threads(1)  # nothing here is large enough for two
    return TrainConfig(
        preset="micro",
        steps=20,
        batch_size=2,
        sequence_length=16,
        seed=3,
        valid_share=0.1,
        validate_share=0.25,
        validate_tokens=64,
        model=ModelShape(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=8,
        ),
        switch=SwitchConfig(top_k=(2,), mixed_top_k=(1, 2, 4)),
    )


@pytest.fixture
def tiny(micro: TrainConfig) -> Checkpoint:
    """A random model with a context of 64 and a tokenizer that knows WORDS; end of text is 0."""
    tokenizer = word_tokenizer()
    config = micro.model.model_config(64, tokenizer.eos_id, "float32")
    # logits far enough apart that rounding never decides
    model = Decoder(dataclasses.replace(config, initializer_range=0.3))
    model.initialize(torch.Generator().manual_seed(0))
    for ffn in model.requires_grad_(False).ffns():
        refresh_router(ffn)
    return Checkpoint(Path("tiny"), config, model.eval(), tokenizer, {}, "f" * 64)
