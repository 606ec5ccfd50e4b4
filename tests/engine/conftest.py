"""A tiny random model with a tokenizer, and engines around it, for tests of the engine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.model.decoder import Decoder
from engine.serving.engine import Engine
from engine.serving.request import Request, TokenEvent
from tests.models import tiny_config, tiny_model, tiny_tokenizer

MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    """A random model of 2 layers, 8 experts, grouped-query attention; end of text is token 0."""
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
