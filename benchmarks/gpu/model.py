"""The sections `decode` and `prefill` of benchmarks/gpu: whole models, sparse against dense.

Random bfloat16 weights in the shapes of OPT 1.3B and 6.7B, made on the device: what is measured is
time, and times do not depend on what the weights say. Sparse and dense are one set of weights, one
engine and one kind of graph; the peer of every row is the dense mode.

`decode` is one step of the engine's own graphs (engine.gpu.decode_graphs): `device` rows are the
replay alone, `step` rows what the engine waits for, from the requests in Python to the counted
experts on the host. "alike" requests are copies of each other and choose the same experts;
"independent" ones have random states, and random routers give each its own experts: real routing
lies between.

`prefill` is one prompt in one chunk, dense and sparse alike by one way: `launched` rows operator by
operator, waiting for Python; `device` rows the device's time of that alone; `graph` rows the replay
of the engine's prompt graphs (engine.gpu.prompt_graphs), whose attention reads the paged cache, and
`graph step` rows what the engine waits for then. `mixed` rows have decoding requests beside the
chunk.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.kernels import Case
from benchmarks.gpu.timing import DEVICE, ROUNDS, Call, eager_us, interleaved_us, replay_ms
from benchmarks.records import Record
from engine.config import ExpertConfig, ModelConfig
from engine.gpu.attention.batches import attend_spans
from engine.gpu.decode_graphs import DecodeGraph, DecodeGraphs, GraphKey, Replay, StaticBatch
from engine.gpu.decoder import KernelDecoder
from engine.gpu.prompt_graphs import PromptGraphs, PromptKey
from engine.model.attention import KVCache, SequenceSpan
from engine.model.decoder import Decoder
from engine.model.policy_batch import PolicyBatch
from engine.policy import ExpertPolicy
from engine.serving.request import Request, SamplingParams
from engine.serving.scheduler import Plan, Scheduled

BLOCK = 16
# Rounds in which graphs are captured, and in which they learn what a batch uses.
WARM = 20
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
    mixed: tuple[int, int] = (448, 64)

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
TINY = (Shape("tiny", 16, 1, 64, 2, 50, ((4, 2),), (1, 2), 9, (5,), (2, 1)),)


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
        super().__init__(KernelDecoder(model), cache, most, tokens)
        self.num_experts = experts

    def _capture(self, key: GraphKey, batch: StaticBatch) -> DecodeGraph:
        if DEVICE == "cuda":
            return super()._capture(key, batch)
        outputs = self.compute(key, batch)
        return DecodeGraph(Computed(lambda _: self.compute(key, batch)), *outputs)

    def graph(self, key: GraphKey) -> Any:
        """The captured graph itself, to be timed without the step around it."""
        return self._graphs[key].graph


class BenchmarkPrompts(PromptGraphs):
    """The engine's prompt graphs, for a number of experts that may change between models."""

    def __init__(
        self, model: Decoder, cache: KVCache, requests: int, tokens: int, longest: int, experts: int
    ) -> None:
        super().__init__(KernelDecoder(model), cache, requests, tokens, longest)
        self.num_experts = experts

    def _capture(self, key: PromptKey) -> Replay:
        return super()._capture(key) if DEVICE == "cuda" else Computed(lambda _: self.compute(key))

    def graph(self, key: PromptKey) -> Any:
        """The captured graph itself, to be timed without the step around it."""
        return self._graphs[key]


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
    sparse = ExpertPolicy.top_k(chosen)
    found = []
    for kind in ("alike", "independent") if batch > 1 else ("alone",):
        graphs = BenchmarkGraphs(model, cache, max(shape.batches), shape.context + BLOCK, experts)
        rivals = [
            requests_of(batch, shape.context, shape.vocabulary, policy)
            for policy in (DENSE, sparse)
        ]
        if kind == "alike":
            rivals = [copies(requests) for requests in rivals]
        device: list[list[float]] = [[], []]
        step: list[list[float]] = [[], []]
        union = 0.0
        for _ in range(ROUNDS + WARM if DEVICE == "cuda" else 1):
            for which, requests in enumerate(rivals):
                key = graphs.key(requests)  # follows what the steps before used
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
            dense_ms, sparse_ms = (statistics.median(t[WARM:] or t) for t in times)
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


def prefill_case(
    model: Decoder, cache: KVCache, shape: Shape, tokens: int, experts: int, chosen: int
) -> list[Record]:
    """One prompt in one chunk, logits of its last token."""

    def plan_of(policy: ExpertPolicy) -> Plan:
        (request,) = requests_of(1, tokens, shape.vocabulary, policy)
        request.num_computed = 0
        return [Scheduled(request, tokens)]

    params: dict[str, Any] = {"model": shape.name, "tokens": tokens, "E": experts, "k": chosen}
    params |= {"requests": "independent", "dtype": "bf16"}
    return _plans_timed("prefill", model, cache, params, [plan_of(p) for p in modes(chosen)])


def mixed_case(
    model: Decoder, cache: KVCache, shape: Shape, experts: int, chosen: int
) -> list[Record]:
    """A chunk at the beginning of its prompt beside requests that decode."""
    count, decoding = shape.mixed

    def plan_of(policy: ExpertPolicy) -> Plan:
        requests = requests_of(decoding, shape.context, shape.vocabulary, policy)
        (prompt,) = requests_of(1, count, shape.vocabulary, policy)
        prompt.num_computed = 0
        first = decoding * -(-shape.context // BLOCK)
        prompt.blocks = [first + block for block in prompt.blocks]
        return [*(Scheduled(request, 1) for request in requests), Scheduled(prompt, count)]

    params: dict[str, Any] = {"model": shape.name, "tokens": count, "decoding": decoding}
    params |= {"E": experts, "k": chosen, "context": shape.context, "dtype": "bf16"}
    return _plans_timed("mixed", model, cache, params, [plan_of(p) for p in modes(chosen)])


def modes(chosen: int) -> tuple[ExpertPolicy, ExpertPolicy]:
    """What is compared: all experts, and some."""
    return DENSE, ExpertPolicy.top_k(chosen)


@torch.inference_mode()
def _plans_timed(
    name: str, model: Decoder, cache: KVCache, params: dict[str, Any], plans: list[Plan]
) -> list[Record]:
    """Two plans that differ in their policies, the dense one first, in every way to run them."""
    experts = params["E"]
    set_experts(model, experts)
    calls = [launched_call(model, cache, plan, experts) for plan in plans]
    times = {
        "launched": [eager_us(call) / 1e3 for call in calls],
        "device": [us / 1e3 for us in interleaved_us(calls, calls=1)],
    }
    times["graph"], times["graph step"] = graph_times(model, cache, plans, experts)
    return [
        Record(f"{name} {way}", params, sparse, "ms", dense, dense / sparse)
        for way, (dense, sparse) in times.items()
    ]


def launched_call(model: Decoder, cache: KVCache, plan: Plan, experts: int) -> Call:
    """The plan as the engine computes it without a graph; its tensors are made once."""
    spans: list[SequenceSpan] = []
    ids: list[int] = []
    for request, count in plan:
        context = request.num_computed + count
        spans.append(SequenceSpan(len(ids), count, context, request.blocks))
        ids += request.token_ids[request.num_computed : context]
    ids_T, rows = (
        torch.tensor(values, device=DEVICE)
        for values in (ids, [s.start + s.length - 1 for s in spans])
    )
    policies = PolicyBatch.build([(r.policy, n) for r, n in plan], experts, DEVICE)
    config = model.config
    group = config.num_attention_heads // config.num_key_value_heads
    attend = attend_spans(cache, spans, (model.cos, model.sin), group)
    decoder = KernelDecoder(model)
    return lambda _: decoder.forward(ids_T, attend, policies, None, rows)


def graph_times(
    model: Decoder, cache: KVCache, plans: list[Plan], experts: int
) -> tuple[list[float], list[float]]:
    """Milliseconds of each plan's replay alone, and of the engine's step around it."""
    tokens = max(sum(count for _, count in plan) for plan in plans)
    longest = max(len(r.token_ids) for plan in plans for r, _ in plan)
    graphs = BenchmarkPrompts(model, cache, len(plans[0]), tokens, longest, experts)
    keys = [graphs.key(plan) for plan in plans]
    device: list[list[float]] = [[] for _ in plans]
    step: list[list[float]] = [[] for _ in plans]
    for _ in range(ROUNDS + 2 if DEVICE == "cuda" else 1):
        for which, (plan, key) in enumerate(zip(plans, keys, strict=True)):
            assert key is not None
            start = time.perf_counter()
            graphs.run(plan, key)
            synchronize()
            step[which].append((time.perf_counter() - start) * 1e3)
            device[which].append(replayed_ms(graphs.graph(key)))
    # The first two rounds compile and capture.
    of_device, of_step = ([statistics.median(t[2:] or t) for t in all] for all in (device, step))
    return of_device, of_step


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
            decoding = -(-shape.context // BLOCK) * max(*shape.batches, shape.mixed[1])
            blocks = decoding + -(-max(*shape.prompts, shape.mixed[0]) // BLOCK)
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


def _mixed(loaded: Loaded, shape: Shape, experts: int, chosen: int) -> list[Record]:
    return mixed_case(*loaded.of(shape), shape, experts, chosen)


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
        experts, chosen = shape.experts[0]
        yield f"mixed {shape.name}", partial(_mixed, LOADED, shape, experts, chosen)
