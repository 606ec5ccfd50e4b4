"""What imported models may have, on the GPU's paths in Triton's interpreter, and in checkpoints."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import load, save
from engine.config import ModelConfig, RopeScaling
from engine.errors import ConfigError
from engine.model.decoder import Decoder
from engine.model.ffn import ExpertFFN
from engine.model.policy_batch import PolicyBatch
from engine.model.rotary import rotary_tables
from engine.policy import ExpertPolicy
from tests.engine.conftest import tiny_config, tiny_model, tiny_tokenizer
from tests.engine.gpu.test_decode_graphs import (
    ComputedGraphs,
    alone,
    new_cache,
    prefill,
    requests_of,
)
from tests.engine.gpu.test_prompt_graphs import check_step
from tests.engine.gpu.test_prompt_graphs import graphs_of as prompt_graphs_of
from tests.engine.gpu.test_prompt_graphs import requests_of as prompts_of

DENSE, TWO, FIVE = ExpertPolicy.dense(), ExpertPolicy.top_k(2), ExpertPolicy.top_k(5)

_OPT: dict[str, Any] = {
    "norm": "layernorm",
    "position_embedding_type": "learned",
    "position_offset": 2,
    "attention_bias": True,
    "mlp_bias": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "opt": _OPT,
    "opt-350m": {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 20},
    "prosparse": {
        "gated_mlp": True,
        "hidden_act": "fatrelu",
        "hidden_act_param": 0.2,
        "tie_word_embeddings": False,
    },
    "drelu": {"gated_mlp": True, "hidden_act": "drelu"},
    "minicpm": {
        "gated_mlp": True,
        "embedding_multiplier": 1.5,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "nemotron": {
        "norm": "layernorm1p",
        "hidden_act": "relu2",
        "partial_rotary_factor": 0.5,
        "mlp_bias": True,
    },
}


def variant(kind: str, **changes: Any) -> Decoder:
    """A random model, biases and norms included."""
    model = tiny_model(tiny_config(**VARIANTS[kind], **changes))
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.requires_grad_(False)


def on_kernels(model: Decoder) -> Decoder:
    model = copy.deepcopy(model)
    for ffn in model.ffns():
        ffn.use_kernels()
    return model


@pytest.mark.parametrize(
    ("kind", "policies"),
    [*((kind, [TWO]) for kind in VARIANTS), *((kind, [DENSE, FIVE]) for kind in ("opt", "drelu"))],
    ids=str,
)
@torch.inference_mode()
def test_padded_decoding_computes_each_request_alone(
    kind: str, policies: list[ExpertPolicy]
) -> None:
    plain = variant(kind)
    cache, requests = new_cache(), requests_of(policies)
    prefill(plain, cache, requests)
    graphs = ComputedGraphs(on_kernels(plain), cache, 8, 20)
    for step in range(2):
        key = graphs.key(requests)
        assert key is not None
        logits, _ = graphs.run(requests, key)
        for row, request in enumerate(requests):
            expected, _ = alone(plain, request)
            torch.testing.assert_close(logits[row], expected, rtol=1e-4, atol=1e-4)
            request.token_ids.append(3 + step)
            request.num_computed += 1


@pytest.mark.parametrize("kind", ["opt"])
@torch.inference_mode()
def test_prompt_steps_compute_each_request_alone(kind: str) -> None:
    plain = variant(kind)
    graphs = prompt_graphs_of(on_kernels(plain))
    requests = prompts_of([TWO, FIVE, TWO])
    check_step(graphs, plain, [(r, r.num_uncomputed) for r in requests])
    check_step(graphs, plain, [(r, 1) for r in requests])
    mixed = prompts_of([TWO, DENSE])
    assert (graphs.key([(r, 2) for r in mixed]) is None) != plain.is_plain


@pytest.mark.parametrize("kind", ["opt", "prosparse", "drelu"])
@torch.inference_mode()
def test_kernels_compute_what_the_plain_ffn_does(kind: str) -> None:
    """Few tokens and many, sparse and mixed; the choice of way is the rule's."""
    plain = variant(kind).ffns()[0]
    kernels = copy.deepcopy(plain)
    kernels.use_kernels()
    for policies in ([(TWO, 3)], [(FIVE, 20)], [(DENSE, 2), (TWO, 8)]):
        tokens = sum(n for _, n in policies)
        x_TD = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(tokens))
        batch = PolicyBatch.build(policies, 8)
        torch.testing.assert_close(kernels(x_TD, batch), plain(x_TD, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", VARIANTS)
def test_sparse_training_has_the_gradients_of_the_masked_dense_ffn(kind: str) -> None:
    model = variant(kind)
    ffn, chosen = model.ffns()[0], PolicyBatch.uniform(TWO, 6, 8)
    ffn.requires_grad_(True)
    x_TD = torch.randn(6, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    ffn(x_TD, chosen).sum().backward()
    found = [x_TD.grad, *(p.grad for p in ffn.parameters())]
    expected = masked_gradients(ffn, x_TD.detach(), chosen)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def masked_gradients(
    ffn: ExpertFFN, x_TD: torch.Tensor, policy: PolicyBatch
) -> list[torch.Tensor | None]:
    """By autograd, from the formula written out."""
    x_TD = x_TD.clone().requires_grad_(True)
    own = {n: p.detach().clone().requires_grad_(True) for n, p in ffn.named_parameters()}
    best_TK = (x_TD.detach() @ ffn.router.T).topk(policy.max_k, dim=1).indices
    chosen_TE = torch.zeros(x_TD.shape[0], 8).scatter_(1, best_TK, 1.0)
    up_TF = x_TD @ own["up"].T + own.get("up_bias", torch.zeros(64))
    gate_TF = x_TD @ own["gate"].T if "gate" in own else up_TF
    if ffn.activation == "fatrelu":
        act_TF = gate_TF * (gate_TF > ffn.threshold)
    else:
        act_TF = gate_TF * (gate_TF > 0)
    act_TF = act_TF**2 if ffn.activation == "relu2" else act_TF
    if "gate" in own:
        act_TF = act_TF * (up_TF * (up_TF > 0) if ffn.activation == "drelu" else up_TF)
    y_TD = (act_TF * chosen_TE.repeat_interleave(8, 1)) @ own["down"]
    (y_TD + own.get("down_bias", torch.zeros(32))).sum().backward()
    return [x_TD.grad, *(p.grad for p in own.values())]


@pytest.mark.parametrize("kind", VARIANTS)
@torch.inference_mode()
def test_checkpoints_hold_everything(kind: str, tmp_path: Path) -> None:
    scaling = RopeScaling("llama3", 4.0, 16) if kind == "prosparse" else None
    model = variant(kind, rope_scaling=scaling, sliding_window=9)
    save(tmp_path / "c", model, tiny_tokenizer(), {})
    loaded = load(tmp_path / "c")
    assert loaded.config == model.config
    ids_BL = torch.arange(40).view(2, 20)
    assert torch.equal(loaded.model.logits(ids_BL, TWO), model.logits(ids_BL, TWO))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"norm": "batchnorm"}, "norm must be one of rmsnorm, layernorm, layernorm1p"),
        ({"hidden_act": "drelu"}, "hidden_act drelu needs gated_mlp"),
        ({"gated_mlp": True, "mlp_bias": True}, "gated_mlp takes no mlp_bias"),
        ({"hidden_act_param": 0.1}, "hidden_act_param is fatrelu's threshold; relu has none"),
        ({"hidden_act": "fatrelu", "hidden_act_param": -1.0}, "hidden_act_param must be between"),
        ({"partial_rotary_factor": 0.4}, "must be even"),
        ({"head_dim": 7}, "head_dim 7 .* must be even"),
        ({"sliding_window": 0}, "sliding_window must be between 1"),
        ({"position_embedding_type": "alibi"}, "must be one of rope, learned"),
        ({"residual_multiplier": 0.0}, "residual_multiplier must be between"),
    ],
)
def test_configurations_are_checked(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        tiny_config(**changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rope_type": "longrope"}, "rope_scaling.rope_type must be one of"),
        ({"factor": 0.5}, "rope_scaling.factor must be between"),
        ({"rope_type": "yarn"}, "original_max_position_embeddings must be between 1"),
        ({"low_freq_factor": 4.0, "high_freq_factor": 4.0}, "must be above low_freq_factor"),
        ({"beta_fast": 0.5}, "rope_scaling.beta_fast must be between"),
    ],
)
def test_rotary_scaling_is_checked(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        RopeScaling(**{"rope_type": "linear", "factor": 2.0, **changes})


def test_unknown_keys_of_rotary_scaling_raise() -> None:
    values = tiny_config(rope_scaling=RopeScaling("linear", 2.0)).to_dict()
    assert ModelConfig.from_dict(values).rope_scaling == RopeScaling("linear", 2.0)
    values["rope_scaling"] = {"rope_type": "linear", "factor": 2.0, "nonsense": 1}
    with pytest.raises(ConfigError, match="rope_scaling has unknown keys: nonsense"):
        ModelConfig.from_dict(values)


def test_dimensions_that_are_not_rotated_stay() -> None:
    cos, sin = rotary_tables(tiny_config(partial_rotary_factor=0.5))
    assert cos.shape == (128, 4)
    assert bool((cos[:, 2:] == 1).all())
    assert bool((sin[:, 2:] == 0).all())
    assert bool((sin[1:, :2] != 0).all())


def test_parameters_are_counted() -> None:
    for kind in VARIANTS:
        model = variant(kind)
        assert model.config.num_parameters == sum(p.numel() for p in model.parameters()), kind


def test_only_models_trained_here_have_kernels_for_whole_steps() -> None:
    assert tiny_model(tiny_config()).is_plain
    assert not any(variant(kind).is_plain for kind in VARIANTS)
    config = dataclasses.replace(tiny_config(), head_dim=10)
    assert tiny_model(config).is_plain
