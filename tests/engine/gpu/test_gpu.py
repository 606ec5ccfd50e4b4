"""The engine on a CUDA device; `make test-gpu` runs these, `make test` does not collect them."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig
from engine.gpu.decoder import KernelDecoder
from engine.gpu.training import top_k_ffn
from engine.model.attention import causal_attend
from engine.model.decoder import Decoder
from engine.model.ffn import ExpertFFN
from engine.model.policy_batch import PolicyBatch
from engine.model.sliced_ffn import sparse_ffn
from engine.model.trace import Trace
from engine.policy import ExpertPolicy
from engine.serving.engine import Engine
from engine.serving.request import SamplingParams
from tests.engine.model.test_variants import VARIANTS, variant
from tests.engine.serving import test_sampler as on_host
from tests.models import make_corpus, tiny_config, tiny_model, tiny_tokenizer
from training.config import ModelShape, SwitchConfig, TrainConfig
from training.trainer import Trainer

pytestmark = pytest.mark.gpu

POLICIES = [
    ExpertPolicy.dense(),
    ExpertPolicy.top_k(2),
    ExpertPolicy.top_k(5),
    ExpertPolicy.mass(0.6),
]


DENSE = POLICIES[0]


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


def test_sampled_steps_measure_what_the_cpu_measures(model: Decoder) -> None:
    """Sampling leaves the graphs for a step, and changes neither tokens nor numbers."""
    sampling, policy = SamplingParams(max_new_tokens=12, ignore_eos=True), ExpertPolicy.top_k(2)
    runs = []
    for device, every in (("cpu", 3), ("cuda", 3), ("cuda", 0)):
        moved = copy.deepcopy(model).to(device)
        checkpoint = Checkpoint(Path("t"), model.config, moved, tiny_tokenizer(), {}, "0" * 64)
        engine = Engine(checkpoint, EngineConfig(device=device, block_size=4, sample_every=every))
        (made,) = engine.generate([[5, 6, 7, 8]], sampling, policy)
        runs.append((made.token_ids, engine.stats.snapshot()))
    (ids, host), (sampled_ids, sampled), (plain_ids, plain) = runs
    assert ids == sampled_ids == plain_ids
    assert (host.sampled_steps, sampled.sampled_steps, plain.sampled_steps) == (4, 4, 0)
    assert sampled.expert_load == host.expert_load
    assert sampled.mass_captured == pytest.approx(host.mass_captured, rel=1e-3)
    assert sampled.mass_total == pytest.approx(host.mass_total, rel=1e-3)


@pytest.mark.parametrize("kind", ["trained here", *VARIANTS, "window"])
def test_engine_equals_naive_generate_under_mixed_policies(kind: str, model: Decoder) -> None:
    """Models of other families too, and one whose window is shorter than its outputs."""
    if kind == "window":
        model = variant("opt", sliding_window=9).to("cuda")
    elif kind in VARIANTS:
        model = variant(kind).to("cuda")
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


def test_sampling_waits_for_the_device_once() -> None:
    """And draws what it draws on the CPU."""
    requests = [on_host.request([1, 2, 3], [4, 5, 1], **sampling) for sampling in on_host.MIXED * 2]
    logits_BV = on_host.random_logits(len(requests), vocabulary=5_000)
    expected, cuda_BV = on_host.sample(logits_BV, requests), logits_BV.to("cuda")
    on_host.sample(cuda_BV, requests)  # the first call sets things up
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            drawn = on_host.sample(cuda_BV, requests)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    messages = [str(warning.message) for warning in caught]
    waits = [message for message in messages if message.startswith("called a synchronizing")]
    assert len(waits) == 1, waits
    for ours, theirs in zip(drawn, expected, strict=True):
        assert ours.token_id == theirs.token_id
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [token_id for token_id, _ in ours.top] == [token_id for token_id, _ in theirs.top]


class TestGraphs:
    """Greedy output in float32: replayed, launched one by one, alone, in company."""

    PROMPTS: ClassVar[list[list[int]]] = [
        [1 + (7 * i + j) % 290 for j in range(1 + 11 * i % 61)] for i in range(11)
    ]

    def engine(self, model: Decoder, **changes: Any) -> Engine:
        own = copy.deepcopy(model)
        checkpoint = Checkpoint(Path("t"), own.config, own, tiny_tokenizer(), {}, "0" * 64)
        config = EngineConfig(device="cuda", block_size=4, max_num_batched_tokens=70, **changes)
        return Engine(checkpoint, config)

    def outputs(
        self,
        engine: Engine,
        chosen: Sequence[int],
        policies: Sequence[ExpertPolicy] = POLICIES,
    ) -> dict[int, list[int]]:
        sampling = SamplingParams(max_new_tokens=12, ignore_eos=True)
        requests = {
            i: engine.make_request(
                self.PROMPTS[i],
                sampling,
                policies[i % len(policies)],
                request_id=f"request-{i}",
            )
            for i in chosen
        }
        found: dict[int, list[int]] = {i: [] for i in chosen}
        for event in engine.run(list(requests.values())):
            assert event.token is not None
            found[int(event.request_id.removeprefix("request-"))].append(event.token.token_id)
        return found

    def test_replayed_equals_launched(self, model: Decoder) -> None:
        everyone = range(len(self.PROMPTS))
        replayed, launched = self.engine(model), self.engine(model, cuda_graphs=False)
        assert self.outputs(replayed, everyone) == self.outputs(launched, everyone)
        assert replayed.runner.graphs is not None
        assert replayed.runner.graphs.captured
        assert launched.runner.graphs is None
        # Another round over the same graphs, with other blocks.
        assert self.outputs(replayed, everyone) == self.outputs(launched, everyone)

    def test_alone_and_in_company(self, model: Decoder) -> None:
        engine = self.engine(model)
        together = self.outputs(engine, range(len(self.PROMPTS)))
        for i in (0, 1, 5, 6, 7):
            assert self.outputs(engine, [i])[i] == together[i], POLICIES[i % 4]

    def test_experts_are_counted_alike(self, model: Decoder) -> None:
        counted = []
        for graphs in (True, False):
            engine = self.engine(model, cuda_graphs=graphs)
            self.outputs(engine, range(5))
            counted.append(engine.stats.snapshot())
        assert counted[0].experts_activated == counted[1].experts_activated
        assert counted[0].experts_loaded == counted[1].experts_loaded

    def test_experts_of_tokens_are_reported_alike(self, model: Decoder) -> None:
        """Decoding steps that are asked for choices still replay."""
        sampling, found = SamplingParams(max_new_tokens=8, ignore_eos=True, token_experts=True), []
        for graphs in (True, False):
            engine = self.engine(model, cuda_graphs=graphs)
            requests = [
                engine.make_request(prompt, sampling, policy, request_id=f"{policy}")
                for prompt, policy in zip(self.PROMPTS[1:], POLICIES, strict=False)
            ]
            events = [(e.request_id, e.index, e.experts) for e in engine.run(requests)]
            assert all(experts for _, _, experts in events)
            found.append(sorted(events))
            assert (
                engine.runner.graphs is not None and bool(engine.runner.graphs.captured)
            ) == graphs
        assert found[0] == found[1]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("length", [1, 9, 100])
def test_kernels_compute_the_plain_model_in_bfloat16(
    model: Decoder, policy: ExpertPolicy, length: int
) -> None:
    """Against float32 within the error that plain bfloat16 products have.

    Medians of several texts: where two experts are nearly equal, rounding may choose the other.
    """
    generator = torch.Generator("cuda").manual_seed(length)
    texts = [
        torch.randint(0, 300, (1, length), device="cuda", generator=generator) for _ in "12345"
    ]
    plain = copy.deepcopy(model).to(torch.bfloat16)
    for ffn, original in zip(plain.ffns(), model.ffns(), strict=True):
        ffn.router.data = original.router.clone()
    kernels = KernelDecoder(plain)

    def by_kernels(ids_1L: Tensor, policy: ExpertPolicy) -> Tensor:
        positions_T = torch.arange(length, device="cuda")
        batch = PolicyBatch.uniform(policy, length, 8, "cuda")
        attend = causal_attend(1, length)
        return kernels.forward_rotated(ids_1L[0], positions_T, attend, batch)[None]

    def error(logits: Callable[[Tensor, ExpertPolicy], Tensor]) -> float:
        exact = [model.logits(ids, policy) for ids in texts]
        found = [logits(ids, policy) for ids in texts]
        return statistics.median(
            float((f - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)
        )

    assert error(by_kernels) < max(0.05, 2 * error(plain.logits))


class TestTrainingKernels:
    """The layer's sparse gradients on the device, against float64 products by slices."""

    @pytest.fixture
    def ffn(self) -> ExpertFFN:
        ffn = ExpertFFN(tiny_config(hidden_size=200)).to("cuda")
        ffn.training_kernels = top_k_ffn
        for tensor in (ffn.up.data, ffn.down.data, ffn.router):
            tensor.normal_()
        return ffn

    def assert_gradients(
        self, ffn: ExpertFFN, x_TD: Tensor, y_TD: Tensor, chosen_TE: Tensor, limit: float
    ) -> None:
        assert "sparse_ffn" in str(y_TD.grad_fn)
        leaves = (x_TD, ffn.up, ffn.down)
        # Of weights as the products see them: rounding moves a neuron across ReLU's kink.
        doubles = tuple(leaf.detach().to(y_TD.dtype).double().requires_grad_() for leaf in leaves)
        expected_TD = sparse_ffn(*doubles, chosen_TE, ffn.activation)
        dy_TD = torch.randn_like(y_TD)
        actual = (y_TD.detach(), *torch.autograd.grad(y_TD, leaves, dy_TD))
        expected = torch.autograd.grad(expected_TD, doubles, dy_TD.double())
        for a, e in zip(actual, (expected_TD.detach(), *expected), strict=True):
            assert float((a - e).norm() / e.norm()) < limit

    @pytest.mark.parametrize("tokens", [1, 100, 3000])
    def test_float32(self, ffn: ExpertFFN, tokens: int) -> None:
        x_TD = torch.randn(tokens, 200, device="cuda", requires_grad=True)
        trace = Trace()
        y_TD = ffn(x_TD, uniform(tokens), trace)
        self.assert_gradients(ffn, x_TD, y_TD, chosen(trace), 1e-5)

    @pytest.mark.parametrize("tokens", [1, 100, 3000])
    def test_autocast_to_bfloat16(self, ffn: ExpertFFN, tokens: int) -> None:
        x_TD = torch.randn(tokens, 200, device="cuda").bfloat16().requires_grad_()
        trace = Trace()
        with torch.autocast("cuda", torch.bfloat16):
            y_TD = ffn(x_TD, uniform(tokens), trace)
        assert y_TD.dtype == torch.bfloat16
        self.assert_gradients(ffn, x_TD, y_TD, chosen(trace), 1.5e-2)
        assert ffn.up.dtype == torch.float32

    # What the compiler warns of: its own imports, and products that are exact on purpose.
    @pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
    @pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
    def test_torch_compile(self, ffn: ExpertFFN) -> None:
        """One graph, and the numbers of eager mode."""
        batch, dy_TD = uniform(300), torch.randn(300, 200, device="cuda")
        x_TD = torch.randn(300, 200, device="cuda", requires_grad=True)

        def residual(x_TD: Tensor) -> Tensor:
            return x_TD + ffn(2.0 * x_TD, batch)

        results = []
        for function in (residual, torch.compile(residual, fullgraph=True)):
            y_TD = function(x_TD)
            leaves = (x_TD, ffn.up, ffn.down)
            results.append((y_TD.detach(), *torch.autograd.grad(y_TD, leaves, dy_TD)))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def uniform(tokens: int) -> PolicyBatch:
    return PolicyBatch.uniform(ExpertPolicy.top_k(3), tokens, 8, "cuda")


def chosen(trace: Trace) -> Tensor:
    (chosen_TE,) = trace.chosen
    assert chosen_TE is not None
    return chosen_TE


def test_training_runs_on_the_device(tmp_path: Path) -> None:
    shape = ModelShape(300, 32, 64, 2, 4, 2, num_experts=8)
    switch = SwitchConfig(top_k=(2,), mixed_top_k=(1, 2, 4))
    config = TrainConfig(
        steps=20, batch_size=4, sequence_length=32, model=shape, switch=switch, valid_share=0.1
    )
    corpus = make_corpus(tmp_path / "corpus")
    path = Trainer(config, tmp_path / "run", [corpus], device="cuda").train()
    assert (path / "model.safetensors").exists()
    again = Trainer(dataclasses.replace(config), tmp_path / "run", [corpus], device="cuda")
    assert again.train() == path
