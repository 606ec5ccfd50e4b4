"""Complete configurations by name, and how a TOML file or the command line changes one.

A file looks like the dataclasses of `training.config`, and may begin from a preset:

    preset = "gpt-5m"
    steps = 2000
    [optimizer]
    schedule = "wsd"
    [switch]
    top_k = [16, 8]
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from engine.config import known_fields
from engine.errors import ConfigError, require
from training.config import ModelShape, OptimizerConfig, SwitchConfig, TrainConfig, without_removed

_MOST_BYTES: Final = 1 << 20
_MOST_INTEGER: Final = (1 << 63) - 1
# The TOML parser raises a ValueError of its own; huge integers and deep nesting make it raise
# Python's errors instead.
_UNREADABLE: Final = (OSError, ValueError, RecursionError)

# The packaged starter was trained so, before finer experts and a longer sparse phase won.
_FIRST_RECIPE: Final = SwitchConfig(
    settled=0.7,
    max_dense_share=0.3,
    max_sparse_share=0.25,
    mixed_share=0.2,
    top_k=(8,),
    mixed_top_k=(4, 8, 12, 16),
    penalty=0.3,
    dense_penalty=0.0,
    penalty_tokens=0.25,
)

# Sparse steps at a quarter and an eighth of the experts, then at an eighth and a sixteenth.
_OF_512: Final = SwitchConfig(top_k=(128, 64), mixed_top_k=(32, 64))
_OF_256: Final = SwitchConfig(top_k=(64, 32), mixed_top_k=(16, 32))

PRESETS: Final[dict[str, TrainConfig]] = {
    # The packaged model: 37 minutes on two CPU cores, 8 MB in bfloat16.
    "starter": TrainConfig(switch=_FIRST_RECIPE),
    # Takes seconds on any machine: it shows that the whole path works, and makes no useful model.
    "smoke": TrainConfig(
        preset="smoke",
        steps=40,
        batch_size=4,
        sequence_length=64,
        validate_share=0.25,
        validate_tokens=1024,
        model=ModelShape(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=16,
        ),
        switch=SwitchConfig(top_k=(4,), mixed_top_k=(2, 4, 6)),
    ),
    # 4.9 M parameters; a wide FFN of many small experts is what a sparse model is for.
    "gpt-5m": TrainConfig(
        preset="gpt-5m",
        steps=600,
        batch_size=16,
        sequence_length=256,
        evaluate_tokens=1 << 16,
        model=ModelShape(
            vocab_size=4096,
            hidden_size=128,
            intermediate_size=4096,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=512,
        ),
        switch=_OF_512,
    ),
    # One GPU: 49 M parameters, 105 M tokens.
    "gpt-50m": TrainConfig(
        preset="gpt-50m",
        steps=1600,
        batch_size=128,
        sequence_length=512,
        precision="bfloat16",
        model=ModelShape(
            vocab_size=8192,
            hidden_size=384,
            intermediate_size=6144,
            num_hidden_layers=9,
            num_attention_heads=6,
            num_key_value_heads=2,
            num_experts=256,
        ),
        optimizer=OptimizerConfig(learning_rate=1.5e-3),
        switch=_OF_256,
    ),
    # One GPU or several: 123 M parameters, 1 G tokens.
    "gpt-124m": TrainConfig(
        preset="gpt-124m",
        steps=4000,
        batch_size=256,
        micro_batch_size=64,
        sequence_length=1024,
        precision="bfloat16",
        model=ModelShape(
            vocab_size=16384,
            hidden_size=768,
            intermediate_size=6144,
            num_hidden_layers=10,
            num_attention_heads=12,
            num_key_value_heads=4,
            num_experts=256,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        switch=_OF_256,
    ),
}


def preset(name: str) -> TrainConfig:
    """The preset of that name; raises ConfigError with the names there are."""
    require(name in PRESETS, f"preset must be one of {', '.join(PRESETS)}; got {name!r}")
    return PRESETS[name]


def read_config(path: Path) -> TrainConfig:
    """The configuration in a TOML file.

    Raises:
        ConfigError: if it cannot be read, is no TOML, names an unknown key or a value of another
            type or out of range; names the file and the key.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        values = tomllib.loads(content.decode("utf-8")) if len(content) <= _MOST_BYTES else {}
    except _UNREADABLE as error:
        raise ConfigError(f"{path}: cannot be read as TOML ({error})") from error
    require(len(content) <= _MOST_BYTES, f"{path}: larger than {_MOST_BYTES} bytes")
    name = values.pop("preset", "starter")
    require(isinstance(name, str), f"{path}: preset must be a string")
    require("start" not in values, f"{path}: start cannot be set; give --from")
    return changed(preset(name), values, str(path))


def with_settings(config: TrainConfig, settings: Sequence[str]) -> TrainConfig:
    """`config` with changes such as `optimizer.learning_rate=1e-3`: dotted key, TOML value.

    All are made before anything is checked: bounds may move together.

    Raises:
        ConfigError: as `read_config` does.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        _merge(values, _parsed(setting))
    require("preset" not in values, "--set cannot change preset; give --preset")
    require("start" not in values, "--set cannot change start; give --from")
    return changed(config, values, "--set")


def _parsed(setting: str) -> dict[str, Any]:
    """`KEY=VALUE` as nested tables; a value that is no TOML is a word that was not quoted."""
    key, equals, value = setting.partition("=")
    require(bool(equals), f"--set wants KEY=VALUE, got {setting!r}")
    try:
        return tomllib.loads(f"{key} = {value}")
    except _UNREADABLE:
        try:
            return tomllib.loads(f"{key} = '{value.strip()}'")
        except _UNREADABLE as error:
            raise ConfigError(f"--set {setting:.80}: {error}") from error


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def changed(config: TrainConfig, values: Mapping[str, Any], where: str) -> TrainConfig:
    """`config` with nested `values`; everything is checked again."""
    changes = {
        key: _converted(getattr(config, key), value, key, where)
        for key, value in known_fields(TrainConfig, without_removed(values, where), where).items()
    }
    return dataclasses.replace(config, **changes)


def _converted(present: Any, value: Any, key: str, where: str) -> Any:
    """`value` as what `present` is: a nested table, a tuple of integers, or a plain value."""
    if dataclasses.is_dataclass(present) and not isinstance(present, type):
        require(isinstance(value, dict), f"{where}: {key} must be a table")
        fields = known_fields(type(present), value, f"{where}: {key}")
        changes = {
            name: _converted(getattr(present, name), item, f"{key}.{name}", where)
            for name, item in fields.items()
        }
        return dataclasses.replace(present, **changes)
    if isinstance(present, tuple):
        items = value if isinstance(value, list) else [value]
        require(all(type(i) is int for i in items), f"{where}: {key} must be integers")
        return tuple(items)
    if type(present) is float and type(value) is int and abs(value) <= _MOST_INTEGER:
        return float(value)
    require(
        type(value) is type(present),
        f"{where}: {key} must be of type {type(present).__name__}, got {value!r:.80}",
    )
    return value
