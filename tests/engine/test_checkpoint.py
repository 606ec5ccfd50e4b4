"""Checkpoints: whole or not there, verified, refused with the file's name."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine import checkpoint as checkpoints
from engine.checkpoint import STARTER, Checkpoint, atomic_directory, check_device, load, save
from engine.errors import CheckpointError, ConfigError


@pytest.fixture
def saved(checkpoint: Checkpoint, reference: object, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    save(path, checkpoint.model, checkpoint.tokenizer, {"seed": 1}, {"README.md": "# card\n"})
    return path


def test_round_trip_is_exact(saved: Path, checkpoint: Checkpoint) -> None:
    loaded = load(saved)
    assert loaded.config == checkpoint.config
    assert loaded.report == {"seed": 1}
    for name, tensor in checkpoint.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    assert loaded.tokenizer.encode("naïve 東京") == checkpoint.tokenizer.encode("naïve 東京")


def test_shards_hold_the_same_tensors(
    saved: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 10_000)
    sharded = tmp_path / "sharded"
    save(sharded, checkpoint.model, checkpoint.tokenizer, {})
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    whole, parts = load(saved).model.state_dict(), load(sharded).model.state_dict()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_dtype_is_the_checkpoints_own_unless_asked(saved: Path) -> None:
    assert load(saved).model.embedding.weight.dtype == torch.float32
    model = load(saved, dtype="bfloat16").model
    assert model.embedding.weight.dtype == torch.bfloat16
    assert model.ffns()[0].router.dtype == torch.float32


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (lambda p: flip_byte(p / "model.safetensors"), "model.safetensors: damaged"),
    "cut short": (
        lambda p: (p / "model.safetensors").write_bytes(b"x"),
        "model.safetensors: has 1 bytes",
    ),
    "missing file": (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json: missing"),
    "manifest not JSON": (
        lambda p: (p / "manifest.json").write_text("{"),
        "manifest.json: not readable",
    ),
    "manifest lists nothing": (
        lambda p: (p / "manifest.json").write_text('{"format": 1, "files": {}}'),
        "lists no files",
    ),
    "path outside": (
        lambda p: (p / "manifest.json").write_text('{"format": 1, "files": {"../x": {}}}'),
        "not a plain file",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_by_name(saved: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(saved)
    with pytest.raises(CheckpointError, match=message):
        load(saved)


def reseal(path: Path) -> None:
    """A manifest that fits whatever the files are now."""
    files = [p for p in path.iterdir() if p.name != "manifest.json"]
    entries = {
        p.name: {"bytes": p.stat().st_size, "sha256": checkpoints.file_sha256(p)} for p in files
    }
    checkpoints.write_json(path / "manifest.json", {"format": 1, "files": entries})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type must be 'ambidex'"),
        ({"surprise": 1}, "unknown keys: surprise"),
        ({"hidden_size": 64}, "tensor embedding.weight has shape"),
        ({"vocab_size": 1}, "vocab_size must be between 2"),
        ({"hidden_act": "gelu"}, "hidden_act must be one of relu, relu2"),
        ({"num_hidden_layers": 3}, "tensor layers.2"),
        ({"hidden_size": 32.0}, "hidden_size must be a whole number"),
    ],
)
def test_a_foreign_config_is_refused(saved: Path, change: dict[str, object], message: str) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | change))
    reseal(saved)
    with pytest.raises(CheckpointError, match=message):
        load(saved)


@pytest.mark.parametrize("policy", ["auto", "banana", "top_k:999", "oracle:4"])
def test_a_default_policy_that_could_not_run_is_refused(saved: Path, policy: str) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["experts"]["default_policy"] = policy
    (saved / "config.json").write_text(json.dumps(config))
    reseal(saved)
    with pytest.raises(CheckpointError, match=r"experts\.(default_policy|top_k)"):
        load(saved)


def test_only_what_the_manifest_lists_is_read(saved: Path) -> None:
    index = {"weight_map": {"embedding.weight": "../evil.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    load(saved)
    manifest = json.loads((saved / "manifest.json").read_text())
    for name, message in (
        ("config.json", "does not list config.json"),
        ("model.safetensors", "lists no model"),
    ):
        files = {n: e for n, e in manifest["files"].items() if n != name}
        (saved / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
        with pytest.raises(CheckpointError, match=message):
            load(saved)
    (saved / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(CheckpointError, match="format must be 1"):
        load(saved)


def test_no_directory_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        load(tmp_path / "nowhere")


def test_a_failed_write_leaves_the_old_directory_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with atomic_directory(target) as directory:
        (directory / "a").write_text("old")

    def write_and_fail() -> None:
        with atomic_directory(target) as directory:
            (directory / "a").write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_and_fail()
    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_a_swap_that_fails_puts_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    with atomic_directory(target) as directory:
        (directory / "a").write_text("old")
    rename = Path.rename

    def fail_into_place(self: Path, to: Path) -> Path:
        if self.suffix == ".tmp":
            raise KeyboardInterrupt
        return rename(self, to)

    def write() -> None:
        with atomic_directory(target) as directory:
            (directory / "a").write_text("new")

    monkeypatch.setattr(Path, "rename", fail_into_place)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_the_packaged_starter_loads_and_says_how_it_was_made() -> None:
    starter = load(STARTER)
    size = sum(p.stat().st_size for p in STARTER.iterdir())
    assert size <= 10_000_000
    card = (STARTER / "README.md").read_text(encoding="utf-8")
    assert "ambidex train --preset starter" in card
    assert starter.report["corpus"]["fingerprint"] in card
    quarter = [p for p in starter.config.experts.quality if p.share == 0.25]
    assert quarter[0].relative <= 0.01


def test_a_device_that_cannot_be_used_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch sees no CUDA device here"):
        load(STARTER, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigError, match=r"cannot keep its kernels in .*cache \(TRITON_CACHE_DIR"):
        load(STARTER, device="cuda")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    check_device("cuda")


def test_a_file_that_may_not_be_read_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read anything, hence the patch."""
    real = checkpoints.file_sha256

    def refusing(path: Path) -> str:
        if path.name == "model.safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(checkpoints, "file_sha256", refusing)
    with pytest.raises(CheckpointError) as caught:
        load(saved)
    assert str(caught.value).startswith(f"{saved / 'model.safetensors'}: user ")
    assert str(caught.value).endswith("cannot read it: Permission denied")


def test_json_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(CheckpointError, match=r"config\.json: nested too deeply"):
        checkpoints.read_json(path)
