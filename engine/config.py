"""Frozen configurations, validated at construction; unknown keys raise.

`ModelConfig` and `ExpertConfig` are what a checkpoint's `config.json` says (Hugging Face's names
where they exist); `EngineConfig` is what a host decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from engine.errors import ConfigError, InvalidRequest, require
from engine.policy import ExpertPolicy

MODEL_TYPE: Final = "ambidex"
DTYPES: Final = ("float32", "bfloat16", "float16")
ACTIVATIONS: Final = ("relu", "relu2", "fatrelu", "drelu")
NORMS: Final = ("rmsnorm", "layernorm", "layernorm1p")
POSITIONS: Final = ("rope", "learned")
ROPE_TYPES: Final = ("linear", "dynamic", "yarn", "llama3")
MAX_EXPERTS: Final = 512  # the routing kernel ranks a token's experts in registers


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless `low <= value <= high`; whole bounds ask for a whole number."""
    if isinstance(low, int) and isinstance(high, int):
        whole = isinstance(value, int) and not isinstance(value, bool)
        require(whole, f"{name} must be a whole number from {low} to {high}, got {value!r}")
    require(low <= value <= high, f"{name} must be between {low} and {high}, got {value}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `choices`."""
    require(value in choices, f"{name} must be one of {', '.join(choices)}; got {value!r}")


def known_fields(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` as keyword arguments of the dataclass `cls`; raises ConfigError on unknown keys."""
    names = {f.name for f in dataclasses.fields(cls) if f.init}
    unknown = sorted(set(values) - names)
    require(not unknown, f"{where} has unknown keys: {', '.join(unknown)}")
    return dict(values)


@dataclass(frozen=True)
class QualityPoint:
    """Held-out perplexity when each token uses `top_k` experts.

    Attributes:
        top_k: experts per token.
        share: top_k / num_experts.
        perplexity: held-out perplexity of the routed model.
        relative: perplexity over that of the dense mode, minus 1.
    """

    top_k: int
    share: float
    perplexity: float
    relative: float


@dataclass(frozen=True)
class ExpertConfig:
    """How the neurons of every FFN are grouped, and how that was found to work.

    Attributes:
        num_experts: experts per layer; expert e owns neurons e*S .. (e+1)*S.
        expert_size: S, neurons per expert.
        default_policy: what the policy `auto` means for this checkpoint, such as "top_k:8".
        quality: measured quality by k, ascending.
    """

    num_experts: int
    expert_size: int
    default_policy: str = "dense"
    quality: tuple[QualityPoint, ...] = ()

    def __post_init__(self) -> None:
        check_range("experts.num_experts", self.num_experts, 1, MAX_EXPERTS)
        check_range("experts.expert_size", self.expert_size, 1, 1 << 20)
        try:
            policy = ExpertPolicy.parse(self.default_policy)
            policy.validate(self.num_experts)
        except InvalidRequest as error:
            raise ConfigError(f"experts.default_policy: {error}") from error
        require(
            policy.kind in ("dense", "top_k", "mass"),
            f"experts.default_policy must be dense, top_k:N or mass:SHARE, not {policy}",
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        fields = known_fields(cls, values, "config.json: experts")
        points = fields.pop("quality", ())
        quality = tuple(
            QualityPoint(**known_fields(QualityPoint, p, "config.json: experts.quality"))
            for p in points
        )
        return cls(quality=quality, **fields)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for longer contexts, in transformers' keys.

    Attributes:
        rope_type: "linear" divides all frequencies by `factor`; "yarn" (Peng et al. 2023) and
            "llama3" (Llama 3.1) divide the low ones; "dynamic" changes them only beyond
            `max_position_embeddings`, which is where a request ends here.
        factor: at least 1.
        original_max_position_embeddings: the context of pre-training (yarn, llama3).
        low_freq_factor, high_freq_factor: the wavelengths between which llama3 interpolates.
        beta_fast, beta_slow: the rotations between which yarn interpolates.
        attention_factor: what yarn multiplies cosines and sines by; None: derived from `factor`.
        mscale, mscale_all_dim: what `attention_factor` is derived from instead, where both are set.
        truncate: whether yarn's bounds are rounded to whole dimensions.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        check_choice("rope_scaling.rope_type", self.rope_type, ROPE_TYPES)
        check_range("rope_scaling.factor", self.factor, 1.0, 1e4)
        if self.rope_type in ("yarn", "llama3"):
            original = self.original_max_position_embeddings or 0
            check_range("rope_scaling.original_max_position_embeddings", original, 1, 1 << 20)
        check_range("rope_scaling.low_freq_factor", self.low_freq_factor, 1e-3, 1e3)
        require(
            self.low_freq_factor < self.high_freq_factor <= 1e3,
            f"rope_scaling.high_freq_factor must be above low_freq_factor {self.low_freq_factor} "
            f"and at most 1000, got {self.high_freq_factor}",
        )
        check_range("rope_scaling.beta_slow", self.beta_slow, 1e-3, 1e4)
        check_range("rope_scaling.beta_fast", self.beta_fast, self.beta_slow, 1e4)
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            value = getattr(self, name)
            if value is not None:
                check_range(f"rope_scaling.{name}", value, 0.0, 1e3)


@dataclass(frozen=True)
class ModelConfig:
    """The decoder's shape. Keys are Hugging Face's where they exist.

    The defaults of the fields after `eos_token_id` describe the models that are trained here;
    imported models of other families set them.

    Attributes:
        rms_norm_eps: what every norm adds to the variance (or mean square), whichever norm it is.
        hidden_act: "relu"; "relu2", its square; "fatrelu", zero up to `hidden_act_param`; "drelu",
            ReLU of both the gate and what it multiplies.
        head_dim: width of an attention head; 0 means hidden_size / num_attention_heads.
        norm: "layernorm1p" is a LayerNorm whose weight is stored less 1 (Nemotron).
        do_layer_norm_before: whether norms come before attention and FFN, and after the last layer;
            else after each sum, and nowhere else.
        position_embedding_type: rotary, or learned and added to the embedding.
        position_offset: the row of learned positions that the first token takes.
        partial_rotary_factor: share of a head's dimensions that is rotated. The others lie beside
            them: each half of a head has its rotated dimensions first.
        sliding_window: how many last tokens a token sees, itself included; None means all.
        attention_bias: whether the projections to queries, keys, values and output have biases.
        mlp_bias: whether both products of an FFN have biases; gated FFNs have none.
        gated_mlp: act(x @ gate.T) * (x @ up.T) instead of act(x @ up.T).
        word_embed_proj_dim: width of the embedding, projected to hidden_size; 0: the same.
        embedding_multiplier: what embeddings are multiplied by.
        residual_multiplier: what the outputs of attention and FFN are multiplied by.
        logits_scaling: the last hidden state is divided by it before the head.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    experts: ExpertConfig
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    hidden_act: str = "relu"
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    torch_dtype: str = "float32"
    bos_token_id: int = 0
    eos_token_id: int = 0
    hidden_act_param: float = 0.0
    head_dim: int = 0
    norm: str = "rmsnorm"
    do_layer_norm_before: bool = True
    position_embedding_type: str = "rope"
    position_offset: int = 0
    partial_rotary_factor: float = 1.0
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = False
    word_embed_proj_dim: int = 0
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_attention()
        check_choice("norm", self.norm, NORMS)
        check_range("rms_norm_eps", self.rms_norm_eps, 1e-12, 1e-2)
        check_choice("hidden_act", self.hidden_act, ACTIVATIONS)
        check_range("hidden_act_param", self.hidden_act_param, 0.0, 1e3)
        require(
            self.hidden_act_param == 0 or self.hidden_act == "fatrelu",
            f"hidden_act_param is fatrelu's threshold; {self.hidden_act} has none",
        )
        require(self.gated_mlp or self.hidden_act != "drelu", "hidden_act drelu needs gated_mlp")
        require(not (self.gated_mlp and self.mlp_bias), "gated_mlp takes no mlp_bias")
        for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
            check_range(name, getattr(self, name), 1e-6, 1e6)
        check_choice("torch_dtype", self.torch_dtype, DTYPES)
        check_range("bos_token_id", self.bos_token_id, 0, self.vocab_size - 1)
        check_range("eos_token_id", self.eos_token_id, 0, self.vocab_size - 1)
        require(
            self.experts.num_experts * self.experts.expert_size == self.intermediate_size,
            f"experts: {self.experts.num_experts} experts of {self.experts.expert_size} neurons "
            f"do not make up intermediate_size {self.intermediate_size}",
        )

    def _check_sizes(self) -> None:
        check_range("vocab_size", self.vocab_size, 2, 1 << 20)
        check_range("hidden_size", self.hidden_size, 2, 1 << 16)
        check_range("intermediate_size", self.intermediate_size, 1, 1 << 20)
        check_range("num_hidden_layers", self.num_hidden_layers, 1, 1024)
        check_range("num_attention_heads", self.num_attention_heads, 1, 1024)
        check_range("num_key_value_heads", self.num_key_value_heads, 1, self.num_attention_heads)
        check_range("max_position_embeddings", self.max_position_embeddings, 1, 1 << 20)
        check_range("word_embed_proj_dim", self.word_embed_proj_dim, 0, 1 << 16)
        if not self.word_embed_proj_dim:
            object.__setattr__(self, "word_embed_proj_dim", self.hidden_size)

    def _check_attention(self) -> None:
        heads = self.num_attention_heads
        check_range("head_dim", self.head_dim, 0, 1 << 12)
        if not self.head_dim:
            whole = self.hidden_size % heads == 0
            even = self.position_embedding_type != "rope" or self.hidden_size % (2 * heads) == 0
            require(
                whole and even,
                f"hidden_size {self.hidden_size} must be an even multiple of num_attention_heads "
                f"{heads}",
            )
            object.__setattr__(self, "head_dim", self.hidden_size // heads)
        require(
            heads % self.num_key_value_heads == 0,
            f"num_key_value_heads {self.num_key_value_heads} must divide num_attention_heads "
            f"{heads}",
        )
        check_choice("position_embedding_type", self.position_embedding_type, POSITIONS)
        check_range("position_offset", self.position_offset, 0, 1 << 10)
        check_range("rope_theta", self.rope_theta, 1.0, 1e9)
        check_range("partial_rotary_factor", self.partial_rotary_factor, 1e-3, 1.0)
        require(
            not self.is_rotary or (self.head_dim % 2 == 0 and self.rotary_dim % 2 == 0),
            f"head_dim {self.head_dim} and what partial_rotary_factor {self.partial_rotary_factor} "
            "leaves of it must be even",
        )
        if self.sliding_window is not None:
            check_range("sliding_window", self.sliding_window, 1, 1 << 20)

    @property
    def is_rotary(self) -> bool:
        return self.position_embedding_type == "rope"

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def window(self) -> int:
        """How many tokens a token sees if a sliding window limits it; 0 if it sees all."""
        window = self.sliding_window or 0
        return window if window < self.max_position_embeddings else 0

    @property
    def num_parameters(self) -> int:
        """Trainable parameters, the router excluded (it is derived from `up`)."""
        d, f, width = self.hidden_size, self.intermediate_size, self.word_embed_proj_dim
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        norm = d if self.norm == "rmsnorm" else 2 * d
        layer = 2 * d * q + 2 * d * kv + (3 if self.gated_mlp else 2) * d * f + 2 * norm
        layer += (q + 2 * kv + d) * self.attention_bias + (f + d) * self.mlp_bias
        total = self.num_hidden_layers * layer + norm * self.do_layer_norm_before
        total += self.vocab_size * width * (1 if self.tie_word_embeddings else 2)
        total += 2 * d * width if width != d else 0
        if not self.is_rotary:
            total += (self.max_position_embeddings + self.position_offset) * d
        return total

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`; widths that follow from others are left out."""
        values = dataclasses.asdict(self)
        if self.head_dim * self.num_attention_heads == self.hidden_size:
            del values["head_dim"]
        if self.word_embed_proj_dim == self.hidden_size:
            del values["word_embed_proj_dim"]
        return {"model_type": MODEL_TYPE, "architectures": ["AmbidexForCausalLM"], **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Parse `config.json`.

        Raises:
            ConfigError: for another model type, unknown or missing keys, values out of range.
        """
        fields = dict(values)
        model_type = fields.pop("model_type", None)
        require(
            model_type == MODEL_TYPE,
            f"config.json: model_type must be {MODEL_TYPE!r}, got {model_type!r}",
        )
        fields.pop("architectures", None)
        fields = known_fields(cls, fields, "config.json")
        try:
            fields["experts"] = ExpertConfig.from_dict(fields["experts"])
            scaling = fields.get("rope_scaling")
            if scaling is not None:
                scaling = known_fields(RopeScaling, scaling, "config.json: rope_scaling")
                fields["rope_scaling"] = RopeScaling(**scaling)
            return cls(**fields)
        except (TypeError, KeyError) as error:
            raise ConfigError(f"config.json: {error}") from error


@dataclass(frozen=True)
class Option:
    """What a field of `EngineConfig` means, and which values it takes.

    Attributes:
        help: what it means.
        low, high: the range of a number.
        choices: the texts that a text may be; a field with neither is true or false.
    """

    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    def check(self, name: str, value: Any) -> None:
        """Raise ConfigError unless the field `name` takes `value`."""
        if self.choices:
            check_choice(name, value, self.choices)
        elif self.low is not None and self.high is not None:
            check_range(name, value, self.low, self.high)
        else:
            whether = isinstance(value, bool)
            require(whether, f"{name} must be true or false, got {value!r}")


def _option(default: Any, help: str, low: float | None = None, high: float | None = None) -> Any:
    return field(default=default, metadata={"option": Option(help, low, high)})


def _choice(default: str, help: str, *choices: str) -> Any:
    return field(default=default, metadata={"option": Option(help, choices=choices)})


@dataclass(frozen=True)
class EngineConfig:
    """What a host decides about running a model. Each field has an `Option` in its metadata, from
    which the server makes its settings and the help of its command line.

    On CUDA, graphs cost some memory, and a pause whenever a new batch size is first seen. In every
    `sample_every`-th step the engine measures on a few tokens what the router missed: such a step
    computes their whole first product, and runs without graphs. With more than `max_waiting`
    requests, or `max_waiting_tokens` prompt tokens, in the queue the next one is refused as
    `Overloaded`.
    """

    device: str = _choice("cpu", "where the model runs", "cpu", "cuda")
    dtype: str = _choice(
        "auto", "type of weights and KV cache; auto takes the checkpoint's", "auto", *DTYPES
    )
    block_size: int = _option(16, "tokens per KV block", 1, 1024)
    kv_cache_bytes: int = _option(256 << 20, "memory of the KV cache, bytes", 1 << 10, 1 << 44)
    max_model_len: int = _option(
        0, "prompt plus output tokens; 0 takes the model's limit", 0, 1 << 20
    )
    max_num_seqs: int = _option(64, "requests that run at the same time", 1, 4096)
    max_num_batched_tokens: int = _option(
        512, "tokens of one step: decodes and prompt chunks", 1, 1 << 17
    )
    max_waiting: int = _option(256, "requests that may wait", 1, 1 << 20)
    max_waiting_tokens: int = _option(1 << 18, "prompt tokens that may wait", 1, 1 << 30)
    prefix_caching: bool = _option(True, "take keys and values of known prefixes from the cache")
    num_threads: int = _option(0, "CPU threads; 0 leaves torch's choice", 0, 1024)
    cuda_graphs: bool = _option(True, "on CUDA, replay decoding steps from captured graphs")
    sample_every: int = _option(
        0,
        "measure router coverage in every n-th step, which takes longer; 0: never",
        0,
        1 << 20,
    )

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            each.metadata["option"].check(each.name, getattr(self, each.name))
        require(
            self.max_num_seqs <= self.max_num_batched_tokens,
            f"max_num_seqs {self.max_num_seqs} must not exceed max_num_batched_tokens "
            f"{self.max_num_batched_tokens}: every running request decodes one token a step",
        )
