"""From a plan to logits: builds one step's flat batch, runs the model over the paged KV cache.

Shapes: T tokens of the batch, B requests whose known tokens are all computed, V vocabulary,
L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import EngineConfig, ModelConfig
from engine.errors import ConfigError
from engine.gpu.backend import GpuBackend
from engine.gpu.decode_graphs import DecodeGraphs, GraphKey
from engine.gpu.prompt_graphs import PromptGraphs, PromptKey
from engine.model.attention import KVCache, SequenceSpan
from engine.model.decoder import Decoder
from engine.model.policy_batch import PolicyBatch
from engine.model.trace import Trace
from engine.serving import token_experts
from engine.serving.backend import make_backend
from engine.serving.request import Request
from engine.serving.router_sample import read_sample, sampling_trace
from engine.serving.sampler import Sampled, token_logprobs
from engine.serving.scheduler import Plan
from engine.serving.stats import RouterSample


@dataclass(frozen=True)
class PromptPart:
    """The prompt tokens at `first`, `first + 1`, ... with their log-probabilities."""

    request: Request
    first: int
    tokens: list[Sampled]


@dataclass(frozen=True)
class StepResult:
    """What one step computed.

    Attributes:
        ready: requests whose known tokens are all computed, so their next token can be drawn.
        logits_BV: their logits, float32, one row each.
        prompts: log-probabilities of prompt tokens, for requests that asked.
        last_activated: the experts used by the last token of each ready request, over all layers.
        activated: per plan entry, those used by all its tokens.
        layer_activated: per layer, the (token, expert) pairs that ran.
        layer_loaded: per layer, the distinct experts that ran.
        last_chosen: which experts the last token of each ready request used, as
            `engine.serving.token_experts` packs them; empty where not asked for.
        sample: what the routers missed; None unless this step was sampled and had sparse tokens.
    """

    ready: list[Request]
    logits_BV: Tensor
    prompts: list[PromptPart]
    last_activated: list[int]
    activated: list[int]
    layer_activated: list[int]
    layer_loaded: list[int]
    last_chosen: list[bytes]
    sample: RouterSample | None = None


def plan_cache(model: ModelConfig, engine: EngineConfig, dtype: torch.dtype) -> tuple[int, int]:
    """(blocks of the KV cache, longest request in tokens) that the configuration amounts to.

    The cache never has more blocks than `max_num_seqs` longest requests fill. A `max_model_len` of
    0 becomes the model's limit, or what the cache holds if that is less.

    Raises:
        ConfigError: if `max_model_len` exceeds the model's limit or the cache.
    """
    limit = model.max_position_embeddings
    if engine.max_model_len > limit:
        raise ConfigError(
            f"max_model_len must be at most {limit}, the model's max_position_embeddings; got "
            f"{engine.max_model_len}"
        )
    length = engine.max_model_len or limit
    size, heads = engine.block_size, model.num_key_value_heads
    block_bytes = KVCache.bytes_per_block(
        model.num_hidden_layers, size, heads, model.head_dim, dtype
    )
    blocks_each = -(-length // size)
    blocks = min(engine.kv_cache_bytes // block_bytes, blocks_each * engine.max_num_seqs)
    needed = blocks_each if engine.max_model_len else 1
    if blocks < needed:
        raise ConfigError(
            f"kv_cache_bytes must be at least {needed * block_bytes} for "
            f"{length if engine.max_model_len else size} tokens, got {engine.kv_cache_bytes}; "
            "raise it, or lower max_model_len or block_size"
        )
    return blocks, min(length, blocks * size)


class Runner:
    """Turns plans into batches, and is the only caller of the model.

    Attributes:
        backend: the model and its KV cache.
        graphs, prompt_graphs: captured decoding steps, and captured steps with prompts; None
            without.
    """

    def __init__(self, model: Decoder, config: EngineConfig, num_blocks: int) -> None:
        self.model = model
        self.num_experts = model.config.experts.num_experts
        self.num_neurons = model.config.intermediate_size
        self.device = model.embedding.weight.device
        self.backend = make_backend(model, config, num_blocks)
        on_gpu = self.backend if isinstance(self.backend, GpuBackend) else None
        self.graphs = on_gpu.graphs if on_gpu else None
        self.prompt_graphs = on_gpu.prompt_graphs if on_gpu else None
        self.sample_every = config.sample_every
        self._steps = 0

    @torch.inference_mode()
    def run(self, plan: Plan) -> StepResult:
        """Compute the plan's tokens. The requests' `num_computed` does not count them yet."""
        if self._is_sampled():
            return self._run(plan, sampled=True)
        if self.graphs is not None and all(n == r.num_uncomputed == 1 for r, n in plan):
            requests = [r for r, _ in plan]
            key = self.graphs.key(requests)
            if key is not None:
                return self._replay(self.graphs, requests, key)
        if self.prompt_graphs is not None and not any(_wants_more(r, n) for r, n in plan):
            shape = self.prompt_graphs.key(plan)
            if shape is not None and self.prompt_graphs.worth(shape):
                return self._replay_prompts(self.prompt_graphs, plan, shape)
        return self._run(plan)

    def _is_sampled(self) -> bool:
        self._steps += 1
        return bool(self.sample_every) and self._steps % self.sample_every == 0

    def _replay(self, graphs: DecodeGraphs, requests: list[Request], key: GraphKey) -> StepResult:
        """Replay a step of one token a request: all are ready, none predicts a prompt token."""
        logits_BV, totals = graphs.run(requests, key)
        n, layers = len(requests), self.model.config.num_hidden_layers
        per_token = totals[:n]
        per_layer, union = totals[n : n + layers], totals[n + layers :]
        chosen_LBE = graphs.choices(key)
        chosen = token_experts.read(requests, range(n), chosen_LBE, self.model.config)
        return StepResult(requests, logits_BV, [], per_token, per_token, per_layer, union, chosen)

    def _replay_prompts(self, graphs: PromptGraphs, plan: Plan, key: PromptKey) -> StepResult:
        """Replay any plan that has a graph. Graphs give only logits and numbers of experts."""
        logits_BV, totals = graphs.run(plan, key)
        ready = [r for r, n in plan if n == r.num_uncomputed]
        spans = _spans(plan)
        ready_rows, _ = _rows(plan, spans)
        counts = _split_counts(totals, spans, ready_rows)
        return StepResult(ready, logits_BV, [], *counts, [b""] * len(ready))

    def _run(self, plan: Plan, *, sampled: bool = False) -> StepResult:
        """Compute any plan without a graph, launching operator by operator."""
        spans = _spans(plan)
        ready_rows, prompt_rows = _rows(plan, spans)
        trace = sampling_trace(sum(n for _, n in plan)) if sampled else Trace()
        logits = self.backend.forward(
            spans,
            self._tensor([i for r, n in plan for i in _tokens(r, n)]),
            self._tensor([i for s in spans for i in range(s.context - s.length, s.context)]),
            PolicyBatch.build([(r.policy, n) for r, n in plan], self.num_experts, self.device),
            trace,
            self._tensor(ready_rows + [row for rows in prompt_rows for row in rows]),
        )
        ready = [r for r, n in plan if n == r.num_uncomputed]
        prompts = _prompt_parts(plan, prompt_rows, logits[len(ready) :])
        counts = _count_experts(trace, spans, ready_rows)
        chosen = self._chosen(trace, ready, ready_rows)
        sample = read_sample(trace, self.num_neurons) if sampled else None
        return StepResult(ready, logits[: len(ready)], prompts, *counts, chosen, sample)

    def _chosen(self, trace: Trace, ready: list[Request], rows: list[int]) -> list[bytes]:
        """The value of `StepResult.last_chosen`."""
        choices = trace.choices() if any(map(token_experts.asks, ready)) else []
        chosen_LTE = torch.stack(choices) if choices else None
        return token_experts.read(ready, rows, chosen_LTE, self.model.config)

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def _wants_more(request: Request, num_tokens: int) -> bool:
    """Whether the request wants more from a step than its last logits and numbers of experts."""
    sampling = request.sampling
    if sampling.prompt_logprobs and not request.num_output:
        return True
    return sampling.token_experts and num_tokens == request.num_uncomputed


def _tokens(request: Request, num_tokens: int) -> list[int]:
    """The next `num_tokens` tokens to compute."""
    return request.token_ids[request.num_computed : request.num_computed + num_tokens]


def _spans(plan: Plan) -> list[SequenceSpan]:
    """Where each request's tokens lie in the flat batch."""
    spans: list[SequenceSpan] = []
    start = 0
    for request, num_tokens in plan:
        context = request.num_computed + num_tokens
        spans.append(SequenceSpan(start, num_tokens, context, request.blocks))
        start += num_tokens
    return spans


def _rows(plan: Plan, spans: Sequence[SequenceSpan]) -> tuple[list[int], list[range]]:
    """Rows of the batch that need logits.

    Returns:
        The last row of each request whose known tokens are all computed by this step; and per plan
        entry the rows that predict a prompt token (empty unless the request wants them).
    """
    ready: list[int] = []
    prompt: list[range] = []
    for (request, num_tokens), span in zip(plan, spans, strict=True):
        end = span.start + span.length
        if num_tokens == request.num_uncomputed:
            ready.append(end - 1)
        wanted = request.sampling.prompt_logprobs and not request.num_output
        # Position p predicts token p + 1, so the prompt's last position predicts no prompt token.
        last = min(end, span.start + request.prompt_len - 1 - request.num_computed)
        prompt.append(range(span.start, last) if wanted else range(0))
    return ready, prompt


def _prompt_parts(plan: Plan, rows: list[range], logits_NV: Tensor) -> list[PromptPart]:
    """Split the rows that predict prompt tokens by request, and look those tokens up."""
    parts: list[PromptPart] = []
    start = 0
    for (request, _), wanted in zip(plan, rows, strict=True):
        if wanted:
            first = request.num_computed + 1
            targets = request.prompt_ids[first : first + len(wanted)]
            rows_nV = logits_NV[start : start + len(wanted)]
            tokens = token_logprobs(rows_nV, targets, request.sampling.prompt_top_n)
            parts.append(PromptPart(request, first, tokens))
            start += len(wanted)
    return parts


def _count_experts(
    trace: Trace, spans: Sequence[SequenceSpan], ready_rows: Sequence[int]
) -> tuple[list[int], list[int], list[int], list[int]]:
    """What `_split_counts` returns, for a step that ran without a graph."""
    counts_LT, union_L = trace.counts()
    # One transfer brings the totals of the tokens, the totals of the layers, and the distinct
    # experts.
    numbers = torch.cat([counts_LT.sum(0), counts_LT.sum(1), union_L]).tolist()
    return _split_counts(numbers, spans, ready_rows)


def _split_counts(
    numbers: list[int], spans: Sequence[SequenceSpan], ready_rows: Sequence[int]
) -> tuple[list[int], list[int], list[int], list[int]]:
    """(last_activated, activated, layer_activated, layer_loaded) of a `StepResult`.

    Args:
        numbers: experts of each token over all layers, of each layer over all tokens, and the
            distinct ones of each layer.
        spans, ready_rows: of the step's batch.
    """
    tokens = sum(span.length for span in spans)
    layers = (len(numbers) - tokens) // 2
    per_token = numbers[:tokens]
    activated = [sum(per_token[s.start : s.start + s.length]) for s in spans]
    last = [per_token[row] for row in ready_rows]
    return last, activated, numbers[tokens : tokens + layers], numbers[tokens + layers :]
