"""A finished checkpoint is copied to where servers watch for one.

A run's directory is no place for servers to look at: it has the states to go on from, logs and
tokens beside the checkpoint, and may lie on another volume.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from engine.checkpoint import MANIFEST, atomic_directory, file_sha256, verify_manifest
from engine.errors import CheckpointError, require
from training.errors import TrainingError, writing


def check_target(target: Path) -> None:
    """Refuse before the training what could not be published after it.

    Raises:
        TrainingError: if `target` is something else than a checkpoint, which alone is replaced.
        StorageError: if the directory that is to hold it cannot be made or written to.
    """
    require(
        not target.exists() or (target / MANIFEST).is_file(),
        f"--publish {target}: exists and is no checkpoint, which alone is replaced; "
        f"name a directory that is not there yet, such as {target / 'NAME'}",
        TrainingError,
    )
    probe = target.with_name(f".{target.name}.probe")
    with writing(target, "nothing was trained; name another directory with --publish"):
        target.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # several processes may look at once


def publish(checkpoint: Path, target: Path) -> None:
    """Copy `checkpoint` to `target`, whole or not at all, in the place of an older one.

    Raises:
        CheckpointError: if `checkpoint` is damaged, or its copy is.
        StorageError: if it cannot be written.
    """
    files = verify_manifest(checkpoint)
    with (
        writing(target, f"{checkpoint} is whole: free space and run the same command again"),
        atomic_directory(target) as directory,
    ):
        for name, entry in files.items():
            copy = shutil.copyfile(checkpoint / name, directory / name)
            # The copy's own manifest is made from the copied files, so it cannot tell a bad copy.
            require(
                file_sha256(copy) == entry["sha256"],
                f"{checkpoint / name}: changed while it was copied, or the copy is damaged; "
                f"run the same command again",
                CheckpointError,
            )
