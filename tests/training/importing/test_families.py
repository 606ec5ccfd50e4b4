"""Every family against transformers: logits, greedy text through the engine, sparse as dense."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.cpu import native
from engine.cpu.backend import CpuBackend
from engine.model.attention import causal_attend
from engine.model.decoder import Decoder
from engine.model.policy_batch import PolicyBatch
from engine.model.trace import Trace
from engine.policy import NO_MASS_LIMIT, ExpertPolicy
from engine.serving.engine import Engine
from engine.serving.request import SamplingParams
from tests.models import tiny_tokenizer
from tests.training.importing.models import (
    MAKERS,
    VOCABULARY,
    experts_for,
    make,
    read,
)
from training.importing.formats.reader import Source

DENSE = ExpertPolicy.dense()
KINDS = list(MAKERS)
GREEDY = SamplingParams(max_new_tokens=200, ignore_eos=True)


def random_ids(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_transformers_own(kind: str, seed: int, tmp_path: Path) -> None:
    """In float32; with all neurons in one expert, and in several, all chosen."""
    made = make(kind, seed, tmp_path)
    ids_BL = random_ids(seed, 2, 70)
    expected = made.logits(ids_BL)
    model = read(tmp_path)
    torch.testing.assert_close(model.logits(ids_BL, DENSE), expected, atol=1e-4, rtol=0)
    split = read(tmp_path, experts_for(model.config))
    found = every_expert(split, ids_BL)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def every_expert(model: Decoder, ids_BL: torch.Tensor) -> torch.Tensor:
    """Logits through the sparse path, with all experts chosen one by one."""
    (batch, length), experts = ids_BL.shape, model.config.experts.num_experts
    k_T = torch.full((batch * length,), experts, dtype=torch.int32)
    mass_T = torch.full((batch * length,), NO_MASS_LIMIT)
    policy = PolicyBatch(k_T, mass_T, experts, None, None)
    attend = causal_attend(batch, length, model.config.window)
    trace = Trace()
    positions_T = torch.arange(length).repeat(batch)
    logits_TV: torch.Tensor = model(ids_BL.flatten(), positions_T, attend, policy, trace)
    assert all(bool(chosen_TE.all()) for chosen_TE in trace.choices())
    return logits_TV.view(batch, length, -1)


def make_engine(model: Decoder, **config: int) -> Engine:
    shape = model.config
    checkpoint = Checkpoint(Path("tiny"), shape, copy.deepcopy(model), tiny_tokenizer(), {}, "0")
    return Engine(checkpoint, EngineConfig(**config))  # type: ignore[arg-type]  # ints


def generate(engine: Engine, prompts: list[list[int]], policy: ExpertPolicy) -> list[list[int]]:
    """Greedy continuations of all prompts, side by side."""
    requests = [engine.make_request(p, GREEDY, policy) for p in prompts]
    for request in requests:
        engine.add(request)
    while engine.has_work():
        engine.step()
        engine.check_integrity()
    return [r.token_ids[r.prompt_len :] for r in requests]


@pytest.mark.parametrize("wide", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_transformers_own(kind: str, wide: bool, tmp_path: Path) -> None:
    """200 tokens through the engine: prompts in chunks, side by side, and again from the cache."""
    if wide and not native.available():
        pytest.skip("needs a C compiler")
    made = make(kind, 5, tmp_path, wide=wide, strength=2.2)
    prompts = [random_ids(length, length).tolist() for length in (33, 5)]
    expected = [made.greedy(prompt, 200) for prompt in prompts]
    model = read(tmp_path)
    engine = make_engine(model, block_size=16, max_num_batched_tokens=9, max_num_seqs=4)
    assert isinstance(engine.runner.backend, CpuBackend) == wide
    assert generate(engine, prompts, DENSE) == expected
    assert generate(engine, prompts, DENSE) == expected
    assert engine.stats.snapshot().prefix_hit_tokens > 0
    assert len(set(expected[0] + expected[1])) > 8, "text that repeats itself proves little"


@pytest.mark.parametrize("wide", [True, False], ids=["kernels", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_is_the_naive_generate_when_sparse(
    kind: str, wide: bool, tmp_path: Path
) -> None:
    if wide and not native.available():
        pytest.skip("needs a C compiler")
    make(kind, 6, tmp_path, wide=wide, strength=2.2)
    model = read(tmp_path, experts_for(Source.open(tmp_path).model_config))
    engine = make_engine(model, block_size=16, max_num_batched_tokens=11, max_num_seqs=4)
    prompts = [random_ids(length, length).tolist() for length in (20, 3)]
    policy = ExpertPolicy.top_k(2)
    found = generate(engine, prompts, policy)
    for prompt, tokens in zip(prompts, found, strict=True):
        # One pass over the whole text: every token must be the likeliest after those before.
        ids_1L = torch.tensor([prompt + tokens])
        logits_LV = model.logits(ids_1L, policy)[0, len(prompt) - 1 : -1]
        gaps = logits_LV.max(1).values - logits_LV.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert float(gaps.max()) < 1e-4


def test_the_kernels_give_a_token_the_same_bits_in_any_company(tmp_path: Path) -> None:
    """Windows, biases and gates keep batch invariance."""
    if not native.available():
        pytest.skip("needs a C compiler")
    for kind in ("opt", "relu-mistral", "nemotron-biases"):
        make(kind, 7, tmp_path / kind, wide=True)
        model = read(tmp_path / kind, 8)
        prompts = [random_ids(length, length).tolist() for length in (40, 3, 17)]
        together = generate(
            make_engine(model, max_num_batched_tokens=8, max_num_seqs=4),
            prompts,
            ExpertPolicy.top_k(3),
        )
        for prompt, tokens in zip(prompts, together, strict=True):
            alone = generate(make_engine(model), [prompt], ExpertPolicy.top_k(3))
            assert alone == [tokens]
