"""The random models are no degenerate ones, and the bytes of a step are those of their tensors."""

from __future__ import annotations

import pytest
import torch

from benchmarks import models
from benchmarks.load import random_prompts
from engine.checkpoint import Checkpoint
from engine.errors import ConfigError
from engine.policy import ExpertPolicy
from engine.serving.engine import Engine
from engine.serving.request import SamplingParams

CONFIG = models.model_config(models.SHAPES["tiny"], 32, torch.bfloat16)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return models.random_checkpoint(CONFIG)


def test_no_weights_are_zero_and_no_rows_repeat(checkpoint: Checkpoint) -> None:
    for name, tensor in checkpoint.model.state_dict().items():
        assert float((tensor == 0).float().mean()) < 1e-2, name
        if tensor.dim() == 2:
            assert tensor.unique(dim=0).shape == tensor.shape, name
            assert float(tensor.float().std()) > 0.01, name


def test_another_number_of_experts_shares_the_weights(checkpoint: Checkpoint) -> None:
    config = models.model_config(models.SHAPES["tiny"], 64, torch.bfloat16)
    other = models.random_checkpoint(config, weights_of=checkpoint)
    ours, theirs = checkpoint.model.state_dict(), other.model.state_dict()
    shared = {name for name in ours if ours[name].data_ptr() == theirs[name].data_ptr()}
    assert set(ours) - shared == {f"layers.{i}.ffn.router" for i in range(2)}
    assert theirs["layers.0.ffn.router"].shape == (64, 64)


def test_greedy_output_goes_on_and_can_be_read(checkpoint: Checkpoint) -> None:
    engine = Engine(checkpoint, models.engine_config(CONFIG, 1024, 0))
    prompts: list[str | list[int]] = [*random_prompts(2, 16, CONFIG.vocab_size, seed=0)]
    results = engine.generate(
        prompts, SamplingParams(max_new_tokens=32, ignore_eos=True), ExpertPolicy.top_k(6)
    )
    for result in results:
        assert len(set(result.token_ids)) > 8
        assert "word" in result.text
    assert results[0].token_ids != results[1].token_ids


def test_the_engine_server_reports_each_token_once(checkpoint: Checkpoint) -> None:
    engine = Engine(checkpoint, models.engine_config(CONFIG, 1024, 0))
    server = models.EngineServer(engine, ExpertPolicy.dense())
    server.add("a", [5, 6, 7], 3)
    server.add("b", [8, 9], 2)
    tokens: list[str] = []
    while server.busy:
        tokens += server.step()
    assert sorted(tokens) == ["a"] * 3 + ["b"] * 2


def test_a_dense_step_reads_every_matrix_once(checkpoint: Checkpoint) -> None:
    weights = checkpoint.model.state_dict()
    matrices = sum(t.nbytes for name, t in weights.items() if t.dim() == 2 and "router" not in name)
    routers = sum(t.nbytes for name, t in weights.items() if "router" in name)
    everything = CONFIG.num_hidden_layers * CONFIG.experts.num_experts
    dense = models.step_bytes(CONFIG, everything, 0, sparse=False)
    assert dense.total == matrices
    sparse = models.step_bytes(CONFIG, everything / 4, 0, sparse=True)
    assert sparse.total == matrices - dense.experts * 3 // 4 + routers
    # Two layers, keys and values, 64 numbers of 2 bytes.
    with_context = models.step_bytes(CONFIG, everything, 10, sparse=False)
    assert with_context.total - dense.total == 10 * 2 * 2 * 64 * 2


def test_the_limit_is_reached_when_time_is_bytes_over_bandwidth() -> None:
    assert models.limit_share(40e6, 20e9, 2.0) == pytest.approx(1.0)
    assert models.limit_share(40e6, 20e9, 8.0) == pytest.approx(0.25)


def test_the_cache_holds_the_tokens_asked_for() -> None:
    config = models.engine_config(CONFIG, 1000, threads=1)
    assert config.kv_cache_bytes == 1000 * models.kv_token_bytes(CONFIG)
    assert config.num_threads == 1


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"shape must be one of opt-125m, opt-1\.3b, tiny"):
        models.shape_named("opt")
    with pytest.raises(ConfigError, match="experts must be one of 32, 64; got '33'"):
        models.chosen_of(33)
