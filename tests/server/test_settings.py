"""Settings: from the environment, bounded, described."""

from __future__ import annotations

import dataclasses
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from engine.checkpoint import STARTER
from engine.config import EngineConfig
from server.process.serve import listen
from server.settings import (
    ENGINE_SETTINGS,
    ENGINE_VARIABLES,
    REMOVED,
    Settings,
    explain,
    unknown_variables,
)


def test_defaults_are_the_engine_s_and_stay_on_this_machine() -> None:
    settings = Settings()
    assert settings.host == "127.0.0.1"
    assert settings.port == 8000
    assert settings.model == STARTER
    assert settings.engine_config() == EngineConfig(sample_every=256)


def test_the_environment_sets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMBIDEX_PORT", "9000")
    monkeypatch.setenv("AMBIDEX_MAX_NUM_SEQS", "3")
    monkeypatch.setenv("AMBIDEX_MAX_TOTAL_TOKENS", "77")
    monkeypatch.setenv("AMBIDEX_ACCESS_LOG", "true")
    monkeypatch.setenv("AMBIDEX_PREFIX_CACHING", "false")
    settings = Settings()
    assert settings.port == 9000
    assert settings.access_log is True
    assert settings.engine_config() == EngineConfig(
        max_num_seqs=3,
        max_model_len=77,
        prefix_caching=False,
        sample_every=256,
    )
    assert Settings(port=1).port == 1  # arguments come first


def test_every_setting_is_described_and_every_number_bounded() -> None:
    for name, schema in Settings.model_json_schema()["properties"].items():
        assert schema["description"], name
        if schema.get("type") in ("integer", "number"):
            assert {"minimum", "exclusiveMinimum"} & schema.keys(), name
            assert "maximum" in schema, name


def test_settings_of_the_engine_are_its_options() -> None:
    schema = Settings.model_json_schema()["properties"]
    for setting, name in ENGINE_SETTINGS.items():
        (field,) = (f for f in dataclasses.fields(EngineConfig) if f.name == name)
        option, ours = field.metadata["option"], schema[setting]
        assert ours["description"] == option.help
        assert ours["default"] == (256 if name == "sample_every" else field.default)
        assert tuple(ours.get("enum", ())) == option.choices
        assert (ours.get("minimum"), ours.get("maximum")) == (option.low, option.high)
    names = {f.name for f in dataclasses.fields(EngineConfig)} - REMOVED.keys()
    assert set(ENGINE_SETTINGS.values()) == names
    assert ENGINE_SETTINGS["max_total_tokens"] == "max_model_len"


@pytest.mark.parametrize(
    "values",
    [
        {"port": -1},
        {"port": 65_536},
        {"host": ""},
        {"device": "tpu"},
        {"dtype": "int8"},
        {"kv_cache_bytes": 0},
        {"drain_timeout": -1},
        {"drain_timeout": float("nan")},
        {"body_timeout": 0},
        {"max_body_bytes": 1 << 40},
        {"prefix_caching": "perhaps"},
        {"max_input_tokens": 10, "max_total_tokens": 10},
        {"max_num_seqs": 64, "max_num_batched_tokens": 32},
        {"unknown": 1},
    ],
)
def test_out_of_range_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Settings(**values)


def test_refusals_name_the_variable() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(port=-1, max_waiting=0)
    lines = explain(caught.value).splitlines()
    assert sorted(lines) == [
        "AMBIDEX_MAX_WAITING: Input should be greater than or equal to 1",
        "AMBIDEX_PORT: Input should be greater than or equal to 0",
    ]


def test_input_limit_leaves_room_for_a_token() -> None:
    assert Settings().input_limit(100) == 99
    assert Settings(max_input_tokens=40).input_limit(100) == 40
    assert Settings(max_input_tokens=400).input_limit(100) == 99


def test_an_address_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit, match=f"127.0.0.1 port {port}"):
            listen(Settings(port=port))


def test_variables_that_are_no_settings_are_named() -> None:
    environment = {
        "AMBIDEX_MAX_NUM_SEQ": "4",
        "AMBIDEX_NONSENSE_123": "",
        "AMBIDEX_PORT": "1",
        "AMBIDEX_CACHE": "/tmp",
        "PATH": "",
    }
    first, second = unknown_variables(environment)
    assert first == (
        "AMBIDEX_MAX_NUM_SEQ is no setting and is not looked at; did you mean AMBIDEX_MAX_NUM_SEQS?"
    )
    assert second.startswith("AMBIDEX_NONSENSE_123 is no setting")


def test_a_removed_setting_is_refused_in_a_sentence_that_says_why() -> None:
    sentence = "priority_age_seconds was removed: requests have no priorities, they are served in"
    with pytest.raises(ValidationError, match=sentence):
        Settings(priority_age_seconds=2.5)  # type: ignore[call-arg]
    (warning,) = unknown_variables({"AMBIDEX_PRIORITY_AGE_SECONDS": "2.5"})
    assert warning.startswith("AMBIDEX_PRIORITY_AGE_SECONDS was removed and is not looked at: ")


def test_what_the_engine_reads_by_itself_is_known() -> None:
    root = Path(__file__).parents[2] / "engine"
    texts = (path.read_text(encoding="utf-8") for path in root.rglob("*.py"))
    read = {
        name for text in texts for name in re.findall(r'environ[^\n]*"(AMBIDEX_[A-Z_]+)"', text)
    }
    assert read
    settings = {f"AMBIDEX_{name.upper()}" for name in Settings.model_fields}
    assert read <= ENGINE_VARIABLES | settings
