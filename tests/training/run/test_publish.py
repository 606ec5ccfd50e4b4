"""A checkpoint is published whole, in the place of a checkpoint and of nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engine.checkpoint import STARTER, content_digest, verify_manifest
from engine.errors import CheckpointError
from server.engines.reload import candidates
from tests.training.run.test_run_state import largest_file
from training.errors import StorageError, TrainingError
from training.run.publish import check_target, publish


def test_the_copy_is_the_checkpoint(tmp_path: Path) -> None:
    target = tmp_path / "models" / "one"
    check_target(target)
    publish(STARTER, target)
    verify_manifest(target)
    assert content_digest(target) == content_digest(STARTER)
    assert [c.path for c in candidates(target.parent)] == [target]
    check_target(target)  # a checkpoint may be replaced


def test_what_is_no_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    watched = tmp_path / "models"
    publish(STARTER, watched / "one")
    with pytest.raises(TrainingError, match=r"models: exists and is no checkpoint.*models/NAME"):
        check_target(watched)
    assert (watched / "one").is_dir()


def test_a_place_that_cannot_be_written_to_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="nothing was trained"):
        check_target(tmp_path / "file" / "models" / "one")


def test_a_full_disk_leaves_the_older_one(tmp_path: Path) -> None:
    target = tmp_path / "one"
    publish(STARTER, target)
    before = content_digest(target)
    with largest_file(1 << 20), pytest.raises(StorageError, match="is whole: free space"):
        publish(STARTER, target)
    assert content_digest(target) == before
    assert [p.name for p in tmp_path.iterdir()] == ["one"]


def test_a_damaged_checkpoint_is_not_published(tmp_path: Path) -> None:
    publish(STARTER, tmp_path / "bad")
    (tmp_path / "bad" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        publish(tmp_path / "bad", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_what_changes_while_it_is_copied_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source is verified first; what is wrong from then on shows in the copy alone."""
    publish(STARTER, tmp_path / "one")
    before = content_digest(tmp_path / "one")

    def flip_a_bit(source: Path, copy: Path) -> Path:
        whole = bytearray(source.read_bytes())
        whole[-1] ^= 1
        copy.write_bytes(whole)
        return copy

    monkeypatch.setattr(shutil, "copyfile", flip_a_bit)
    with pytest.raises(CheckpointError, match="changed while it was copied"):
        publish(STARTER, tmp_path / "one")
    assert content_digest(tmp_path / "one") == before
    assert [p.name for p in tmp_path.iterdir()] == ["one"]
