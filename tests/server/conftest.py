"""Real servers on the loopback interface, around a real engine with a tiny random model."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
import torch
import uvicorn
from fastapi import FastAPI
from tokenizers import decoders, models, pre_tokenizers, processors

from engine import checkpoint as checkpoints
from engine.config import ExpertConfig, ModelConfig, QualityPoint
from engine.model.decoder import Decoder
from engine.model.experts import centroid_router
from engine.serving.engine import Engine
from engine.serving.worker import Worker
from engine.text.tokenizer import END_OF_TEXT, Tokenizer
from server.app import create_app
from server.fleet import make_worker
from server.generation import Frontend
from server.serve import CLOSE_SECONDS, KEEP_ALIVE_SECONDS, listen
from server.settings import Settings
from server.tracing import Tracing

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
CONFIG = ModelConfig(
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


def byte_tokenizer() -> Tokenizer:
    """One token a byte after the end of text, so that token counts are plain in tests."""
    vocabulary = {END_OF_TEXT: 0} | {char: i for i, char in enumerate(BYTES, start=1)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.add_special_tokens([END_OF_TEXT])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def foreign_tokenizer() -> Tokenizer:
    """The same, with the special tokens of Llama's, which puts one of them in front of a text."""
    words = ["<unk>", "<s>", "</s>"]
    vocabulary = {word: i for i, word in enumerate([*words, *BYTES])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.add_special_tokens(words)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return Tokenizer(backend, eos_id=2, bos_id=1)


def random_model(config: ModelConfig = CONFIG) -> Decoder:
    """A model that never ends a text by itself when it is greedy: that logit is always 0."""
    model = Decoder(config)
    model.initialize(torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.embedding.weight[config.eos_token_id] = 0.0
        for ffn in model.ffns():
            ffn.router.copy_(centroid_router(ffn.up, config.experts.num_experts, norm=2.0))
    return model.eval()


@dataclass
class Served:
    """A server that listens, from outside."""

    url: str
    http: httpx.Client

    def post(self, path: str, inputs: Any = "hello", **parameters: Any) -> httpx.Response:
        return self.http.post(path, json={"inputs": inputs, "parameters": parameters})

    def generate(self, inputs: str = "hello", **parameters: Any) -> dict[str, Any]:
        response = self.post("/generate", inputs, **parameters)
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, inputs: str = "hello", **parameters: Any) -> list[dict[str, Any]]:
        response = self.post("/generate_stream", inputs, **parameters)
        assert response.status_code == 200, response.text
        return read_events(response.text)

    def metrics(self) -> dict[str, float]:
        """Samples by name and labels as they are written: `name{layer="0"}`."""
        lines = self.http.get("/metrics").text.splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name: float(value) for name, value in pairs}

    # What a test of clients does to a server; the one that runs on Ray has its own ways.

    def active(self) -> int:
        """Generation requests in the server."""
        raise NotImplementedError

    def fail_steps(self, after: int = 0) -> None:
        """Let steps raise "boom" once a running request has `after` output tokens."""
        raise NotImplementedError

    def refuse_requests(self) -> None:
        """As a server does that is about to stop."""
        raise NotImplementedError

    def wait_until_idle(self) -> None:
        wait_for(lambda: self.active() == 0)


@dataclass
class Live(Served):
    """A server in this process, and its insides."""

    app: FastAPI
    engine: Engine
    worker: Worker

    @property
    def frontend(self) -> Frontend:
        return self.app.state.frontend

    def active(self) -> int:
        return self.frontend.active

    def fail_steps(self, after: int = 0) -> None:
        fail_steps(self.engine, after)

    def refuse_requests(self) -> None:
        self.frontend.fleet.draining = True

    def wait_until_idle(self) -> None:
        wait_for(lambda: self.frontend.active == 0 and not self.engine.has_work())


def read_events(text: str) -> list[dict[str, Any]]:
    """The payloads of an event stream; asserts its framing."""
    assert text.endswith("\n\n")
    frames = text.removesuffix("\n\n").split("\n\n")
    assert all(f.startswith("data: ") and "\n" not in f for f in frames)
    return [json.loads(f.removeprefix("data: ")) for f in frames]


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


def slow_down(engine: Engine, seconds: float) -> None:
    """Let each step take at least so long, as a large model's would."""
    step = engine.step

    def slow_step() -> Any:
        time.sleep(seconds)
        return step()

    engine.step = slow_step  # type: ignore[method-assign]


def fail_steps(engine: Engine, after: int) -> None:
    """Let steps raise once a running request has `after` output tokens."""
    step = engine.step

    def failing_step() -> Any:
        if any(request.num_output >= after for request in engine.scheduler.running):
            raise RuntimeError("boom")
        return step()

    engine.step = failing_step  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(2)
    path = tmp_path_factory.mktemp("model") / "tiny"
    checkpoints.save(path, random_model(), byte_tokenizer(), {"steps": 0})
    return path


@pytest.fixture(scope="session")
def foreign_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer as imported ones have it."""
    tokenizer = foreign_tokenizer()
    config = dataclasses.replace(
        CONFIG, vocab_size=tokenizer.vocab_size, bos_token_id=1, eos_token_id=2
    )
    path = tmp_path_factory.mktemp("model") / "foreign"
    checkpoints.save(path, random_model(config), tokenizer, {"steps": 0})
    return path


Serve = Callable[..., AbstractContextManager[Live]]


@pytest.fixture(scope="session")
def serve(checkpoint_dir: Path) -> Iterator[Serve]:
    """Start a server: `with serve(step_seconds=0.01, max_waiting=1) as live`.

    With AMBIDEX_TEST_RAY it runs on a Ray cluster of this machine, as `make test-ray` has it. What
    it gives then is `Served`: enough for the tests of clients.
    """
    if os.environ.get("AMBIDEX_TEST_RAY"):
        from tests.deploy.ray.cluster import running

        with running(checkpoint_dir) as start_on_ray:
            yield start_on_ray
        return

    @contextmanager
    def start(
        step_seconds: float = 0.0, tracing: Tracing | None = None, **values: Any
    ) -> Iterator[Live]:
        settings = Settings(**{"model": checkpoint_dir, "kv_cache_bytes": 8 << 20, **values})
        engine = Engine.load(settings.model, settings.engine_config())
        if step_seconds:
            slow_down(engine, step_seconds)
        worker = make_worker(engine, settings)
        app = create_app(worker, settings, tracing)
        with listening(app) as url, httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
            yield Live(url, http, app, engine, worker)

    yield start


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """Run uvicorn in a thread on a free port; yields the URL."""
    listener = listen(Settings(port=0))
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=CLOSE_SECONDS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_for(lambda: server.started or not thread.is_alive())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def live(serve: Serve) -> Iterator[Live]:
    """A server that all tests share which leave it as it was; on Ray it has two replicas."""
    on_ray = {"replicas": 2} if os.environ.get("AMBIDEX_TEST_RAY") else {}
    with serve(**on_ray) as live:
        yield live
