"""`config.json` of the families, read and written.

Keys and defaults are transformers' own, or those of the code that came with the first models.

All readers return a model whose neurons are one expert, and raise KeyError for a key that is
missing and ConfigError for a value that cannot be run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from engine.config import ExpertConfig, ModelConfig, RopeScaling, known_fields
from engine.errors import ConfigError, require
from training.importing.formats.smooth import SMOOTH

Values = Mapping[str, Any]

DEFAULT_ACTIVATIONS: Final = {
    ("activation_function", "OPT"): "relu",
    ("activation_function", "GPT-2"): "gelu_new",
    ("hidden_act", "Llama"): "silu",
    ("hidden_act", "Mistral"): "silu",
    ("hidden_act", "Bamboo"): "relu",
    ("hidden_act", "MiniCPM"): "silu",
    ("hidden_act", "Nemotron"): "relu2",
    ("hidden_act", "Arcee"): "relu2",
}
_NAMES: Final = {"relu_squared": "relu2", "relu2": "relu2", "relu": "relu"}


def activation(values: Values, key: str, default: str) -> str:
    """Our name of the activation.

    Raises:
        ConfigError: it is not one whose outputs are exact zeros.
    """
    found = values.get(key) or default
    if found in SMOOTH:
        raise ConfigError(
            f"config.json: {key} {found!r} gives no exact zeros, so no neuron could be left out; "
            "train a ReLU model from it first: ambidex train --relufy --from DIR"
        )
    require(
        found in _NAMES or found == "fatrelu",
        f"config.json: {key} must be relu, relu2 or, with gates, fatrelu; got {found!r}",
    )
    return _NAMES.get(found, found)


def _token(values: Values, key: str, default: int) -> int:
    """A token's id; of several the first."""
    found = values.get(key, default)
    if isinstance(found, list):
        found = found[0] if found else None
    return default if found is None else int(found)


def _common(values: Values, bos: int, eos: int, *, tied: bool) -> dict[str, Any]:
    size = values["vocab_size"]
    return {
        "vocab_size": size,
        "tie_word_embeddings": bool(values.get("tie_word_embeddings", tied)),
        "bos_token_id": _token(values, "bos_token_id", bos if bos < size else 0),
        "eos_token_id": _token(values, "eos_token_id", eos if eos < size else 0),
    }


def one_expert(neurons: int) -> ExpertConfig:
    return ExpertConfig(num_experts=1, expert_size=neurons)


# --- rotary positions ----------------------------------------------------------------------------


def _rope(values: Values, partial: float = 1.0) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `partial_rotary_factor`, from the keys of either age."""
    new = values.get("rope_parameters")
    old = values.get("rope_scaling")
    found = dict(new if new is not None else old or {})
    theta = found.pop("rope_theta", values.get("rope_theta", 10_000.0))
    partial = found.pop("partial_rotary_factor", values.get("partial_rotary_factor", partial))
    kind = found.pop("rope_type", None) or found.pop("type", None) or "default"
    found.pop("type", None)
    scaling = None
    if kind != "default":
        longest = values["max_position_embeddings"]
        if kind in ("yarn", "llama3"):
            found.setdefault("original_max_position_embeddings", longest)
            original = found["original_max_position_embeddings"]
            if found.get("factor") is None:
                found["factor"] = longest / original
        require(
            found.get("factor") is not None,
            f"config.json: rope_scaling of rope_type {kind} needs a factor",
        )
        known = known_fields(RopeScaling, {"rope_type": kind, **found}, "config.json: rope_scaling")
        scaling = RopeScaling(**{k: v for k, v in known.items() if v is not None})
    return {
        "rope_theta": float(theta),
        "partial_rotary_factor": float(partial),
        "rope_scaling": scaling,
    }


def _write_rope(config: ModelConfig) -> dict[str, Any]:
    """Keys of the older age, which every transformers reads."""
    scaling = config.rope_scaling
    found: dict[str, Any] = {}
    if scaling is not None:
        found = {"rope_type": scaling.rope_type, "factor": scaling.factor}
        keys = {
            "llama3": (
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            ),
            "yarn": (
                *("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
                *("truncate", "original_max_position_embeddings"),
            ),
        }
        for key in keys.get(scaling.rope_type, ()):
            if getattr(scaling, key) is not None:
                found[key] = getattr(scaling, key)
    return {"rope_theta": config.rope_theta, "rope_scaling": found or None}


# --- OPT -----------------------------------------------------------------------------------------


def read_opt(values: Values) -> ModelConfig:
    heads, width = values["num_attention_heads"], values["hidden_size"]
    bias = bool(values.get("enable_bias", True))
    return ModelConfig(
        **_common(values, 2, 2, tied=True),
        hidden_size=width,
        intermediate_size=values["ffn_dim"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=values["max_position_embeddings"],
        experts=one_expert(values["ffn_dim"]),
        rms_norm_eps=1e-5,
        hidden_act=activation(values, "activation_function", "relu"),
        norm="layernorm",
        do_layer_norm_before=bool(values.get("do_layer_norm_before", True)),
        position_embedding_type="learned",
        position_offset=2,
        attention_bias=bias,
        mlp_bias=bias,
        word_embed_proj_dim=values.get("word_embed_proj_dim") or width,
    )


def write_opt(config: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "ffn_dim": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "activation_function": config.hidden_act,
        "do_layer_norm_before": config.do_layer_norm_before,
        "enable_bias": config.mlp_bias,
        "word_embed_proj_dim": config.word_embed_proj_dim,
        "init_std": config.initializer_range,
    }


# --- Llama and its relatives ---------------------------------------------------------------------


def _llama(values: Values, *, tied: bool, act: str = "silu", eps: float = 1e-6) -> dict[str, Any]:
    heads, neurons = values["num_attention_heads"], values["intermediate_size"]
    act = activation(values, "hidden_act", act)
    threshold = float(values.get("hidden_act_param") or 0.0) if act == "fatrelu" else 0.0
    rope = _rope(values)
    require(
        rope["partial_rotary_factor"] == 1.0,
        "config.json: partial_rotary_factor must be 1 in this family",
    )
    return {
        **_common(values, 1, 2, tied=tied),
        **rope,
        "hidden_size": values["hidden_size"],
        "intermediate_size": neurons,
        "num_hidden_layers": values["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": values.get("num_key_value_heads") or heads,
        "head_dim": values.get("head_dim") or 0,
        "max_position_embeddings": values["max_position_embeddings"],
        "experts": one_expert(neurons),
        "rms_norm_eps": values.get("rms_norm_eps", eps),
        "initializer_range": values.get("initializer_range", 0.02),
        "hidden_act": act,
        "hidden_act_param": threshold,
        "attention_bias": bool(values.get("attention_bias", False)),
        "gated_mlp": True,
    }


def read_llama(values: Values) -> ModelConfig:
    return ModelConfig(**_llama(values, tied=False))


def write_llama(config: ModelConfig) -> dict[str, Any]:
    found = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "hidden_act": config.hidden_act,
        "attention_bias": config.attention_bias,
        **_write_rope(config),
    }
    if config.hidden_act == "fatrelu":
        found["hidden_act_param"] = config.hidden_act_param
    return found


def read_mistral(values: Values) -> ModelConfig:
    window = values.get("sliding_window", 4096)
    return ModelConfig(**_llama(values, tied=False), sliding_window=window)


def write_mistral(config: ModelConfig) -> dict[str, Any]:
    return {**write_llama(config), "sliding_window": config.sliding_window}


def read_bamboo(values: Values) -> ModelConfig:
    """Bamboo and TurboSparse-Mistral: `hidden_act: relu` stands for ReLU of gate and up."""
    found = _llama(values, tied=False, act="relu")
    require(
        found["hidden_act"] == "relu",
        f"config.json: hidden_act of a Bamboo model must be relu, got {values['hidden_act']!r}",
    )
    found["hidden_act"] = "drelu"
    return ModelConfig(**found, sliding_window=values.get("sliding_window", 4096))


def write_bamboo(config: ModelConfig) -> dict[str, Any]:
    return {**write_mistral(config), "hidden_act": "relu"}


def read_arcee(values: Values) -> ModelConfig:
    """A Llama without gates."""
    found = _llama(values, tied=False, act="relu2", eps=1e-5)
    found["gated_mlp"] = False
    return ModelConfig(**found, mlp_bias=bool(values.get("mlp_bias", False)))


def write_arcee(config: ModelConfig) -> dict[str, Any]:
    return {**write_llama(config), "mlp_bias": config.mlp_bias}


def read_minicpm(values: Values) -> ModelConfig:
    found = _llama(values, tied=True)
    return ModelConfig(
        **found,
        embedding_multiplier=float(values.get("scale_emb", 1)),
        residual_multiplier=values.get("scale_depth", 1) / math.sqrt(values["num_hidden_layers"]),
        logits_scaling=values["hidden_size"] / values.get("dim_model_base", 1),
    )


def write_minicpm(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_llama(config),
        "scale_emb": config.embedding_multiplier,
        "scale_depth": round(config.residual_multiplier * math.sqrt(config.num_hidden_layers), 10),
        "dim_model_base": round(config.hidden_size / config.logits_scaling, 10),
    }


# --- Nemotron ------------------------------------------------------------------------------------


def read_nemotron(values: Values) -> ModelConfig:
    heads, neurons = values["num_attention_heads"], values["intermediate_size"]
    return ModelConfig(
        **_common(values, 2, 3, tied=False),
        **_rope(values, partial=0.5),
        hidden_size=values["hidden_size"],
        intermediate_size=neurons,
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or 0,
        max_position_embeddings=values["max_position_embeddings"],
        experts=one_expert(neurons),
        rms_norm_eps=values.get("norm_eps", 1e-5),
        initializer_range=values.get("initializer_range", 0.0134),
        hidden_act=activation(values, "hidden_act", "relu2"),
        norm="layernorm1p",
        attention_bias=bool(values.get("attention_bias", False)),
        mlp_bias=bool(values.get("mlp_bias", False)),
    )


def write_nemotron(config: ModelConfig) -> dict[str, Any]:
    found = write_llama(config)
    found["norm_eps"] = found.pop("rms_norm_eps")
    partial = config.partial_rotary_factor
    return {**found, "mlp_bias": config.mlp_bias, "partial_rotary_factor": partial}


# --- GPT-2 ---------------------------------------------------------------------------------------


def read_gpt2(values: Values) -> ModelConfig:
    width, heads = values["n_embd"], values["n_head"]
    neurons = values.get("n_inner") or 4 * width
    return ModelConfig(
        **_common(values, 50256, 50256, tied=True),
        hidden_size=width,
        intermediate_size=neurons,
        num_hidden_layers=values["n_layer"],
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=values.get("n_positions", 1024),
        experts=one_expert(neurons),
        rms_norm_eps=values.get("layer_norm_epsilon", 1e-5),
        initializer_range=values.get("initializer_range", 0.02),
        hidden_act=activation(values, "activation_function", "gelu_new"),
        norm="layernorm",
        position_embedding_type="learned",
        attention_bias=True,
        mlp_bias=True,
    )


def write_gpt2(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_positions": config.max_position_embeddings,
        "layer_norm_epsilon": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "activation_function": config.hidden_act,
    }
