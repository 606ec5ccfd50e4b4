"""Small random models of other families, saved by transformers, and ours read from them.

Those whose class is not in transformers are made from its Llama or Mistral, changed as their
authors describe: ProSparse's threshold (Song et al. 2024), TurboSparse's dReLU (Song et al. 2024),
MiniCPM's scales (Hu et al. 2024).
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn

from engine.config import ExpertConfig, ModelConfig
from engine.model.decoder import Decoder
from engine.model.experts import centroid_router
from training.importing.formats.reader import Source

VOCABULARY: Final = 300
LONGEST: Final = 240

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class Made:
    """A model of transformers' and the directory that it was saved in."""

    def __init__(self, model: Any, path: Path) -> None:
        self.model = model
        self.path = path

    @torch.no_grad()
    def logits(self, ids_BL: Tensor) -> Tensor:
        found: Tensor = self.model(ids_BL).logits
        return found

    @torch.no_grad()
    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """Its own continuation, with its own cache; nothing ends it early."""
        self.model.generation_config.eos_token_id = None
        ids = self.model.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        tokens: list[int] = ids[0, len(prompt) :].tolist()
        return tokens


# --- shapes ---------------------------------------------------------------------------------------

# `wide` shapes run on the CPU's kernels, the others, odd sizes among them, on torch's operators.
_Shape = tuple[int, int, int, int, int]  # width, heads, key-value heads, head_dim, neurons


def _shape(chance: random.Random, wide: bool, group: int, rotary: bool) -> _Shape:
    head_dim = 32 if wide else chance.choice((4, 6, 10) if rotary else (3, 5, 8))
    kv_heads = chance.choice((1, 2))
    heads = kv_heads * group
    neurons = chance.choice((40, 56)) if wide else chance.choice((15, 21, 33))
    return heads * head_dim, heads, kv_heads, head_dim, neurons


def _llama(chance: random.Random, wide: bool, **changes: Any) -> dict[str, Any]:
    width, heads, kv_heads, _, neurons = _shape(chance, wide, chance.choice((1, 2)), True)
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": neurons,
        "num_hidden_layers": chance.choice((2, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": LONGEST,
        "hidden_act": "relu",
        "bos_token_id": 1,
        "eos_token_id": 0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": chance.random() < 0.5,
        **changes,
    }


def _opt(chance: random.Random, wide: bool, **changes: Any) -> Any:
    width, heads, _, _, neurons = _shape(chance, wide, 2, False)
    config = transformers.OPTConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": width,
            "word_embed_proj_dim": width,
            "ffn_dim": neurons,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "max_position_embeddings": LONGEST,
            "bos_token_id": 2,
            "eos_token_id": 0,
            **changes,
        }
    )
    return transformers.OPTForCausalLM(config)


def _opt_350m(chance: random.Random, wide: bool) -> Any:
    """Norms after, and a narrower embedding."""
    return _opt(chance, wide, do_layer_norm_before=False, word_embed_proj_dim=14)


def _llama_model(chance: random.Random, wide: bool, **changes: Any) -> Any:
    config = transformers.LlamaConfig(**_llama(chance, wide, **changes))
    return transformers.LlamaForCausalLM(config)


def _mistral(chance: random.Random, wide: bool, **changes: Any) -> Any:
    values = {"sliding_window": chance.choice((7, 24)), **_llama(chance, wide, **changes)}
    return transformers.MistralForCausalLM(transformers.MistralConfig(**values))


def _rope(chance: random.Random, wide: bool, **scaling: Any) -> Any:
    rope = {"rope_theta": 1000.0, **scaling}
    return _llama_model(chance, wide, rope_parameters=rope, attention_bias=True, head_dim=32)


def _prosparse(chance: random.Random, wide: bool) -> Any:
    model = _llama_model(chance, wide)
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Threshold(0.05, 0.0)
    return model


def _turbosparse(chance: random.Random, wide: bool) -> Any:
    model = _mistral(chance, wide, tie_word_embeddings=False)
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.forward = lambda x, m=mlp: m.down_proj(m.gate_proj(x).relu() * m.up_proj(x).relu())
    return model


def _minicpm(chance: random.Random, wide: bool) -> Any:
    model = _llama_model(chance, wide, tie_word_embeddings=True)
    config = model.config
    scale, last = 1.4 / config.num_hidden_layers**0.5, config.hidden_size / 16
    model.model.embed_tokens.register_forward_hook(lambda _m, _x, y: y * 1.5)
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.Threshold(0.02, 0.0)
        for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
            output.register_forward_hook(lambda _m, _x, y: y * scale)
    model.lm_head.register_forward_pre_hook(lambda _m, x: (x[0] / last,))
    return model


def _nemotron(chance: random.Random, wide: bool, **changes: Any) -> Any:
    values = _llama(chance, wide, **{"hidden_act": "relu2", **changes})
    values["norm_eps"] = values.pop("rms_norm_eps")
    if not wide:
        values["head_dim"] = 12
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    config = transformers.NemotronConfig(**values, rope_parameters=rope)
    return transformers.NemotronForCausalLM(config)


def _arcee(chance: random.Random, wide: bool) -> Any:
    values = _llama(chance, wide, hidden_act="relu2")
    return transformers.ArceeForCausalLM(transformers.ArceeConfig(**values))


def _gpt2(chance: random.Random, wide: bool, **changes: Any) -> Any:
    width, heads, _, _, neurons = _shape(chance, wide, 2, False)
    config = transformers.GPT2Config(
        **{
            "vocab_size": VOCABULARY,
            "n_embd": width,
            "n_layer": 2,
            "n_head": heads,
            "n_inner": neurons,
            "n_positions": LONGEST,
            "activation_function": "relu",
            "bos_token_id": 0,
            "eos_token_id": 0,
            **changes,
        }
    )
    return transformers.GPT2LMHeadModel(config)


MAKERS: Final[dict[str, Callable[[random.Random, bool], Any]]] = {
    "opt": _opt,
    "opt-without-biases": lambda c, w: _opt(c, w, enable_bias=False, tie_word_embeddings=False),
    "opt-350m": _opt_350m,
    "relu-llama": _llama_model,
    "llama-linear": lambda c, w: _rope(c, w, rope_type="linear", factor=2.0),
    "llama-dynamic": lambda c, w: _rope(c, w, rope_type="dynamic", factor=2.0),
    "llama-yarn": lambda c, w: _rope(
        c, w, rope_type="yarn", factor=4.0, original_max_position_embeddings=60
    ),
    "llama-3": lambda c, w: _rope(
        *(c, w),
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=60,
    ),
    "relu-mistral": _mistral,
    "prosparse": _prosparse,
    "turbosparse": _turbosparse,
    "minicpm-s": _minicpm,
    "arcee": _arcee,
    "nemotron": _nemotron,
    "nemotron-biases": lambda c, w: _nemotron(
        c, w, attention_bias=True, mlp_bias=True, hidden_act="relu"
    ),
    "gpt2-relu": _gpt2,
    "gpt2-relu2": lambda c, w: _gpt2(c, w, activation_function="relu2"),
}

# What those that transformers does not have say in `config.json`.
_CONFIGS: Final[dict[str, dict[str, Any]]] = {
    "prosparse": {"model_type": "sparsellama", "hidden_act": "fatrelu", "hidden_act_param": 0.05},
    "turbosparse": {"model_type": "bamboo"},
    "minicpm-s": {
        "model_type": "minicpm",
        "hidden_act": "fatrelu",
        "hidden_act_param": 0.02,
        "scale_emb": 1.5,
        "scale_depth": 1.4,
        "dim_model_base": 16,
    },
}


def make(
    kind: str,
    seed: int,
    path: Path,
    *,
    wide: bool = False,
    shard: str = "5GB",
    strength: float = 0.8,
) -> Made:
    """A random model of this kind, saved in `path`.

    Args:
        kind: of MAKERS.
        seed: decides sizes and weights.
        path: the directory.
        wide: sizes that the CPU's kernels take.
        shard: the largest file.
        strength: of the layers; from about 2 on they outweigh the embedding, and a greedy text does
            not repeat itself.
    """
    torch.manual_seed(seed)
    model = MAKERS[kind](random.Random(seed), wide).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.dim() == 1 else strength * parameter.shape[-1] ** -0.5
            if "emb" in name or "wte" in name:
                spread = 0.2
            if "norm" in name or "ln_" in name:
                spread = 0.1
            parameter.add_(torch.randn_like(parameter) * spread)
    model.save_pretrained(path, max_shard_size=shard)
    change_config(path, **_CONFIGS.get(kind, {}))
    return Made(model, path)


def change_config(path: Path, **changes: Any) -> None:
    """Edit the `config.json` in `path`; None removes nothing, it is written as null."""
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**values, **changes}))


def state_of(source: Source) -> dict[str, Tensor]:
    """All tensors of a source, by their names in a decoder."""
    source.check_tensors()
    state = dict(source.rest())
    for i in range(source.model_config.num_hidden_layers):
        state |= {f"layers.{i}.{name}": tensor for name, tensor in source.layer(i).items()}
    return state


def split_config(config: ModelConfig, num_experts: int) -> ModelConfig:
    """The same model with its neurons in several experts."""
    size = config.intermediate_size // num_experts
    experts = ExpertConfig(num_experts=num_experts, expert_size=size)
    return dataclasses.replace(config, experts=experts)


def read(path: Path, num_experts: int = 1) -> Decoder:
    """Our model from the directory, its neurons in place, its routers centroids."""
    source = Source.open(path)
    model = Decoder(split_config(source.model_config, num_experts))
    model.load_state_dict(state_of(source), strict=False)
    for ffn in model.ffns():
        rows = ffn.up if ffn.gate is None else ffn.gate
        ffn.router.copy_(centroid_router(rows, num_experts, norm=2.0))
    return model.eval().requires_grad_(False)


def experts_for(config: ModelConfig) -> int:
    """A number of experts that divides the neurons."""
    return next(n for n in (8, 5, 3) if config.intermediate_size % n == 0)
