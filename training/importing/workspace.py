"""A half-done import on disk: what a kill leaves, and what the same command goes on from.

    .NAME.import/              beside the checkpoint NAME that it is to become
        import.json            what is being imported, and how
        layer-00003/           a finished layer: its weights, its result, and their manifest
        states-00003/          the hidden states behind it; the latest alone

A directory has its name only when it is whole. At the end the weights become files of the
checkpoint by a second name (a hard link): nothing is copied, and nothing is lost if that fails.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open
from torch import Tensor

from engine.checkpoint import (
    atomic_directory,
    load_tensors,
    read_json,
    save_tensors,
    verify_manifest,
    write_json,
)
from training.errors import TrainingError, writing
from training.importing.layer import LayerResult
from training.run import run_state

_IDENTITY: Final = "import.json"
_RESULT: Final = "result.json"
_UNFINISHED: Final = re.compile(r"\.(layer|states)-\d{5}\.\d+\.(tmp|old)")


class Workspace:
    """The directory of one import, held for this process alone."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.path = out.with_name(f".{out.name}.import")

    @contextmanager
    def opened(self, identity: Mapping[str, Any], *, fresh: bool) -> Iterator[None]:
        """Begin, or go on with, the import of that identity.

        Raises:
            TrainingError: if a half-done import of another identity is there and `fresh` is not
                set, or another process is at work.
            StorageError: if the directory cannot be written.
        """
        is_new = not self.path.exists()
        with run_state.exclusive(self.path):
            try:
                if fresh:
                    self._clear()
                self._identify(identity)
                self._sweep()
                yield
            except BaseException:
                if is_new and self.layers_done == 0:  # there is nothing to go on from
                    shutil.rmtree(self.path)
                raise

    def _identify(self, identity: Mapping[str, Any]) -> None:
        path = self.path / _IDENTITY
        if path.is_file():
            found = read_json(path)
            for name, value in identity.items():
                if found.get(name) != value:
                    raise TrainingError(
                        f"{self.path}: holds a half-done import with another {name}; run that "
                        f"command again to finish it, or give --fresh to start over"
                    )
            return
        with writing(path, "nothing was begun"):
            temporary = path.with_suffix(".tmp")
            write_json(temporary, dict(identity))
            os.replace(temporary, path)

    def _clear(self) -> None:
        for path in [*self.path.glob("layer-*"), *self.path.glob("states-*")]:
            shutil.rmtree(path)
        (self.path / _IDENTITY).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove what a kill left unfinished, and states that later ones have replaced.

        In here and of the checkpoint beside it, which no other process writes: this one holds the
        lock.
        """
        checkpoint = re.compile(rf"\.{re.escape(self._out.name)}\.\d+\.tmp")
        for folder, unfinished in ((self.path, _UNFINISHED), (self.path.parent, checkpoint)):
            for path in folder.iterdir():
                if unfinished.fullmatch(path.name):
                    shutil.rmtree(path)
        for path in sorted(self.path.glob("states-*"))[:-1]:
            shutil.rmtree(path)

    @property
    def layers_done(self) -> int:
        """Layers that need not be done again: those in front of the latest states."""
        found = [int(p.name.removeprefix("states-")) for p in self.path.glob("states-*")]
        return max(found, default=-1) + 1

    def save(
        self,
        layer: int,
        tensors: Mapping[str, Tensor],
        result: LayerResult,
        states: Mapping[str, Tensor],
    ) -> None:
        """Keep a finished layer and the states behind it.

        Raises:
            StorageError: if there is no room; says what is intact.
        """
        intact = "no layer is done yet; free space and start again"
        if layer:
            intact = (
                f"{layer} layers are done and intact: free space and run the same command again "
                f"to go on from there"
            )
        with writing(self._out, intact):
            with atomic_directory(self._layer(layer)) as directory:
                save_tensors(directory, tensors)
                write_json(directory / _RESULT, result.to_dict())
            with atomic_directory(self._states(layer)) as directory:
                save_tensors(directory, states, "states")
        if layer:
            shutil.rmtree(self._states(layer - 1))

    def states(self) -> dict[str, Tensor]:
        """The hidden states behind the last finished layer.

        Raises:
            CheckpointError: if they are damaged.
        """
        path = self._states(self.layers_done - 1)
        return load_tensors(path, verify_manifest(path), "states")

    def results(self) -> list[LayerResult]:
        """Read the result of every finished layer and verify its files.

        Raises:
            CheckpointError: if one is missing or damaged.
        """
        results = []
        for layer in range(self.layers_done):
            verify_manifest(self._layer(layer))
            results.append(LayerResult.from_dict(read_json(self._layer(layer) / _RESULT)))
        return results

    def gather(self, directory: Path, rest: Mapping[str, Tensor]) -> None:
        """Put the rest's weights and all layers' into `directory`, with an index."""
        save_tensors(directory, rest, "rest")
        files = sorted(directory.glob("rest*.safetensors"))
        for layer in range(self.layers_done):
            files += sorted(self._layer(layer).glob("model*.safetensors"))
        weight_map: dict[str, str] = {}
        size = 0
        for number, file in enumerate(files, start=1):
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            if file.parent == directory:
                file.rename(directory / name)
            else:
                _link(file, directory / name)
            with safe_open(directory / name, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  # no mapping
                    weight_map[key] = name
                    size += opened.get_tensor(key).nbytes
        (directory / "rest.safetensors.index.json").unlink(missing_ok=True)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(directory / "model.safetensors.index.json", index)

    def remove(self) -> None:
        """The import is finished: nothing here is needed any more."""
        shutil.rmtree(self.path)

    def _layer(self, layer: int) -> Path:
        return self.path / f"layer-{layer:05d}"

    def _states(self, layer: int) -> Path:
        return self.path / f"states-{layer:05d}"


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
