"""The engine on a CUDA device; `make test-gpu` runs these, `make test` does not collect them."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.engine import Engine
from engine.model import Decoder
from engine.request import ExpertPolicy, SamplingParams
from tests.engine.conftest import tiny_config, tiny_model, tiny_tokenizer
from tests.training.conftest import make_corpus
from training.config import ModelShape, SwitchConfig, TrainConfig
from training.trainer import Trainer

pytestmark = pytest.mark.gpu

POLICIES = [
    ExpertPolicy.dense(),
    ExpertPolicy.top_k(2),
    ExpertPolicy.top_k(5),
    ExpertPolicy.mass(0.6),
]


@pytest.fixture
def model() -> Decoder:
    return tiny_model(tiny_config()).requires_grad_(False).to("cuda")


def naive(model: Decoder, prompt: list[int], tokens: int, policy: ExpertPolicy) -> list[int]:
    """Greedy, the whole sequence anew for every token, through the plain products."""
    ids = list(prompt)
    for _ in range(tokens):
        logits = model.logits(torch.tensor([ids], device="cuda"), policy)
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_engine_equals_naive_generate_under_mixed_policies(model: Decoder) -> None:
    plain = copy.deepcopy(model)
    checkpoint = Checkpoint(Path("t"), model.config, model, tiny_tokenizer(), {}, "0" * 64)
    config = EngineConfig(device="cuda", block_size=4, max_num_batched_tokens=70)
    engine = Engine(checkpoint, config)
    sampling = SamplingParams(max_new_tokens=20, ignore_eos=True)
    prompts = [[1 + (7 * i + j) % 290 for j in range(3 + 5 * i % 41)] for i in range(16)]
    requests = [
        engine.make_request(prompt, sampling, POLICIES[i % 4]) for i, prompt in enumerate(prompts)
    ]
    output: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for event in engine.run(requests):
        assert event.token is not None
        output[event.request_id].append(event.token.token_id)
    for request, prompt in zip(requests, prompts, strict=True):
        expected = naive(plain, prompt, 20, request.policy)
        assert output[request.request_id] == expected, request.policy


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("length", [1, 9, 100])
def test_kernels_compute_the_plain_model_in_bfloat16(
    model: Decoder, policy: ExpertPolicy, length: int
) -> None:
    """Against float32 within the error that plain bfloat16 products have."""
    ids = torch.randint(0, 300, (1, length), device="cuda")
    exact = model.logits(ids, policy)
    plain = copy.deepcopy(model).to(torch.bfloat16)
    for ffn, original in zip(plain.ffns(), model.ffns(), strict=True):
        ffn.router.data = original.router.clone()
    kernels = copy.deepcopy(plain)
    kernels.prepare()

    def error(logits: torch.Tensor) -> float:
        return float((logits - exact).norm() / exact.norm())

    assert error(kernels.logits(ids, policy)) < max(0.05, 2 * error(plain.logits(ids, policy)))


def test_training_runs_on_the_device(tmp_path: Path) -> None:
    shape = ModelShape(300, 32, 64, 2, 4, 2, num_experts=8)
    switch = SwitchConfig(top_k=2, mixed_top_k=(1, 2, 4))
    config = TrainConfig(
        steps=20, batch_size=4, sequence_length=32, model=shape, switch=switch, valid_share=0.1
    )
    corpus = make_corpus(tmp_path / "corpus")
    path = Trainer(config, tmp_path / "run", [corpus], device="cuda").train()
    assert (path / "model.safetensors").exists()
    again = Trainer(dataclasses.replace(config), tmp_path / "run", [corpus], device="cuda")
    assert again.train() == path
