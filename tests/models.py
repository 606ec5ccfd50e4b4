"""Tiny random models and tokenizers that tests of all packages share: milliseconds to make.

`tiny_*` is for tests of the engine: a trained tokenizer, a short context. `served_*` is for tests
of the server: one token a byte, so that token counts are plain, and a long context.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Final

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from engine.config import ExpertConfig, ModelConfig, QualityPoint
from engine.model.decoder import Decoder
from engine.model.experts import centroid_router
from engine.text.tokenizer import END_OF_TEXT, Tokenizer
from training.data.vocabulary import train_tokenizer

VOCABULARY: Final = 300
CORPUS: Final = (
    "the cat sat on the mat and the dog sat on the log",
    "naïve café, größer: 東京 🙂",
)
WORDS: Final = [
    "the",
    "cat",
    "dog",
    "sat",
    "on",
    "mat",
    "log",
    "and",
    "then",
    "ran",
    "under",
    "tree",
]
BYTES: Final = sorted(pre_tokenizers.ByteLevel.alphabet())

SERVED_CONFIG: Final = ModelConfig(
    vocab_size=1 + len(BYTES),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    initializer_range=0.3,
    experts=ExpertConfig(
        num_experts=8,
        expert_size=8,
        default_policy="top_k:4",
        quality=(QualityPoint(top_k=4, share=0.5, perplexity=20.0, relative=0.01),),
    ),
)


def tiny_config(**changes: Any) -> ModelConfig:
    """Two layers of 8 experts, grouped-query attention, a context of 128."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "experts": ExpertConfig(num_experts=8, expert_size=8, default_policy="top_k:4"),
        "initializer_range": 0.3,  # logits far enough apart that rounding never decides
    }
    return ModelConfig(**{**values, **changes})


@torch.no_grad()
def tiny_model(config: ModelConfig) -> Decoder:
    """Random weights whose layers outweigh the tied embedding, so that output is not repetitive."""
    model = Decoder(config)
    model.initialize(torch.Generator().manual_seed(1))
    for name, parameter in model.named_parameters():
        if name.endswith(("attention.out.weight", "ffn.down")):
            parameter.mul_(4)
    route_by_centroids(model)
    return model.eval()


@torch.no_grad()
def served_model(config: ModelConfig = SERVED_CONFIG) -> Decoder:
    """A model that never ends a text by itself when it is greedy: that logit is always 0."""
    model = Decoder(config)
    model.initialize(torch.Generator().manual_seed(3))
    model.embedding.weight[config.eos_token_id] = 0.0
    route_by_centroids(model)
    return model.eval()


def route_by_centroids(model: Decoder) -> None:
    """Give every layer the router that a checkpoint has: the experts' centroids."""
    for ffn in model.ffns():
        ffn.router.copy_(centroid_router(ffn.up, model.config.experts.num_experts, norm=2.0))


def tiny_tokenizer() -> Tokenizer:
    """Trained on CORPUS; the end of text is token 0."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    return Tokenizer(backend)


def byte_tokenizer() -> Tokenizer:
    """One token a byte after the end of text, so that token counts are plain in tests."""
    return Tokenizer(_byte_level([END_OF_TEXT]))


def foreign_tokenizer() -> Tokenizer:
    """The same, with the special tokens of Llama's, which puts one of them in front of a text."""
    backend = _byte_level(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return Tokenizer(backend, eos_id=2, bos_id=1)


def _byte_level(special: list[str]) -> tokenizers.Tokenizer:
    vocabulary = {token: i for i, token in enumerate([*special, *BYTES])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.add_special_tokens(special)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def word_tokenizer() -> Tokenizer:
    """As training makes one, of text that consists of WORDS; the end of text is token 0."""
    return train_tokenizer([" ".join(WORDS * 20)], 280)


def make_corpus(path: Path, documents: int = 30, words: int = 400) -> Path:
    """Folder of text files with enough structure for a loss to fall."""
    path.mkdir()
    source = random.Random(0)
    for number in range(documents):
        text = " ".join(source.choice(WORDS) for _ in range(words))
        (path / f"{number:03d}.txt").write_text(f"document {number}: {text}.\n", encoding="utf-8")
    return path
