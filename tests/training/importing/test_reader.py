"""What cannot be imported is refused in a sentence that names the file, and what it wants."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import AmbidexError, CheckpointError
from engine.text.chat_template import MAX_BYTES
from tests.training.importing.models import change_config, make, state_of
from training.importing.formats.reader import INDEX, SINGLE, Source

KINDS = {"opt": "OPT", "relu-llama": "Llama", "gpt2-relu": "GPT-2"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        make(kind, 1, root / kind, shard="6KB" if kind == "opt" else "5GB")
    return {kind: root / kind for kind in KINDS}


@pytest.fixture
def copy(saved: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    def copied(kind: str) -> Path:
        path = tmp_path / kind
        path.mkdir()
        for file in saved[kind].iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        return path

    return copied


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(path: Path, sentence: str) -> None:
    """Opening or reading fails with one line that has this in it."""
    with pytest.raises(AmbidexError) as failure:
        state_of(Source.open(path))
    text = str(failure.value)
    assert re.search(sentence, text), text
    assert "\n" not in text


def test_shards_are_read_layer_by_layer(saved: dict[str, Path]) -> None:
    assert len(list(saved["opt"].glob("*.safetensors"))) > 2
    source = Source.open(saved["opt"])
    assert source.family == "OPT"
    layer = source.layer(1)
    assert set(layer) >= {"ffn.up", "ffn.down", "ffn.up_bias", "attention.qkv.bias"}
    with pytest.raises(AmbidexError, match=r"layers\.1\..* was read twice"):
        source.layer(1)


def test_a_bare_model_is_read_without_its_prefix(copy: Callable[[str], Path]) -> None:
    """As the first OPT and GPT-2 files have it."""
    path = copy("gpt2-relu")
    before = state_of(Source.open(path))

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)

    edit(path / SINGLE, strip)
    after = state_of(Source.open(path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_missing_directory(tmp_path: Path) -> None:
    refused(tmp_path / "none", "none: no such directory")


def test_a_half_written_directory(copy: Callable[[str], Path]) -> None:
    path = copy("relu-llama")
    (path / "config.json").rename(path / "later.json")
    refused(path, r"config\.json: missing")
    (path / "later.json").rename(path / "config.json")
    whole = (path / SINGLE).read_bytes()
    (path / SINGLE).write_bytes(whole[:-100])
    refused(path, f"{SINGLE}: damaged or not completely written")
    (path / SINGLE).unlink()
    refused(path, f"holds neither {SINGLE} nor {INDEX}")


def test_a_missing_shard(copy: Callable[[str], Path]) -> None:
    path = copy("opt")
    lost = sorted(path.glob("*.safetensors"))[1]
    lost.unlink()
    refused(path, f"{lost.name}: missing, though {INDEX} names it")


def test_an_index_that_disagrees(copy: Callable[[str], Path]) -> None:
    path = copy("opt")
    index = json.loads((path / INDEX).read_text())
    index["weight_map"].pop("model.decoder.layers.0.fc1.weight")
    (path / INDEX).write_text(json.dumps(index))
    refused(path, r"disagree about the tensor model\.decoder\.layers\.0\.fc1\.weight")
    index["weight_map"] = {"a": "../secret.safetensors"}
    (path / INDEX).write_text(json.dumps(index))
    refused(path, "is not a safetensors file beside it")


def test_pickle_is_refused_with_the_reason(copy: Callable[[str], Path]) -> None:
    path = copy("relu-llama")
    (path / SINGLE).rename(path / "pytorch_model.bin")
    refused(path, r"pytorch_model\.bin: is a pickle file, which can run any code .* safetensors")


def test_wrong_shapes_name_tensor_found_and_expected(copy: Callable[[str], Path]) -> None:
    path = copy("relu-llama")
    name = "model.layers.0.mlp.up_proj.weight"
    edit(path / SINGLE, lambda t: t.update({name: t[name][:-1].contiguous()}))
    refused(path, rf"tensor {name} has shape \[\d+, \d+\], config\.json implies \[\d+, \d+\]")


def test_a_wrong_shape_in_the_last_layer_is_seen_before_any_tensor_is_read(
    copy: Callable[[str], Path],
) -> None:
    path = copy("gpt2-relu")
    source = Source.open(path)
    source.check_tensors()
    name = f"transformer.h.{source.model_config.num_hidden_layers - 1}.mlp.c_fc.weight"
    edit(path / SINGLE, lambda t: t.update({name: t[name][:-1].contiguous()}))
    with pytest.raises(CheckpointError, match=rf"tensor {name} has shape .* config\.json implies"):
        Source.open(path).check_tensors()


def test_missing_and_unknown_tensors(copy: Callable[[str], Path]) -> None:
    path = copy("relu-llama")
    edit(path / SINGLE, lambda t: t.update({"model.layers.0.extra": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"no Llama model has a tensor model\.layers\.0\.ext"):
        Source.open(path).check_tensors()
    edit(path / SINGLE, lambda t: t.pop("model.layers.1.mlp.down_proj.weight"))
    refused(path, r"no file holds the tensor model\.layers\.1\.mlp\.down_proj\.weight")


def test_a_stored_head_must_be_the_embedding_if_they_are_tied(copy: Callable[[str], Path]) -> None:
    path = copy("gpt2-relu")
    edit(path / SINGLE, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].clone()}))
    assert state_of(Source.open(path))
    edit(path / SINGLE, lambda t: t["lm_head.weight"].add_(1))
    refused(path, "lm_head.weight differs from the embedding")


def test_several_dtypes_are_refused(copy: Callable[[str], Path]) -> None:
    path = copy("relu-llama")
    name = "model.layers.0.mlp.up_proj.weight"
    edit(path / SINGLE, lambda t: t.update({name: t[name].half()}))
    refused(path, f"{name} has F16.*all must have one dtype")


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        ("opt", {"model_type": "bert"}, "model_type 'bert' cannot be imported; known are opt, "),
        ("opt", {"model_type": None}, "has no model_type"),
        ("opt", {"activation_function": "gelu"}, "'gelu' gives no exact zeros.*train --relufy"),
        ("relu-llama", {"hidden_act": "silu"}, "'silu' gives no exact zeros.*train --relufy"),
        ("relu-llama", {"hidden_act": "tanh"}, "hidden_act must be relu, relu2 or"),
        ("gpt2-relu", {"scale_attn_by_inverse_layer_idx": True}, "only where it is False"),
        ("relu-llama", {"mlp_bias": True}, "mlp_bias is True; Llama models are read only where"),
        ("relu-llama", {"quantization_config": {"bits": 4}}, "quantization_config is"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm is True"),
        ("opt", {"num_attention_heads": 7}, "must be an even multiple of num_attention_heads 7"),
        ("opt", {"hidden_size": "many"}, "config.json: "),
        ("opt", {"eos_token_id": 300}, "eos_token_id must be between 0 and 299, got 300"),
        (
            "relu-llama",
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type must be one of linear, dynamic, yarn, llama3; got 'longrope'",
        ),
        (
            "relu-llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
            "config.json: rope_scaling of rope_type linear needs a factor",
        ),
        (
            "relu-llama",
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "nonsense": 2.0,
                }
            },
            "rope_scaling has unknown keys: nonsense",
        ),
    ],
)
def test_configurations_that_cannot_be_run(
    kind: str, changes: dict[str, Any], sentence: str, copy: Callable[[str], Path]
) -> None:
    path = copy(kind)
    change_config(path, **changes)
    refused(path, sentence)


def test_texts_that_could_not_be_served_are_refused(copy: Callable[[str], Path]) -> None:
    path = copy("opt")
    file = path / "tokenizer_config.json"
    file.write_text("{}")
    assert Source.open(path).texts()[file.name] == "{}"
    for content, sentence in (
        (b" " * (MAX_BYTES + 1), "tokenizer_config.json: larger than 1024 KiB"),
        (b"\xff", "tokenizer_config.json: not readable as text"),
    ):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=sentence):
            Source.open(path).texts()


def test_a_smooth_model_may_be_read_to_become_relu(copy: Callable[[str], Path]) -> None:
    path = copy("relu-llama")
    change_config(path, hidden_act="silu")
    source = Source.open(path, relufy=True)
    assert source.model_config.hidden_act == "relu"
    assert source.config_json["hidden_act"] == "silu"


def test_rotary_settings_of_either_age_are_read(copy: Callable[[str], Path]) -> None:
    """Before transformers 5: rope_theta and rope_scaling, whose type may be called `type`."""
    path = copy("relu-llama")
    values = json.loads((path / "config.json").read_text())
    del values["rope_parameters"]
    values |= {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}}
    (path / "config.json").write_text(json.dumps(values))
    config = Source.open(path).model_config
    assert config.rope_theta == 5e5
    assert config.rope_scaling is not None
    assert (config.rope_scaling.rope_type, config.rope_scaling.factor) == ("linear", 4.0)
