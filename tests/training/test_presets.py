"""Presets hold what they say; TOML and --set change a configuration or get one sentence."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError
from engine.model.decoder import Decoder
from training.config import ModelShape, OptimizerConfig, SwitchConfig, TrainConfig
from training.presets import PRESETS, preset, read_config, with_settings

# What the comments beside the presets and the documentation say, in millions.
PARAMETERS = {"gpt-5m": 4.9, "gpt-50m": 49.2, "gpt-124m": 122.7}
TOKENS = {"gpt-50m": 105e6, "gpt-124m": 1e9}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_model(name: str) -> None:
    config = preset(name)
    assert config.preset == name
    shape = config.model.model_config(config.sequence_length, 0, config.dtype)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Decoder(shape).parameters())
    if name in PARAMETERS:
        assert parameters / 1e6 == pytest.approx(PARAMETERS[name], rel=0.005)
    if name in TOKENS:
        assert config.steps * config.batch_tokens == pytest.approx(TOKENS[name], rel=0.06)
    switch = config.switch
    assert list(switch.top_k) == sorted(switch.top_k, reverse=True)
    assert max(switch.mixed_top_k) < config.model.num_experts
    assert dataclasses.replace(config, seed=2).digest != config.digest


def test_the_starter_is_trained_as_it_was() -> None:
    """The packaged model's own recipe must not follow the defaults."""
    switch = preset("starter").switch
    assert (switch.top_k, switch.mixed_top_k) == ((8,), (4, 8, 12, 16))
    assert (switch.penalty, switch.dense_penalty, switch.penalty_every) == (0.3, 0.0, 4)
    assert (switch.max_dense_share, switch.max_sparse_share, switch.mixed_share) == (0.3, 0.25, 0.2)


TOML = """
preset = "gpt-5m"
steps = 77
valid_share = 0.25
dtype = "float32"

[model]
num_experts = 128
intermediate_size = 2048

[optimizer]
schedule = "wsd"
weight_decay = 0

[switch]
mode = "static"
top_k = [32, 16]
mixed_top_k = 8
router = 'centroid'
"""


def test_a_file_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(TOML)
    base = preset("gpt-5m")
    assert read_config(path) == dataclasses.replace(
        base,
        steps=77,
        valid_share=0.25,
        dtype="float32",
        model=dataclasses.replace(base.model, num_experts=128, intermediate_size=2048),
        optimizer=OptimizerConfig(schedule="wsd", weight_decay=0.0),
        switch=dataclasses.replace(base.switch, mode="static", top_k=(32, 16), mixed_top_k=(8,)),
    )
    assert type(read_config(path).optimizer.weight_decay) is float


def test_an_empty_file_is_the_starter(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_bytes(b"# nothing\r\n")
    assert read_config(path) == preset("starter")


BAD_FILES = {
    "unknown": (b"stepz = 3", "has unknown keys: stepz"),
    "unknown_nested": (b"[switch]\nmode = 'ssd'\nk = 3", "switch has unknown keys: k"),
    "unknown_table": (b"[optimiser]\nlearning_rate = 1e-3", "has unknown keys: optimiser"),
    "type": (b"steps = '3'", "steps must be of type int, got '3'"),
    "nested_type": (b"[switch]\npenalty = true", "switch.penalty must be of type float, got True"),
    "bool_for_int": (b"steps = true", "steps must be of type int, got True"),
    "float_for_int": (b"steps = 3.0", "steps must be of type int, got 3.0"),
    "text_in_list": (b"[switch]\ntop_k = [8, '4']", "switch.top_k must be integers"),
    "bool_in_list": (b"[switch]\ntop_k = [true]", "switch.top_k must be integers"),
    "no_k": (b"[switch]\ntop_k = []", "switch.top_k must name at least one k"),
    "no_table": (b"switch = 3", "switch must be a table"),
    "date": (b"seed = 2026-01-01", "seed must be of type int"),
    "range": (b"[optimizer]\nlearning_rate = 3", "optimizer.learning_rate must be between"),
    "nan": (b"[optimizer]\nlearning_rate = nan", "optimizer.learning_rate must be between"),
    "huge": (b"[optimizer]\nlearning_rate = 1" + b"0" * 400, "must be of type float, got 1000"),
    "huger": (b"steps = 1" + b"0" * 5000, "cannot be read as TOML"),
    "deep": (b"steps = " + b"[" * 100_000, "cannot be read as TOML"),
    "choice": (b"[switch]\nmode = 'sdd'", "switch.mode must be one of ssd, dense, static"),
    "preset": (b"preset = 'huge'", "preset must be one of starter, smoke"),
    "preset_type": (b"preset = 3", "preset must be a string"),
    "syntax": (b"steps: 3", "cannot be read as TOML"),
    "twice": (b"steps = 3\nsteps = 4", "cannot be read as TOML"),
    "binary": (b"\x00\xff\xfe\x80steps", "cannot be read as TOML"),
    "large": (b"#" * ((1 << 20) + 1), "larger than 1048576 bytes"),
    "experts": (b"[model]\nnum_experts = 7", "must divide model.intermediate_size 1024"),
    "k": (b"[switch]\ntop_k = [64]", "switch.top_k and switch.mixed_top_k must be between 1 and"),
    "heads": (b"[model]\nnum_attention_heads = 3", "must be an even multiple of num_attention"),
    "vocabulary": (b"[model]\nvocab_size = 1", "vocab_size must be between 2 and"),
    "many_experts": (b"[model]\nnum_experts = 1024", "num_experts must be between"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_gets_one_sentence(name: str, tmp_path: Path) -> None:
    content, sentence = BAD_FILES[name]
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    message = str(caught.value)
    assert sentence in message
    assert "\n" not in message
    assert len(message) < 300 + len(str(path))


def test_no_file_at_all(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.toml"):
        with pytest.raises(ConfigError, match="cannot be read as TOML"):
            read_config(path)


def test_settings_change_nested_values() -> None:
    config = with_settings(
        preset("smoke"),
        [
            "steps=12",
            "optimizer.schedule=wsd",
            "optimizer.learning_rate = 1",
            "switch.top_k=[4, 2]",
            "switch.mixed_top_k=3",
            "switch.clustering='weights'",
            "dtype = float32 ",
            "steps=13",
        ],
    )
    base = preset("smoke")
    assert config == dataclasses.replace(
        base,
        steps=13,
        dtype="float32",
        optimizer=OptimizerConfig(schedule="wsd", learning_rate=1.0),
        switch=dataclasses.replace(base.switch, top_k=(4, 2), mixed_top_k=(3,)),
    )


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("steps", "--set wants KEY=VALUE, got 'steps'"),
        ("", "--set wants KEY=VALUE, got ''"),
        ("=3", "--set =3: "),
        ("steps=", "steps must be of type int, got ''"),
        ("steps=many", "steps must be of type int, got 'many'"),
        ("steps=1e3", "steps must be of type int, got 1000.0"),
        ("steps=1" + "0" * 5000, "steps must be of type int, got '1000"),
        ("steps=" + "[" * 5000, "steps must be of type int, got '[[["),
        ("switch=static", "--set: switch must be a table"),
        ("switch.mode=it's", "--set switch.mode=it's: "),
        ("switch.modes=ssd", "--set: switch has unknown keys: modes"),
        ("switch.mode.name=ssd", "switch.mode must be of type str"),
        ("switch.top_k=[1,", "switch.top_k must be integers"),
        ("switch.top_k=0", "switch.top_k and switch.mixed_top_k must be between 1 and"),
        ("mode=ssd", "--set has unknown keys: mode"),
        ("preset=gpt-5m", "--set cannot change preset; give --preset"),
        ("seed=-1", "seed must be between 0 and"),
    ],
)
def test_a_bad_setting_gets_one_sentence(setting: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_settings(preset("smoke"), [setting])
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 300


def test_experts_that_do_not_divide_the_neurons_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.num_experts 6 must divide .* 256"):
        ModelShape(intermediate_size=256, num_experts=6)


def test_ranges_of_phases_must_fit() -> None:
    with pytest.raises(ConfigError, match="min_dense_share must not exceed"):
        SwitchConfig(min_dense_share=0.2, max_dense_share=0.1)
    with pytest.raises(ConfigError, match="micro_batch_size must be between 0 and 8"):
        TrainConfig(micro_batch_size=9)
