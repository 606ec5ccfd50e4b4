"""A small corpus and a training configuration that runs in seconds."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.model.decoder import Decoder
from training.config import ModelShape, SwitchConfig, TrainConfig
from training.data.vocabulary import train_tokenizer
from training.experts.conversion import refresh_router

WORDS = ["the", "cat", "dog", "sat", "on", "mat", "log", "and", "then", "ran", "under", "tree"]


def make_corpus(path: Path, documents: int = 30, words: int = 400) -> Path:
    """Folder of text files with enough structure for a loss to fall."""
    path.mkdir()
    source = random.Random(0)
    for number in range(documents):
        text = " ".join(source.choice(WORDS) for _ in range(words))
        (path / f"{number:03d}.txt").write_text(f"document {number}: {text}.\n", encoding="utf-8")
    return path


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
    tokenizer = train_tokenizer([" ".join(WORDS * 20)], 280)
    config = micro.model.model_config(64, tokenizer.eos_id, "float32")
    # logits far enough apart that rounding never decides
    model = Decoder(dataclasses.replace(config, initializer_range=0.3))
    model.initialize(torch.Generator().manual_seed(0))
    for ffn in model.requires_grad_(False).ffns():
        refresh_router(ffn)
    return Checkpoint(Path("tiny"), config, model.eval(), tokenizer, {}, "f" * 64)
