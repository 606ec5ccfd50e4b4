"""What is written is what was read, and transformers loads it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from engine.checkpoint import MANIFEST, STARTER, load, read_json, save, write_json
from engine.errors import ConfigError
from engine.model.decoder import Decoder
from engine.model.experts import ExpertLayout
from engine.policy import ExpertPolicy
from tests.models import tiny_config, tiny_tokenizer
from tests.training.importing.models import (
    MAKERS,
    change_config,
    experts_for,
    make,
    read,
    state_of,
)
from training.experts.conversion import permute_neurons
from training.importing.formats.export import export
from training.importing.formats.reader import SOURCE_CONFIG, Source

DENSE = ExpertPolicy.dense()


def files_of(path: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


FOREIGN = ("prosparse", "turbosparse", "minicpm-s")  # transformers does not have their code


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        *((kind, True) for kind in MAKERS),
        *((kind, False) for kind in MAKERS if kind not in FOREIGN),
    ],
)
def test_a_round_trip_changes_no_bit(kind: str, kept: bool, tmp_path: Path) -> None:
    make(kind, 3, tmp_path / "theirs")
    source = Source.open(tmp_path / "theirs")
    model = read(tmp_path / "theirs", experts_for(source.model_config))
    texts = source.texts() if kept else {}
    save(tmp_path / "ours", model, tiny_tokenizer(), {}, texts)
    family = export(tmp_path / "ours", tmp_path / "back", shard_bytes=9000)
    assert family.name == source.family
    before, after = files_of(tmp_path / "theirs"), files_of(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    again = Source.open(tmp_path / "back").model_config
    neither = {"initializer_range": 0.02}
    assert dataclasses.replace(again, **neither) == dataclasses.replace(
        source.model_config, **neither
    )
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1


LOADED = ["opt", "opt-350m", "llama-yarn", "relu-mistral", "nemotron-biases", "gpt2-relu", "arcee"]


@pytest.mark.parametrize("kind", LOADED)
def test_transformers_loads_what_was_permuted(kind: str, tmp_path: Path) -> None:
    made = make(kind, 4, tmp_path / "theirs")
    model = read(tmp_path / "theirs", experts_for(Source.open(tmp_path / "theirs").model_config))
    generator = torch.Generator().manual_seed(1)
    for ffn in model.ffns():
        order_F = torch.randperm(ffn.up.shape[0], generator=generator)
        permute_neurons(ffn, ExpertLayout(order_F, ffn.num_experts), None)
    save(tmp_path / "ours", model, tiny_tokenizer(), {})
    export(tmp_path / "ours", tmp_path / "back")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    ids_BL = torch.randint(1, 300, (2, 50), generator=generator)
    with torch.no_grad():
        found = loaded(ids_BL).logits
    torch.testing.assert_close(found, made.logits(ids_BL), atol=1e-4, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    ids = tokenizer.encode("the cat", add_special_tokens=False)
    assert ids == tiny_tokenizer().encode("the cat")


def test_the_starter_is_an_arcee_model(tmp_path: Path) -> None:
    family = export(STARTER, tmp_path / "hf")
    assert family.architecture == "ArceeForCausalLM"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32
    ).eval()
    starter = load(STARTER, dtype="float32")
    ids_1L = torch.tensor([starter.tokenizer.encode("def read_lines(path):\n    return")])
    with torch.no_grad():
        found = loaded(ids_1L).logits
    torch.testing.assert_close(found, starter.model.logits(ids_1L, DENSE), atol=1e-3, rtol=0)


def test_what_no_family_has_is_refused_with_the_reason(tmp_path: Path) -> None:
    config = tiny_config(norm="layernorm", gated_mlp=True)
    model = Decoder(config)
    model.initialize(torch.Generator().manual_seed(1))
    save(tmp_path / "ours", model, tiny_tokenizer(), {})
    with pytest.raises(ConfigError, match=r"no family .* norm: 'rmsnorm' instead of 'layernorm'"):
        export(tmp_path / "ours", tmp_path / "back")
    assert [p.name for p in tmp_path.iterdir()] == ["ours"], "nothing is left behind"


def test_a_model_that_became_relu_is_written_as_relu(tmp_path: Path) -> None:
    make("relu-llama", 3, tmp_path / "theirs")
    change_config(tmp_path / "theirs", hidden_act="silu")
    source = Source.open(tmp_path / "theirs", relufy=True)
    model = Decoder(source.model_config)
    model.load_state_dict(state_of(source), strict=False)
    save(tmp_path / "ours", model, tiny_tokenizer(), {}, source.texts())
    export(tmp_path / "ours", tmp_path / "back")
    again = Source.open(tmp_path / "back")
    assert again.config_json["hidden_act"] == "relu"
    assert again.config_json["num_attention_heads"] == source.config_json["num_attention_heads"]


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_transformers_does_not_have_needs_its_own_config(kind: str, tmp_path: Path) -> None:
    make(kind, 3, tmp_path / "theirs")
    model = read(tmp_path / "theirs")
    save(tmp_path / "ours", model, tiny_tokenizer(), {})
    with pytest.raises(ConfigError, match=r"transformers does not have .* no source_config\.json"):
        export(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_is_that_of_the_weights(key: str, tmp_path: Path) -> None:
    make("relu-llama", 3, tmp_path / "theirs")
    values = read_json(tmp_path / "theirs" / "config.json")
    written = {name: value for name, value in values.items() if "dtype" not in name}
    write_json(tmp_path / "theirs" / "config.json", {**written, key: "float32"})
    model, texts = read(tmp_path / "theirs"), Source.open(tmp_path / "theirs").texts()
    model.config = dataclasses.replace(model.config, torch_dtype="bfloat16")
    save(tmp_path / "ours", model, tiny_tokenizer(), {}, texts)
    export(tmp_path / "ours", tmp_path / "back")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto")
    assert loaded.dtype == torch.bfloat16


def test_how_its_authors_generate_comes_back(tmp_path: Path) -> None:
    make("relu-llama", 3, tmp_path / "theirs")
    theirs = {"eos_token_id": [2, 7], "temperature": 0.6, "do_sample": True}
    write_json(tmp_path / "theirs" / "generation_config.json", theirs)
    model, texts = read(tmp_path / "theirs"), Source.open(tmp_path / "theirs").texts()
    save(tmp_path / "ours", model, tiny_tokenizer(), {}, texts)
    export(tmp_path / "ours", tmp_path / "back")
    assert read_json(tmp_path / "back" / "generation_config.json") == {
        "bos_token_id": model.config.bos_token_id,
        **theirs,
    }


def test_what_is_written_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        file = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((file.name, (tmp_path / "back").exists()))

    monkeypatch.setattr(os, "fsync", noted)
    export(STARTER, tmp_path / "back")
    files = {(file.name, False) for file in (tmp_path / "back").iterdir()}
    assert files < set(synced)
    assert synced[-1] == (tmp_path.name, True)
    assert not (tmp_path / "back" / MANIFEST).exists()  # it is no checkpoint of ours


def test_an_existing_directory_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        export(STARTER, tmp_path / "there")


def test_a_config_that_no_longer_fits_is_written_anew(tmp_path: Path) -> None:
    """A model that was changed since it was imported."""
    make("relu-llama", 3, tmp_path / "theirs")
    source = Source.open(tmp_path / "theirs")
    model = read(tmp_path / "theirs")
    model.config = dataclasses.replace(model.config, rope_theta=5e4)
    save(tmp_path / "ours", model, tiny_tokenizer(), {}, source.texts())
    assert (tmp_path / "ours" / SOURCE_CONFIG).is_file()
    export(tmp_path / "ours", tmp_path / "back")
    assert Source.open(tmp_path / "back").model_config.rope_theta == 5e4
