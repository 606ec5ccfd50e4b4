"""What an import will do: shapes, experts, tokens, and what it needs. No tensor is read for it.

Shapes: D model, F neurons, E experts, S neurons per expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from engine.config import ExpertConfig, ModelConfig
from engine.policy import ExpertPolicy
from training.experts.shares import top_k_of
from training.importing.options import ImportOptions, choose_experts

SHARES: Final = tuple(Fraction(n, 16) for n in (1, 2, 4, 6, 8, 12))
_KINDS: Final = ("routed", "oracle", "random")
_BATCH_TOKENS: Final = 2048
# A default import may spend this many operations on each kind of tokens: minutes on two CPU cores.
_CALIBRATION_FLOPS: Final = 12e12
_QUALITY_FLOPS: Final = 6e12
_LEAST_TOKENS, _MOST_TOKENS = 2048, 16384


@dataclass(frozen=True)
class Stream:
    """One way to choose experts, under which held-out tokens go through the model.

    Attributes:
        kind: dense; routed, oracle or random, each with `k` experts a token.
        k: 0 if dense.
    """

    kind: str
    k: int = 0

    @property
    def name(self) -> str:
        return self.kind if self.kind == "dense" else f"{self.kind}:{self.k}"

    @property
    def policy(self) -> ExpertPolicy:
        """What the model's layers run; chance takes the place of a `random` one's oracle."""
        if self.kind == "dense":
            return ExpertPolicy.dense()
        return ExpertPolicy.top_k(self.k) if self.kind == "routed" else ExpertPolicy.oracle(self.k)


def streams(num_experts: int) -> tuple[Stream, ...]:
    """Dense, and each kind of choice at each of SHARES, without repeats."""
    ks = sorted({top_k_of(share, num_experts) for share in SHARES})
    return (Stream("dense"), *(Stream(kind, k) for kind in _KINDS for k in ks))


@dataclass(frozen=True)
class Plan:
    """An import, decided.

    Attributes:
        family: the source's family.
        source_dtype: the type of the source's weights.
        config: the configuration of the checkpoint to write, apart from its measured quality.
        why: how the number of experts came about.
        calibration_tokens, quality_tokens: at most.
        options: what the user decided.
    """

    family: str
    source_dtype: str
    config: ModelConfig
    why: str
    calibration_tokens: int
    quality_tokens: int
    options: ImportOptions

    @classmethod
    def make(cls, family: str, config: ModelConfig, options: ImportOptions) -> Plan:
        """Decide what the options leave open.

        Raises:
            ConfigError: if the model's neurons cannot be cut as asked.
        """
        experts, why = choose_experts(
            config.intermediate_size, options.num_experts, options.expert_size
        )
        source_dtype = config.torch_dtype
        dtype = options.dtype
        if dtype == "auto":
            dtype = "float32" if source_dtype == "float32" else "bfloat16"
        return cls(
            family,
            source_dtype,
            dataclasses.replace(
                config,
                experts=ExpertConfig(experts, config.intermediate_size // experts),
                torch_dtype=dtype,
            ),
            why,
            options.calibration_tokens or _affordable(config, _CALIBRATION_FLOPS),
            options.quality_tokens or _affordable(config, _QUALITY_FLOPS),
            options,
        )

    @property
    def streams(self) -> tuple[Stream, ...]:
        return streams(self.config.experts.num_experts)

    @property
    def item_bytes(self) -> int:
        return 4 if self.config.torch_dtype == "float32" else 2

    @property
    def layer_parameters(self) -> int:
        return _layer_parameters(self.config)

    @property
    def other_parameters(self) -> int:
        config = self.config
        return config.num_parameters - config.num_hidden_layers * self.layer_parameters

    @property
    def state_bytes(self) -> int:
        """Hidden states of all tokens, under every choice of experts."""
        rows = self.calibration_tokens + len(self.streams) * self.quality_tokens
        return rows * self.config.hidden_size * self.item_bytes

    @property
    def memory_bytes(self) -> int:
        """The most that is held at once, about, above what Python and torch take themselves."""
        config = self.config
        up, neurons = config.hidden_size * config.intermediate_size, config.intermediate_size
        experts, tokens = config.experts.num_experts, self.calibration_tokens
        rest = self.other_parameters * self.item_bytes
        # A layer is in memory twice: as read or as its kernels need it, and as it is written.
        layer = self.layer_parameters * (self.item_bytes + max(self.item_bytes, self.source_bytes))
        # Clustering holds rows and centroids in float32, and similarities and prices in both types.
        clustering = 3 * 4 * up + 6 * 8 * neurons * experts
        fitting = 2 * 4 * tokens * (config.hidden_size + 3 * experts)
        running = 3 * 4 * _BATCH_TOKENS * neurons
        reading = self.other_parameters * self.source_bytes
        return self.state_bytes + rest + max(layer + max(clustering, fitting + running), reading)

    @property
    def source_bytes(self) -> int:
        return 4 if self.source_dtype == "float32" else 2

    @property
    def disk_bytes(self) -> int:
        """The checkpoint, and the states of a layer twice while it is written."""
        return self.config.num_parameters * self.item_bytes + 2 * self.state_bytes

    @property
    def flops(self) -> float:
        """Operations of all products with weights, about."""
        config, parameters = self.config, self.layer_parameters
        matrices = 3 if config.gated_mlp else 2
        ffn = matrices * config.hidden_size * config.intermediate_size
        base, total = parameters - ffn, float(self.calibration_tokens * 2 * parameters)
        for stream in self.streams:
            share = stream.k / config.experts.num_experts if stream.k else 1.0
            used = base + ffn * share + (ffn / 2 if stream.kind == "oracle" else 0)
            total += 2 * self.quality_tokens * used
        total += 5 * 2 * self.calibration_tokens * ffn / 2  # mass, study
        head = len(self.streams) * self.quality_tokens * config.vocab_size * config.hidden_size
        return total * config.num_hidden_layers + 2 * head

    @property
    def single_flops(self) -> float:
        """Operations in float32 whatever the dtype: clustering and fitting, about."""
        config = self.config
        neurons, experts = config.intermediate_size, config.experts.num_experts
        width = config.hidden_size
        lloyd = 12 * neurons * experts * (4 * width + 5 * 2 * experts)
        fit = 75 * 6 * self.calibration_tokens * width * experts
        fitted = self.options.router == "fitted"
        return float(config.num_hidden_layers * (lloyd + fit * fitted))

    def describe(self) -> Iterator[tuple[str, str]]:
        """(what, how much) for people."""
        config, experts = self.config, self.config.experts
        yield "family", self.family
        yield "parameters", f"{config.num_parameters:,} in {self.source_dtype}"
        yield "layers", f"{config.num_hidden_layers} of width {config.hidden_size}"
        yield (
            "attention",
            f"{config.num_attention_heads} heads, {config.num_key_value_heads} for keys and "
            f"values, context {config.max_position_embeddings}",
        )
        yield "FFN", f"{config.intermediate_size:,} neurons, {config.hidden_act}"
        yield "vocabulary", f"{config.vocab_size:,}"
        yield "experts", f"{experts.num_experts} of {experts.expert_size} neurons ({self.why})"
        yield "clustering", f"by {self.options.cluster}, routers {self.options.router}"
        yield (
            "tokens",
            f"{self.calibration_tokens:,} to calibrate, {self.quality_tokens:,} held out for "
            f"{len(self.streams)} points of the quality curve",
        )
        yield "written as", config.torch_dtype
        yield "memory", f"about {size_text(self.memory_bytes)} above Python's own"
        yield "disk", f"{size_text(self.disk_bytes)} while it runs"


def _layer_parameters(config: ModelConfig) -> int:
    """The number of parameters of one layer, from the shape's own count."""
    two = dataclasses.replace(config, num_hidden_layers=2)
    one = dataclasses.replace(config, num_hidden_layers=1)
    return two.num_parameters - one.num_parameters


def _affordable(config: ModelConfig, flops: float) -> int:
    """Tokens that go through the model once for so many operations, rounded, within bounds."""
    tokens = min(max(flops / (2 * config.num_parameters), _LEAST_TOKENS), _MOST_TOKENS)
    return int(tokens) // 512 * 512


def size_text(count: float) -> str:
    """Bytes for people."""
    return f"{count / (1 << 30):.1f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.0f} MiB"
