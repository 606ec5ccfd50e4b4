"""The sections `decode` and `prefill` of benchmarks/gpu.py: whole models, sparse against dense.

Random bfloat16 weights in the shapes of OPT 1.3B and 6.7B, made on the device: what is measured is
time, and times do not depend on what the weights say. Sparse and dense are one set of weights, one
engine and one kind of graph; the peer of every row is the dense mode.

`decode` is one step of the engine's own graphs (engine.cuda_graphs): `device` rows are the replay
alone, `step` rows what the engine waits for, from the requests in Python to the counted experts on
the host. "alike" requests are copies of each other and choose the same experts; "independent" ones
have random states, and random routers give each its own experts: real routing lies between.

`prefill` is one prompt in one chunk without a graph: `device` rows are the device's time alone,
`launched` rows include waiting for Python.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_kernels import Case
from benchmarks.gpu_timing import DEVICE, ROUNDS, Call, eager_us, interleaved_us, replay_ms
from benchmarks.records import Record
from engine.attention import KVCache, SequenceSpan
from engine.config import ExpertConfig, ModelConfig
from engine.cuda_graphs import DecodeGraph, DecodeGraphs, GraphKey, StaticBatch
from engine.experts import PolicyBatch
from engine.fused_forward import fused_forward
from engine.model import Decoder
from engine.paged_attention import KernelAttend
from engine.request import ExpertPolicy, Request, SamplingParams

BLOCK = 16
DENSE = ExpertPolicy.dense()


@dataclass(frozen=True)
class Shape:
    """A model's shape and what is measured of it."""

    name: str
    width: int
    layers: int
    neurons: int
    heads: int
    vocabulary: int = 50272
    experts: tuple[tuple[int, int], ...] = ((32, 6), (64, 8))
    batches: tuple[int, ...] = (1, 4, 16, 64)
    context: int = 256
    prompts: tuple[int, ...] = (512, 2048)

    @property
    def config(self) -> ModelConfig:
        experts = self.experts[0][0]
        return ModelConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.neurons,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=2048,
            experts=ExpertConfig(experts, self.neurons // experts),
            torch_dtype="bfloat16",
        )


FULL = (Shape("1.3B", 2048, 24, 8192, 32), Shape("6.7B", 4096, 32, 16384, 32))
TINY = (Shape("tiny", 16, 1, 32, 2, 50, ((8, 2), (4, 1)), (1, 2), 9, (5,)),)


@torch.no_grad()
def random_model(shape: Shape) -> Decoder:
    """Weights at a scale that keeps activations finite; a router is set by `set_experts`."""
    with torch.device("meta"):
        model = Decoder(shape.config)
    model = model.to(torch.bfloat16).to_empty(device=DEVICE).requires_grad_(False)
    model.materialize_tables(DEVICE)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02 if "embedding" in name else parameter.shape[1] ** -0.5)
    for ffn in model.ffns():
        ffn.use_kernels()
    return model.eval()


def set_experts(model: Decoder, num_experts: int) -> None:
    """Cut every FFN into so many experts, with a random router each."""
    for ffn in model.ffns():
        ffn.num_experts = num_experts
        ffn.router = torch.randn(num_experts, ffn.up.shape[1], device=DEVICE)


class Computed:
    """Stands for a graph where there is no device to capture one."""

    def __init__(self, call: Call) -> None:
        self._call = call

    def replay(self) -> None:
        self._call(0)


class BenchmarkGraphs(DecodeGraphs):
    """The engine's graphs, for a number of experts that may change between models."""

    def __init__(
        self, model: Decoder, cache: KVCache, most: int, tokens: int, experts: int
    ) -> None:
        super().__init__(model, cache, most, tokens)
        self.num_experts = experts

    def _capture(self, key: GraphKey, batch: StaticBatch) -> DecodeGraph:
        if DEVICE == "cuda":
            return super()._capture(key, batch)
        logits_BV, totals = self.compute(key, batch)
        return DecodeGraph(Computed(lambda _: self.compute(key, batch)), logits_BV, totals)

    def graph(self, key: GraphKey) -> Any:
        """The captured graph itself, to be timed without the step around it."""
        return self._graphs[key].graph


def requests_of(batch: int, context: int, vocabulary: int, policy: ExpertPolicy) -> list[Request]:
    """Requests that are about to compute token `context` - 1, each on blocks of its own."""
    most = -(-context // BLOCK)
    made = []
    for i in range(batch):
        prompt = [1 + (31 * i + 7 * j) % (vocabulary - 1) for j in range(context)]
        request = Request(str(i), prompt, SamplingParams(), policy, seed=0)
        request.num_computed = context - 1
        request.blocks = list(range(i * most, (i + 1) * most))
        made.append(request)
    return made


def copies(requests: list[Request]) -> list[Request]:
    """The first request over and over; the copies write the same keys to the same slots."""
    return [requests[0]] * len(requests)


@torch.inference_mode()
def decode_case(
    model: Decoder, cache: KVCache, shape: Shape, batch: int, experts: int, chosen: int
) -> list[Record]:
    """One batch size: the dense mode and one sparse one in turn."""
    set_experts(model, experts)
    graphs = BenchmarkGraphs(model, cache, max(shape.batches), shape.context + BLOCK, experts)
    sparse = ExpertPolicy.top_k(chosen)
    found = []
    for kind in ("alike", "independent") if batch > 1 else ("alone",):
        rivals = [
            requests_of(batch, shape.context, shape.vocabulary, policy)
            for policy in (DENSE, sparse)
        ]
        if kind == "alike":
            rivals = [copies(requests) for requests in rivals]
        keys = [graphs.key(requests) for requests in rivals]
        device: list[list[float]] = [[], []]
        step: list[list[float]] = [[], []]
        union = 0.0
        for _ in range(ROUNDS + 2 if DEVICE == "cuda" else 1):
            for which, (requests, key) in enumerate(zip(rivals, keys, strict=True)):
                assert key is not None
                start = time.perf_counter()
                _, totals = graphs.run(requests, key)
                synchronize()
                step[which].append((time.perf_counter() - start) * 1e3)
                device[which].append(replayed_ms(graphs.graph(key)))
                if which:
                    union = statistics.mean(totals[-shape.layers :])
        params: dict[str, Any] = {"model": shape.name, "batch": batch, "E": experts, "k": chosen}
        params |= {"requests": kind, "context": shape.context, "dtype": "bf16"}
        for name, times in (("device", device), ("step", step)):
            # The first two rounds compile and capture.
            dense_ms, sparse_ms = (statistics.median(t[2:] or t) for t in times)
            ratio = dense_ms / sparse_ms
            found.append(Record(f"decode {name}", params, sparse_ms, "ms", dense_ms, ratio))
        found.append(Record("decode experts in use", params, union, "experts"))
    return found


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def replayed_ms(graph: Any) -> float:
    if DEVICE == "cuda":
        return replay_ms(graph)
    start = time.perf_counter()
    graph.replay()
    return (time.perf_counter() - start) * 1e3


@torch.inference_mode()
def prefill_case(
    model: Decoder, cache: KVCache, shape: Shape, tokens: int, experts: int, chosen: int
) -> list[Record]:
    """One prompt in one chunk, logits of its last token."""
    set_experts(model, experts)
    ids_T = torch.randint(0, shape.vocabulary, (tokens,), device=DEVICE)
    positions_T = torch.arange(tokens, device=DEVICE)
    last = torch.tensor([tokens - 1], device=DEVICE)
    span = SequenceSpan(0, tokens, tokens, list(range(-(-tokens // BLOCK))))
    attend = KernelAttend.of_spans(cache, [span], model.turns(positions_T))

    def call_of(policy: ExpertPolicy) -> Call:
        batch = PolicyBatch.uniform(policy, tokens, experts, DEVICE)

        def call(_: int) -> Tensor:
            return fused_forward(model, ids_T, attend, batch, None, last)

        return call

    rivals = [call_of(DENSE), call_of(ExpertPolicy.top_k(chosen))]
    params: dict[str, Any] = {"model": shape.name, "tokens": tokens, "E": experts, "k": chosen}
    params |= {"requests": "independent", "dtype": "bf16"}
    launched = [eager_us(call) / 1e3 for call in rivals]
    device = [us / 1e3 for us in interleaved_us(rivals, calls=1)]
    return [
        Record(f"prefill {name}", params, sparse, "ms", dense, dense / sparse)
        for name, (dense, sparse) in (("device", device), ("launched", launched))
    ]


class Loaded:
    """One model and its cache at a time, made when they are first needed."""

    def __init__(self) -> None:
        self._name = ""
        self._pair: tuple[Decoder, KVCache] | None = None

    def of(self, shape: Shape) -> tuple[Decoder, KVCache]:
        if self._pair is None or self._name != shape.name:
            self._pair = None
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
            model = random_model(shape)
            blocks = max(
                -(-shape.context // BLOCK) * max(shape.batches), -(-max(shape.prompts) // BLOCK)
            )
            head_dim = shape.width // shape.heads
            cache = KVCache(
                shape.layers, blocks, BLOCK, shape.heads, head_dim, torch.bfloat16, DEVICE
            )
            cache.slots.normal_()
            self._name, self._pair = shape.name, (model, cache)
        return self._pair


def _decode(loaded: Loaded, shape: Shape, batch: int, experts: int, chosen: int) -> list[Record]:
    return decode_case(*loaded.of(shape), shape, batch, experts, chosen)


def _prefill(loaded: Loaded, shape: Shape, tokens: int, experts: int, chosen: int) -> list[Record]:
    return prefill_case(*loaded.of(shape), shape, tokens, experts, chosen)


LOADED = Loaded()


def decode_cases(shapes: tuple[Shape, ...]) -> Iterator[Case]:
    """The section `decode`."""
    for shape in shapes:
        for experts, chosen in shape.experts:
            for batch in shape.batches:
                label = f"decode {shape.name} batch={batch} {chosen}/{experts}"
                yield label, partial(_decode, LOADED, shape, batch, experts, chosen)


def prefill_cases(shapes: tuple[Shape, ...]) -> Iterator[Case]:
    """The section `prefill`."""
    for shape in reversed(shapes):  # the model that `decode` left loaded comes first
        for experts, chosen in shape.experts:
            for tokens in shape.prompts:
                label = f"prefill {shape.name} tokens={tokens} {chosen}/{experts}"
                yield label, partial(_prefill, LOADED, shape, tokens, experts, chosen)
