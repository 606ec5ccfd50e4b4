"""Models of well-known shapes with random weights, to measure speed with.

OPT's matrices, with this engine's norms and positions around them: the widths, heads, neurons and
vocabulary of OPT-125M and OPT-1.3B, whose FFNs are plain ReLU like ours. Neither the weights nor
the routers are trained, so each token chooses its own experts; real text, and experts that are
clustered, correlate, and a batch of them reads fewer experts than these do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.config import EngineConfig, ExpertConfig, ModelConfig, check_choice, check_range
from engine.model.attention import KVCache
from engine.model.decoder import Decoder
from engine.policy import ExpertPolicy
from engine.serving.engine import Engine
from engine.serving.request import SamplingParams
from engine.text.tokenizer import END_OF_TEXT, Tokenizer

CHOSEN: Final = {32: 6, 64: 8}  # experts per token, of how many
MAX_SEQS: Final = 64
_NORMAL_CHUNK: Final = 1 << 24


@dataclass(frozen=True)
class Shape:
    """What decides the size of the matrices; heads are as many for keys and values as queries."""

    hidden: int
    layers: int
    neurons: int
    heads: int
    vocabulary: int
    positions: int = 2048


SHAPES: Final = {
    "opt-125m": Shape(768, 12, 3072, 12, 50272),
    "opt-1.3b": Shape(2048, 24, 8192, 32, 50272),
    "tiny": Shape(64, 2, 256, 4, 512),  # measures nothing; for tests
}


def shape_named(name: str) -> Shape:
    """The shape; raises ConfigError if there is none of this name."""
    check_choice("shape", name, tuple(SHAPES))
    return SHAPES[name]


def chosen_of(num_experts: int) -> int:
    """How many experts the sparse side uses; raises ConfigError unless they are 32 or 64."""
    check_choice("experts", str(num_experts), tuple(map(str, CHOSEN)))
    return CHOSEN[num_experts]


def model_config(shape: Shape, num_experts: int, dtype: torch.dtype) -> ModelConfig:
    return ModelConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.neurons,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.positions,
        experts=ExpertConfig(num_experts, shape.neurons // num_experts),
        torch_dtype=str(dtype).removeprefix("torch."),
    )


def made_up_tokenizer(vocabulary: int) -> Tokenizer:
    """As many tokens as the model has, so that detokenising costs what it costs for real text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [END_OF_TEXT, *alphabet, *(f"Ġword{i}" for i in range(vocabulary))]
    vocab = {word: number for number, word in enumerate(words[:vocabulary])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)


@torch.no_grad()
def random_checkpoint(
    config: ModelConfig, seed: int = 0, weights_of: Checkpoint | None = None
) -> Checkpoint:
    """A checkpoint in memory, in the type that `config` names.

    The layers outweigh the tied embedding, so that greedy output is not one token for ever.

    Args:
        config: the model's shape.
        seed: of weights and routers.
        weights_of: share this checkpoint's weights, of the same shape but for its experts, instead
            of making new ones.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = Decoder(config)
    dtype = getattr(torch, config.torch_dtype)
    shared = weights_of.model.state_dict() if weights_of is not None else {}
    tensors: dict[str, Tensor] = {}
    for name, meta in model.state_dict().items():
        if name in shared and not name.endswith("ffn.router"):
            tensors[name] = shared[name]
        elif meta.dim() == 1:
            tensors[name] = torch.ones(meta.shape, dtype=dtype)
        else:
            is_router = name.endswith("ffn.router")
            std = 0.02 if name == "embedding.weight" else meta.shape[-1] ** -0.5
            kind = torch.float32 if is_router else dtype
            tensors[name] = _normal(meta.shape, std, kind, generator)
    model.load_state_dict(tensors, assign=True)
    model.materialize_tables("cpu")
    tokenizer = made_up_tokenizer(config.vocab_size)
    model.eval().requires_grad_(False)
    return Checkpoint(Path("random"), config, model, tokenizer, {}, "0" * 64)


def _normal(
    shape: Sequence[int], std: float, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Normal numbers, drawn in float32 (bfloat16 would repeat itself) a piece at a time."""
    result = torch.empty(shape, dtype=dtype)
    flat = result.view(-1)
    for start in range(0, flat.numel(), _NORMAL_CHUNK):
        piece = flat[start : start + _NORMAL_CHUNK]
        piece.copy_(torch.empty(piece.shape).normal_(0.0, std, generator=generator))
    return result


def engine_config(config: ModelConfig, kv_tokens: int, threads: int) -> EngineConfig:
    """The defaults, with room for `kv_tokens` tokens in the cache and no cache of prefixes."""
    check_range("threads", threads, 0, 1024)
    values: dict[str, Any] = {"kv_cache_bytes": kv_tokens * kv_token_bytes(config)}
    values |= {"max_num_seqs": MAX_SEQS, "num_threads": threads}
    if "prefix_caching" in {f.name for f in dataclasses.fields(EngineConfig)}:
        values["prefix_caching"] = False
    return EngineConfig(**values)


def kv_token_bytes(config: ModelConfig) -> int:
    """Bytes of one token's keys and values."""
    dtype = getattr(torch, config.torch_dtype)
    heads, layers = config.num_key_value_heads, config.num_hidden_layers
    return KVCache.bytes_per_block(layers, 1, heads, config.head_dim, dtype)


class EngineServer:
    """This engine under one policy, as a `benchmarks.load.Server`."""

    def __init__(self, engine: Engine, policy: ExpertPolicy) -> None:
        self.engine = engine
        self.policy = policy

    def add(self, request_id: str, prompt: list[int], new_tokens: int) -> None:
        sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        request = self.engine.make_request(prompt, sampling, self.policy, request_id=request_id)
        self.engine.add(request)

    def step(self) -> list[str]:
        return [event.request_id for event in self.engine.step() if event.token is not None]

    @property
    def busy(self) -> bool:
        return self.engine.has_work()


@dataclass(frozen=True)
class StepBytes:
    """What one decoding step must read from memory at least, in bytes.

    Attributes:
        attention: the projections of all layers.
        head: the output matrix.
        experts: of the FFNs, those experts that any token of the batch uses.
        router: the routers; 0 when dense.
        keys_values: of the whole context of every request.
    """

    attention: int
    head: int
    experts: int
    router: int
    keys_values: int

    @property
    def total(self) -> int:
        return self.attention + self.head + self.experts + self.router + self.keys_values


def step_bytes(
    config: ModelConfig, experts_read: float, context: int, *, sparse: bool
) -> StepBytes:
    """The bytes of a step.

    Args:
        config: the model.
        experts_read: distinct experts that the step uses, summed over the layers.
        context: tokens whose keys and values are read, summed over the requests.
        sparse: whether routers are read.
    """
    itemsize = getattr(torch, config.torch_dtype).itemsize
    width, layers = config.hidden_size, config.num_hidden_layers
    kv_width = config.num_key_value_heads * config.head_dim
    return StepBytes(
        attention=layers * (2 * width + 2 * kv_width) * width * itemsize,
        head=config.vocab_size * width * itemsize,
        experts=round(experts_read * 2 * config.experts.expert_size * width * itemsize),
        router=layers * config.experts.num_experts * width * 4 if sparse else 0,
        keys_values=context * kv_token_bytes(config),
    )


def limit_share(needed_bytes: float, bytes_per_second: float, milliseconds: float) -> float:
    """The least time in which memory could deliver the bytes, over the time that it took."""
    return needed_bytes / bytes_per_second * 1e3 / milliseconds
