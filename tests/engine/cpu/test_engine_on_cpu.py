"""The engine on the CPU's kernels: the naive `generate`'s tokens, and bits that nothing changes."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig, ExpertConfig
from engine.cpu import build, native
from engine.cpu.attention import NativeAttend
from engine.model.attention import SequenceSpan
from engine.model.decoder import Decoder, generate
from engine.model.policy_batch import PolicyBatch
from engine.model.trace import Trace
from engine.policy import ExpertPolicy
from engine.serving.engine import Engine
from engine.serving.request import Request, SamplingParams
from tests.engine.conftest import tiny_config, tiny_model, tiny_tokenizer

POLICIES = [
    ExpertPolicy.dense(),
    ExpertPolicy.top_k(1),
    ExpertPolicy.top_k(3),
    ExpertPolicy.mass(0.5),
    ExpertPolicy.mass(0.9),
]
needs_kernels = pytest.mark.skipif(not native.available(), reason="needs a C compiler")


def wide_model(dtype: torch.dtype = torch.float32, heads: int = 4, **changes: Any) -> Decoder:
    """A model of the kernels' shape: 4 heads of 32, of which 2 hold keys and values."""
    config = tiny_config(
        hidden_size=128,
        intermediate_size=8 * 24,
        num_attention_heads=heads,
        experts=ExpertConfig(num_experts=8, expert_size=24, default_policy="top_k:4"),
        initializer_range=0.15,
        **changes,
    )
    model = tiny_model(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def wide_checkpoint(model: Decoder) -> Checkpoint:
    return Checkpoint(
        Path("wide"), model.config, copy.deepcopy(model), tiny_tokenizer(), {}, "0" * 64
    )


def make_engine(model: Decoder, blocks: int = 0, **config: int) -> Engine:
    """An engine over a copy of `model`; `blocks` bounds its KV cache."""
    size, shape = config.setdefault("block_size", 16), model.config
    if blocks:
        each = shape.num_hidden_layers * 2 * shape.num_key_value_heads * shape.head_dim
        config["kv_cache_bytes"] = blocks * size * each * model.embedding.weight.element_size()
    return Engine(wide_checkpoint(model), EngineConfig(**config))  # type: ignore[arg-type]  # ints


def prompt(chance: random.Random, length: int) -> list[int]:
    return [chance.randrange(1, 300) for _ in range(length)]


def serve(engine: Engine, arrivals: list[tuple[int, Request]]) -> dict[str, list[float]]:
    """Run all, each request from its step on; the log-probabilities of each one's tokens."""
    logprobs: dict[str, list[float]] = {r.request_id: [] for _, r in arrivals}
    line, step = sorted(arrivals, key=lambda arrival: arrival[0]), 0
    while line or engine.has_work():
        while line and line[0][0] <= step:
            engine.add(line.pop(0)[1])
        for event in engine.step():
            if event.token is not None:
                logprobs[event.request_id].append(event.token.logprob)
        engine.check_integrity()
        step += 1
        assert step < 5000, "no progress"
    return logprobs


# --- whole layers in one call ---------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("multiplier", [1.0, 0.7])
@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize(
    "policies",
    [POLICIES[:1], POLICIES[1:], POLICIES, [ExpertPolicy.shared(4), POLICIES[2]]],
    ids=["dense", "sparse", "mixed", "shared"],
)
@torch.inference_mode()
def test_one_call_computes_what_the_layers_do(
    policies: list[ExpertPolicy],
    dtype: torch.dtype,
    multiplier: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit: logits, choices and what is left in the cache, over chunks and single rows."""
    model = wide_model(dtype, residual_multiplier=multiplier).requires_grad_(False)
    model.prepare()
    found = []
    for whole in (True, False):
        if not whole:
            monkeypatch.setattr(Decoder, "_runs_whole", lambda *_: False)
        cache = native.PagedCache(2, 64 * len(policies), 2, 32, dtype)
        logits, chosen = [], []
        for start, length in ((0, 17), (17, 1), (18, 5)):
            spans = [
                SequenceSpan(i * length, length, start + length, list(range(4 * i, 4 * i + 4)))
                for i in range(len(policies))
            ]
            ids = torch.arange(length * len(policies)) % 299 + 1
            positions = torch.arange(start, start + length).repeat(len(policies))
            batch = PolicyBatch.build([(policy, length) for policy in policies], 8)
            trace, rows = Trace(), torch.tensor([0, len(ids) - 1])
            attend = NativeAttend(cache, 16, spans)
            logits.append(model(ids, positions, attend, batch, trace, rows))
            chosen.append(trace.counts())
        found.append((logits, chosen, cache.keys, cache.values))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


@needs_kernels
@pytest.mark.parametrize("dtype", native.DTYPES)
def test_sampled_steps_change_no_bit(dtype: torch.dtype) -> None:
    """They run layer by layer, also in a model with a residual multiplier."""
    model = wide_model(dtype, residual_multiplier=0.7)

    def output(sample_every: int) -> tuple[list[int], list[float]]:
        engine = make_engine(model, sample_every=sample_every)
        sampling = SamplingParams(max_new_tokens=40, ignore_eos=True)
        request = engine.make_request(prompt(random.Random(5), 37), sampling, POLICIES[2])
        logprobs = serve(engine, [(0, request)])[request.request_id]
        return request.output_ids, logprobs

    assert output(1) == output(0)


# --- equal to the naive generate ------------------------------------------------------------------


def check_against_generate(engine: Engine, oracle: Decoder) -> list[Request]:
    """32 requests of every policy, some with a common beginning, arriving at different steps."""
    chance = random.Random(7)
    common = prompt(chance, 40)
    arrivals = [
        (
            chance.randrange(25),
            engine.make_request(
                common[: 40 * (number % 3 == 0)]
                + prompt(chance, chance.choice([1, 2, 16, 17, 30])),
                SamplingParams(max_new_tokens=chance.randrange(1, 50)),
                POLICIES[number % len(POLICIES)],
            ),
        )
        for number in range(32)
    ]
    serve(engine, arrivals)
    for _, request in arrivals:
        expected = generate(
            oracle, request.prompt_ids, request.sampling.max_new_tokens, request.policy
        )
        assert request.output_ids == expected
    return [request for _, request in arrivals]


@needs_kernels
@pytest.mark.parametrize(
    ("blocks", "config"),
    [
        (0, {"max_num_batched_tokens": 512, "block_size": 32}),
        (60, {"max_num_batched_tokens": 13, "max_num_seqs": 8}),
        (10, {"max_num_batched_tokens": 64, "max_num_seqs": 32}),
        (0, {"block_size": 4}),
    ],
    ids=["roomy", "small chunks", "preempting", "blocks that are none of the kernels'"],
)
def test_equals_the_naive_generate(blocks: int, config: dict[str, int]) -> None:
    oracle = wide_model()
    engine = make_engine(oracle, blocks, **config)
    natively = isinstance(engine.runner.cache, native.PagedCache)
    assert natively == (engine.config.block_size % native.KV_BLOCK == 0)
    requests = check_against_generate(engine, oracle)
    preempted = sum(request.preemptions for request in requests)
    assert (preempted > 0) == (blocks == 10)
    assert engine.stats.snapshot().prefix_hit_tokens > 0


@pytest.fixture
def _no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AMBIDEX_NATIVE", "0")
    build.library.cache_clear()
    yield
    monkeypatch.undo()
    build.library.cache_clear()


@pytest.mark.usefixtures("_no_kernels")
def test_the_same_tokens_without_the_kernels() -> None:
    oracle = wide_model()
    engine = make_engine(oracle)
    assert not isinstance(engine.runner.cache, native.PagedCache)
    check_against_generate(engine, oracle)
    assert engine.runner.model.embedding.weight.numel() > 0


def test_the_same_tokens_on_a_shape_that_they_do_not_support() -> None:
    oracle = wide_model(heads=16)
    assert oracle.config.head_dim == 8
    engine = make_engine(oracle)
    assert not isinstance(engine.runner.cache, native.PagedCache)
    check_against_generate(engine, oracle)


# --- bits that nothing changes --------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("dtype", native.DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("policy", [ExpertPolicy.dense(), ExpertPolicy.top_k(3), POLICIES[-1]])
def test_output_is_the_same_bits_in_any_company(dtype: torch.dtype, policy: ExpertPolicy) -> None:
    """Alone, in company, cut into other chunks, after preemption, with other threads."""
    model = wide_model(dtype)

    def output(company: int, blocks: int = 0, **config: int) -> tuple[list[int], list[float], int]:
        chance = random.Random(5)
        engine = make_engine(model, blocks, **config)
        sampling = SamplingParams(max_new_tokens=40, ignore_eos=True)
        watched = engine.make_request(prompt(chance, 37), sampling, policy)
        others = [
            (
                chance.randrange(3),
                engine.make_request(
                    prompt(chance, chance.randrange(1, 17 if blocks else 50)),
                    sampling,
                    POLICIES[number % 5],
                ),
            )
            for number in range(company)
        ]
        logprobs = serve(engine, [*others, (3, watched)])[watched.request_id]
        return watched.output_ids, logprobs, watched.preemptions

    alone = output(0)
    assert len(alone[0]) == len(alone[1]) == 40
    assert output(0, max_num_batched_tokens=7, max_num_seqs=4) == alone
    assert output(24) == alone
    assert output(11, max_num_batched_tokens=19, max_num_seqs=12) == alone
    *pressed, preemptions = output(3, blocks=11)
    assert preemptions > 0
    assert tuple(pressed) == alone[:2]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert output(3) == alone
    finally:
        torch.set_num_threads(threads)


@needs_kernels
@pytest.mark.parametrize("dtype", native.DTYPES, ids=["float32", "bfloat16"])
def test_a_lone_shared_request_is_top_k_bit_for_bit(dtype: torch.dtype) -> None:
    """Also after its prompt was computed in chunks and in company that does not decode with it."""
    model, chance = wide_model(dtype), random.Random(5)
    ids, sampling = prompt(chance, 37), SamplingParams(max_new_tokens=40, ignore_eos=True)

    def output(policy: ExpertPolicy, **config: int) -> tuple[list[int], list[float], int]:
        engine = make_engine(model, **config)
        request = engine.make_request(ids, sampling, policy)
        logprobs = serve(engine, [(0, request)])[request.request_id]
        return request.output_ids, logprobs, request.experts_activated

    own = output(ExpertPolicy.top_k(3))
    assert output(ExpertPolicy.shared(3)) == own
    assert output(ExpertPolicy.shared(3), max_num_batched_tokens=7, max_num_seqs=4) == own


@needs_kernels
@pytest.mark.parametrize("policy", [POLICIES[0], POLICIES[2], POLICIES[4]], ids=str)
def test_company_that_shares_changes_no_bit_of_others(policy: ExpertPolicy) -> None:
    model = wide_model(torch.bfloat16)

    def output(company: int) -> tuple[list[int], list[float]]:
        chance, sampling = random.Random(5), SamplingParams(max_new_tokens=40, ignore_eos=True)
        engine = make_engine(model)
        watched = engine.make_request(prompt(chance, 37), sampling, policy)
        others = [
            engine.make_request(prompt(chance, 5 + i), sampling, ExpertPolicy.shared(1 + i % 8))
            for i in range(company)
        ]
        logprobs = serve(engine, [(i % 4, other) for i, other in enumerate([watched, *others])])
        return watched.output_ids, logprobs[watched.request_id]

    assert output(12) == output(0)


@pytest.mark.parametrize("natively", [True, False])
def test_sharing_reads_fewer_experts(natively: bool) -> None:
    """And counts what ran: never more experts than own choices of the same tokens would read."""
    if natively and not native.available():
        pytest.skip("needs a C compiler")
    model = wide_model() if natively else wide_model(heads=16)

    def loaded(policy: ExpertPolicy) -> tuple[int, list[int]]:
        chance, sampling = random.Random(3), SamplingParams(max_new_tokens=30, ignore_eos=True)
        engine = make_engine(model)
        assert isinstance(engine.runner.cache, native.PagedCache) == natively
        requests = [engine.make_request(prompt(chance, 9), sampling, policy) for _ in range(5)]
        serve(engine, [(0, request) for request in requests])
        numbers = engine.stats.snapshot()
        assert sum(numbers.experts_activated) == sum(r.experts_activated for r in requests)
        return sum(numbers.experts_loaded), [r.experts_activated for r in requests]

    read, _ = loaded(ExpertPolicy.top_k(3))
    read_shared, used = loaded(ExpertPolicy.shared(3))
    assert read_shared < read
    layers, tokens = model.config.num_hidden_layers, 9 + 30 - 1
    assert all(0 < count <= layers * tokens * 4 for count in used)


@needs_kernels
def test_traffic_that_shares_ends_and_leaves_others_alone() -> None:
    """With preemptions, chunks and prefixes in common."""
    oracle, chance = wide_model(), random.Random(11)
    engine = make_engine(oracle, blocks=8, max_num_batched_tokens=64, max_num_seqs=32)
    common, policies = prompt(chance, 33), [*POLICIES, *map(ExpertPolicy.shared, (1, 3, 8))]
    requests = [
        engine.make_request(
            common[: 33 * (i % 3 == 0)] + prompt(chance, chance.choice([1, 16, 30])),
            SamplingParams(max_new_tokens=chance.randrange(1, 40), ignore_eos=True),
            policies[i % len(policies)],
        )
        for i in range(32)
    ]
    serve(engine, [(chance.randrange(25), request) for request in requests])
    assert sum(request.preemptions for request in requests if request.policy.kind == "shared") > 0
    for request in requests:
        assert request.num_output == request.sampling.max_new_tokens
        if request.policy.kind != "shared":
            ids, new = request.prompt_ids, request.num_output
            assert request.output_ids[:5] == generate(oracle, ids, min(new, 5), request.policy)


# --- memory ---------------------------------------------------------------------------------------


@needs_kernels
def test_packed_weights_replace_the_parameters() -> None:
    engine = make_engine(wide_model(torch.bfloat16))
    model = engine.runner.model
    assert not [name for name, p in model.named_parameters() if p.dim() > 1]
    assert model.embedding.weight.numel() == 0
    assert model.embedding.weight.dtype == torch.bfloat16


@needs_kernels
def test_preparing_again_changes_nothing() -> None:
    model, ids_BL = wide_model(), torch.arange(1, 9).view(2, 4)
    model.prepare()
    with torch.inference_mode():
        before = model.logits(ids_BL, POLICIES[2])
        model.prepare()
        assert torch.equal(model.logits(ids_BL, POLICIES[2]), before)


@needs_kernels
def test_two_engines_share_one_checkpoint() -> None:
    oracle = wide_model()
    checkpoint = wide_checkpoint(oracle)
    engines = [Engine(checkpoint, EngineConfig(block_size=size)) for size in (16, 32)]
    for engine in engines:
        request = engine.make_request([5, 6, 7], SamplingParams(max_new_tokens=8), POLICIES[2])
        serve(engine, [(0, request)])
        assert request.output_ids == generate(oracle, [5, 6, 7], 8, POLICIES[2])


@needs_kernels
def test_oracle_policy_after_preparation() -> None:
    """It needs the true activations, so the first matrix is unpacked for it."""
    prepared, plain = wide_model(), wide_model()
    prepared.prepare()
    ids_BL, policy = torch.arange(1, 13).view(2, 6), ExpertPolicy.oracle(3)
    with torch.inference_mode():
        torch.testing.assert_close(
            prepared.logits(ids_BL, policy), plain.logits(ids_BL, policy), rtol=1e-4, atol=1e-3
        )
