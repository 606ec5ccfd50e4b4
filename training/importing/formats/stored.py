"""Tensors in safetensors files. Files are mapped: a tensor is in memory while it is used."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import CheckpointError


def opened(file: Path) -> safe_open:
    """The open file; raises CheckpointError if it is damaged."""
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: damaged or not completely written ({error})") from error


def names_in(file: Path) -> list[str]:
    """The names of the tensors that the file holds."""
    with opened(file) as found:
        return list(found.keys())


class StoredTensors:
    """The tensors of several files by name, read when they are asked for.

    Attributes:
        path: the directory.
        files: the file of each tensor.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        """Open the tensors that the safetensors files `names` in the directory `path` hold."""
        self.path = path
        self.files: dict[str, Path] = {}
        for name in sorted(n for n in names if n.endswith(".safetensors")):
            self.files |= dict.fromkeys(names_in(path / name), path / name)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.files:
            raise CheckpointError(f"{self.path}: has no tensor {name}")
        with opened(self.files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def nbytes(self, name: str) -> int:
        return self[name].nbytes  # the file is mapped, so nothing is read
