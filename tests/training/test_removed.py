"""Settings that were removed get one sentence; the values that stayed and older runs still work."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

from engine.errors import ConfigError
from training.config import TrainConfig
from training.errors import TrainingError
from training.importing.options import ImportOptions
from training.presets import preset, read_config, with_settings
from training.run import run_state
from training.trainer import Trainer

GONE = [("router", "learned", "centroid"), ("clustering", "coactivation", "weights")]


@pytest.mark.parametrize(("key", "gone", "stays"), GONE)
def test_what_was_removed_gets_one_sentence(
    key: str, gone: str, stays: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.toml"
    path.write_text(f'[switch]\n{key} = "{gone}"\n')
    sentence = rf'switch\.{key} = "{gone}" \(.*\) was removed, .*; leave switch\.{key} out'
    with pytest.raises(ConfigError, match=f"^{path}: {sentence}"):
        read_config(path)
    with pytest.raises(ConfigError, match=f"^--set: {sentence}"):
        with_settings(preset("smoke"), [f"switch.{key}={gone}"])
    with pytest.raises(ConfigError, match=f'can only be "{stays}"; leave it out'):
        with_settings(preset("smoke"), [f"switch.{key}=3"])


@pytest.mark.parametrize(("key", "stays"), [(key, stays) for key, _, stays in GONE])
def test_a_file_that_names_what_stayed_still_loads(key: str, stays: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(f'preset = "smoke"\n[switch]\n{key} = "{stays}"\npenalty = 0.5\n')
    smoke = preset("smoke")
    assert read_config(path) == dataclasses.replace(
        smoke, switch=dataclasses.replace(smoke.switch, penalty=0.5)
    )


def test_an_import_that_asks_for_it_gets_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"--cluster coactivation was removed, .*; leave"):
        ImportOptions(cluster="coactivation")


def test_the_digest_is_that_of_the_version_that_had_the_settings() -> None:
    """Runs that were started then go on: their digest covered both settings."""
    values = dataclasses.asdict(preset("smoke"))
    del values["start"]
    values["switch"] |= {"router": "centroid", "clustering": "weights"}
    before = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    assert preset("smoke").digest == before


def test_a_run_that_used_it_cannot_go_on_and_says_why(
    micro: TrainConfig, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    Trainer(micro, run, [corpus]).train()
    config = json.loads((run / "config.json").read_text())
    config["switch"]["router"] = "learned"
    (run / "config.json").write_text(json.dumps(config))
    progress = run_state.load_progress(run)
    assert progress is not None
    state = run / f"state-{progress.step:09d}"
    # Only a run with another digest can have used it: the digest covers the setting.
    other = dataclasses.replace(micro, seed=micro.seed + 1)
    with pytest.raises(TrainingError, match=r'cannot go on: switch\.router = "learned" .* removed'):
        Trainer(other, run, [corpus])
    assert state.is_dir()
