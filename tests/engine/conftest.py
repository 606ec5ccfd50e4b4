"""A tiny random model with a tokenizer, and engines around it, for tests of the engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig, ExpertConfig, ModelConfig
from engine.model.decoder import Decoder
from engine.model.experts import centroid_router
from engine.serving.engine import Engine
from engine.serving.request import Request, TokenEvent
from engine.text.tokenizer import END_OF_TEXT, Tokenizer

VOCABULARY = 300
CORPUS = ["the cat sat on the mat and the dog sat on the log", "naïve café, größer: 東京 🙂"]

MakeEngine = Callable[..., Engine]


def tiny_config(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
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
    return ModelConfig(**{**values, **changes})  # type: ignore[arg-type]  # checked by ModelConfig


@torch.no_grad()
def tiny_model(config: ModelConfig) -> Decoder:
    """Random weights whose layers outweigh the tied embedding, so that output is not repetitive."""
    model = Decoder(config)
    model.initialize(torch.Generator().manual_seed(1))
    for name, parameter in model.named_parameters():
        if name.endswith(("attention.out.weight", "ffn.down")):
            parameter.mul_(4)
    for ffn in model.ffns():
        ffn.router.copy_(centroid_router(ffn.up, config.experts.num_experts, norm=2.0))
    return model.eval()


def tiny_tokenizer() -> Tokenizer:
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


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    """A random model of 2 layers, 8 experts, grouped-query attention; end of text is token 0."""
    torch.set_num_threads(2)
    config = tiny_config()
    return Checkpoint(Path("tiny"), config, tiny_model(config), tiny_tokenizer(), {}, "0" * 64)


@pytest.fixture(scope="session")
def reference(checkpoint: Checkpoint) -> Decoder:
    """The same weights, never prepared for inference: the oracle."""
    return tiny_model(checkpoint.config)


@pytest.fixture
def make_engine(checkpoint: Checkpoint) -> MakeEngine:
    """An engine over the tiny model; `blocks` bounds its KV cache."""

    def make(blocks: int = 0, **config: int) -> Engine:
        block_size = config.setdefault("block_size", 4)
        if blocks:
            # Two layers, keys and values, two heads of 8 floats of 4 bytes.
            config["kv_cache_bytes"] = blocks * block_size * 2 * 2 * 2 * 8 * 4
        return Engine(checkpoint, EngineConfig(**config))  # type: ignore[arg-type]  # ints alone

    return make


def serve(
    engine: Engine, arrivals: Iterable[tuple[int, Request]], aborts: dict[str, int] | None = None
) -> dict[str, list[TokenEvent]]:
    """Add each request before its step, abort by step; checks the engine after every step."""
    line = sorted(arrivals, key=lambda arrival: arrival[0])
    events: defaultdict[str, list[TokenEvent]] = defaultdict(list)
    step = 0
    while line or engine.has_work():
        while line and line[0][0] <= step:
            engine.add(line.pop(0)[1])
        for request_id, at in (aborts or {}).items():
            if at == step:
                engine.abort(request_id)
        for event in engine.step():
            events[event.request_id].append(event)
        engine.check_integrity()
        step += 1
        assert step < 5000, "no progress"
    assert engine.allocator.num_used == 0
    return events
