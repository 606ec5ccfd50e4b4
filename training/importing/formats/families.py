"""The families that can be imported: what their configurations and tensors are called.

Each family is a table. `Family.config` reads its `config.json`; `Family.write_config` is the
inverse; the weights map names below a layer (`{i}` is its number) and outside of layers. A tensor
or a setting that the table does not know is refused: nothing is guessed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from engine.config import ModelConfig
from engine.errors import ConfigError, require
from training.importing.formats import configs
from training.importing.formats.smooth import SMOOTH
from training.importing.formats.transforms import HEADS, SAME, TRANSPOSED, Transform


@dataclass(frozen=True)
class Weight:
    """One tensor of ours.

    Attributes:
        ours: its name; in a layer, below `layers.i`.
        theirs: the names of the tensors that it is made of.
        transform: how.
        when: says which models have it.
    """

    ours: str
    theirs: tuple[str, ...]
    transform: Transform = SAME
    when: Callable[[ModelConfig], bool] = lambda _: True


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        name: the family's name.
        model_types: the values of `model_type` that it goes by; the first is written.
        architecture: the class of transformers that is written.
        config: `config.json` to ours, with one expert; raises ConfigError.
        write_config: ours to `config.json`, less what all families have in common.
        layer, rest: weights of a layer, and outside of layers.
        activation_key: where `config.json` names the activation.
        fixed: settings that must have this value where they occur.
        buffers: regular expressions of tensors that are derived and so left out.
        prefix: how names begin, unless the file holds the bare model.
        in_transformers: whether the class is; else its authors' `config.json` names their code.
    """

    name: str
    model_types: tuple[str, ...]
    architecture: str
    config: Callable[[Mapping[str, Any]], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    layer: tuple[Weight, ...]
    rest: tuple[Weight, ...]
    activation_key: str = "hidden_act"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    prefix: str = "model."
    in_transformers: bool = True

    def read_config(self, values: Mapping[str, Any], *, relufy: bool = False) -> ModelConfig:
        """The model that a `config.json` describes, with all neurons in one expert.

        Args:
            values: its content.
            relufy: read GELU and SiLU as ReLU, for a model that is to be trained so.

        Raises:
            ConfigError: it describes what cannot be run.
        """
        for key, wanted in {**self.fixed, "quantization_config": None}.items():
            found = values.get(key, wanted)
            require(
                found == wanted,
                f"config.json: {key} is {found!r}; {self.name} models are read only where it is "
                f"{wanted!r}",
            )
        if relufy and values.get(self.activation_key, self.default_activation) in SMOOTH:
            values = {**values, self.activation_key: "relu"}
        try:
            return self.config(values)
        except KeyError as error:
            raise ConfigError(f"config.json: has no {error.args[0]}") from error
        except (TypeError, ValueError) as error:
            text = str(error)
            named = text if text.startswith("config.json") else f"config.json: {text}"
            raise ConfigError(named) from error

    @property
    def default_activation(self) -> str:
        return configs.DEFAULT_ACTIVATIONS[self.activation_key, self.name]


def _biased(config: ModelConfig) -> bool:
    return config.attention_bias


def _mlp_biased(config: ModelConfig) -> bool:
    return config.mlp_bias


def _untied(config: ModelConfig) -> bool:
    return not config.tie_word_embeddings


def _projected(config: ModelConfig) -> bool:
    return config.word_embed_proj_dim != config.hidden_size


def _last_norm(config: ModelConfig) -> bool:
    return config.do_layer_norm_before


def _with_bias(ours: str, *theirs: str, transform: Transform = SAME) -> tuple[Weight, Weight]:
    """The weight and the bias of a norm."""
    return (
        Weight(f"{ours}.weight", tuple(f"{t}.weight" for t in theirs), transform),
        Weight(f"{ours}.bias", tuple(f"{t}.bias" for t in theirs), transform),
    )


_HEAD: Final = Weight("head.weight", ("lm_head.weight",), when=_untied)


def _attention(prefix: str, out: str) -> tuple[Weight, ...]:
    """Queries, keys and values by themselves, and `out` behind them, with or without biases."""

    def each(kind: str) -> tuple[str, ...]:
        return tuple(f"{prefix}.{p}_proj.{kind}" for p in "qkv")

    return (
        Weight("attention.qkv.weight", each("weight"), HEADS),
        Weight("attention.qkv.bias", each("bias"), HEADS, _biased),
        Weight("attention.out.weight", (f"{prefix}.{out}.weight",)),
        Weight("attention.out.bias", (f"{prefix}.{out}.bias",), when=_biased),
    )


_LLAMA_ATTENTION: Final = _attention("model.layers.{i}.self_attn", "o_proj")

_LLAMA_LAYER: Final = (
    Weight("attention_norm.weight", ("model.layers.{i}.input_layernorm.weight",)),
    *_LLAMA_ATTENTION,
    Weight("ffn_norm.weight", ("model.layers.{i}.post_attention_layernorm.weight",)),
    Weight("ffn.gate", ("model.layers.{i}.mlp.gate_proj.weight",)),
    Weight("ffn.up", ("model.layers.{i}.mlp.up_proj.weight",)),
    Weight("ffn.down", ("model.layers.{i}.mlp.down_proj.weight",), TRANSPOSED),
)

_LLAMA_REST: Final = (
    Weight("embedding.weight", ("model.embed_tokens.weight",)),
    Weight("norm.weight", ("model.norm.weight",)),
    _HEAD,
)

_ROTARY_BUFFERS: Final = (r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)

OPT: Final = Family(
    name="OPT",
    model_types=("opt",),
    architecture="OPTForCausalLM",
    config=configs.read_opt,
    write_config=configs.write_opt,
    layer=(
        *_with_bias("attention_norm", "model.decoder.layers.{i}.self_attn_layer_norm"),
        *_attention("model.decoder.layers.{i}.self_attn", "out_proj"),
        *_with_bias("ffn_norm", "model.decoder.layers.{i}.final_layer_norm"),
        Weight("ffn.up", ("model.decoder.layers.{i}.fc1.weight",)),
        Weight("ffn.up_bias", ("model.decoder.layers.{i}.fc1.bias",), when=_mlp_biased),
        Weight("ffn.down", ("model.decoder.layers.{i}.fc2.weight",), TRANSPOSED),
        Weight("ffn.down_bias", ("model.decoder.layers.{i}.fc2.bias",), when=_mlp_biased),
    ),
    rest=(
        Weight("embedding.weight", ("model.decoder.embed_tokens.weight",)),
        # The first two rows belong to no position, and are kept to be written back.
        Weight("positions.weight", ("model.decoder.embed_positions.weight",)),
        Weight("project_in.weight", ("model.decoder.project_in.weight",), when=_projected),
        Weight("project_out.weight", ("model.decoder.project_out.weight",), when=_projected),
        Weight("norm.weight", ("model.decoder.final_layer_norm.weight",), when=_last_norm),
        Weight("norm.bias", ("model.decoder.final_layer_norm.bias",), when=_last_norm),
        _HEAD,
    ),
    activation_key="activation_function",
    fixed={"layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False},
    buffers=(r"(model\.)?decoder\.version",),
)

LLAMA: Final = Family(
    name="Llama",
    model_types=("llama", "sparsellama"),
    architecture="LlamaForCausalLM",
    config=configs.read_llama,
    write_config=configs.write_llama,
    layer=_LLAMA_LAYER,
    rest=_LLAMA_REST,
    fixed={"mlp_bias": False},
    buffers=_ROTARY_BUFFERS,
)

MISTRAL: Final = dataclasses.replace(
    LLAMA,
    name="Mistral",
    model_types=("mistral",),
    architecture="MistralForCausalLM",
    config=configs.read_mistral,
    write_config=configs.write_mistral,
    fixed={"attention_bias": False, "mlp_bias": False},
)

BAMBOO: Final = dataclasses.replace(
    MISTRAL,
    name="Bamboo",
    model_types=("bamboo",),
    architecture="BambooForCausalLM",
    config=configs.read_bamboo,
    write_config=configs.write_bamboo,
    in_transformers=False,
)

MINICPM: Final = dataclasses.replace(
    LLAMA,
    name="MiniCPM",
    model_types=("minicpm",),
    architecture="MiniCPMForCausalLM",
    config=configs.read_minicpm,
    write_config=configs.write_minicpm,
    fixed={"mlp_bias": False, "num_experts": 0},
    in_transformers=False,
)

_PLAIN_MLP: Final = (
    Weight("ffn.up", ("model.layers.{i}.mlp.up_proj.weight",)),
    Weight("ffn.up_bias", ("model.layers.{i}.mlp.up_proj.bias",), when=_mlp_biased),
    Weight("ffn.down", ("model.layers.{i}.mlp.down_proj.weight",), TRANSPOSED),
    Weight("ffn.down_bias", ("model.layers.{i}.mlp.down_proj.bias",), when=_mlp_biased),
)

ARCEE: Final = dataclasses.replace(
    LLAMA,
    name="Arcee",
    model_types=("arcee",),
    architecture="ArceeForCausalLM",
    config=configs.read_arcee,
    write_config=configs.write_arcee,
    layer=(
        Weight("attention_norm.weight", ("model.layers.{i}.input_layernorm.weight",)),
        *_LLAMA_ATTENTION,
        Weight("ffn_norm.weight", ("model.layers.{i}.post_attention_layernorm.weight",)),
        *_PLAIN_MLP,
    ),
    fixed={},
)

NEMOTRON: Final = Family(
    name="Nemotron",
    model_types=("nemotron",),
    architecture="NemotronForCausalLM",
    config=configs.read_nemotron,
    write_config=configs.write_nemotron,
    layer=(
        *_with_bias("attention_norm", "model.layers.{i}.input_layernorm"),
        *_LLAMA_ATTENTION,
        *_with_bias("ffn_norm", "model.layers.{i}.post_attention_layernorm"),
        *_PLAIN_MLP,
    ),
    rest=(
        Weight("embedding.weight", ("model.embed_tokens.weight",)),
        *_with_bias("norm", "model.norm"),
        _HEAD,
    ),
    buffers=_ROTARY_BUFFERS,
)

GPT2: Final = Family(
    name="GPT-2",
    model_types=("gpt2",),
    architecture="GPT2LMHeadModel",
    config=configs.read_gpt2,
    write_config=configs.write_gpt2,
    layer=(
        *_with_bias("attention_norm", "transformer.h.{i}.ln_1"),
        # GPT-2's Conv1D stores its matrices transposed: inputs by outputs.
        Weight("attention.qkv.weight", ("transformer.h.{i}.attn.c_attn.weight",), TRANSPOSED),
        Weight("attention.qkv.bias", ("transformer.h.{i}.attn.c_attn.bias",)),
        Weight("attention.out.weight", ("transformer.h.{i}.attn.c_proj.weight",), TRANSPOSED),
        Weight("attention.out.bias", ("transformer.h.{i}.attn.c_proj.bias",)),
        *_with_bias("ffn_norm", "transformer.h.{i}.ln_2"),
        Weight("ffn.up", ("transformer.h.{i}.mlp.c_fc.weight",), TRANSPOSED),
        Weight("ffn.up_bias", ("transformer.h.{i}.mlp.c_fc.bias",)),
        Weight("ffn.down", ("transformer.h.{i}.mlp.c_proj.weight",)),
        Weight("ffn.down_bias", ("transformer.h.{i}.mlp.c_proj.bias",)),
    ),
    rest=(
        Weight("embedding.weight", ("transformer.wte.weight",)),
        Weight("positions.weight", ("transformer.wpe.weight",)),
        *_with_bias("norm", "transformer.ln_f"),
        _HEAD,
    ),
    activation_key="activation_function",
    fixed={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    buffers=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",),
    prefix="transformer.",
)

FAMILIES: Final = (OPT, LLAMA, MISTRAL, ARCEE, BAMBOO, MINICPM, NEMOTRON, GPT2)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a `config.json`.

    Raises:
        ConfigError: none of ours.
    """
    model_type = config.get("model_type")
    known = [t for family in FAMILIES for t in family.model_types]
    require(
        isinstance(model_type, str),
        "config.json: has no model_type, so the model's family is unknown",
    )
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    raise ConfigError(
        f"config.json: model_type {model_type!r} cannot be imported; known are {', '.join(known)}"
    )
