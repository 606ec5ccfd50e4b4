"""The sources that an import reads, whatever their format on disk: also our own checkpoints.

A source gives a model in our names, one layer at a time, so that no more than that is in memory.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.checkpoint import MANIFEST, read_json, verify_manifest
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.text.chat_template import read_text
from engine.text.tokenizer import Tokenizer
from training.importing.formats.reader import KEPT_FILES, SOURCE_CONFIG, Source
from training.importing.formats.stored import StoredTensors


class ModelSource(Protocol):
    """A model to import."""

    @property
    def family(self) -> str:
        """The kind of model, in a word."""

    @property
    def model_config(self) -> ModelConfig:
        """Its shape; `torch_dtype` is that of its weights, `experts` means nothing."""

    def layer(self, index: int) -> dict[str, Tensor]:
        """The tensors of one layer, named as in `engine.model.Layer`, without routers."""

    def rest(self) -> dict[str, Tensor]:
        """All others, named as in `engine.model.Decoder`."""

    def texts(self) -> dict[str, str]:
        """Files to keep beside the imported model, by name."""


class AmbidexSource:
    """A checkpoint of our own as a source: its neurons are grouped and its routers fitted anew."""

    family = "ambidex"

    def __init__(self, path: Path) -> None:
        entries = verify_manifest(path)
        self.model_config = ModelConfig.from_dict(read_json(path / "config.json"))
        self._tensors = StoredTensors(path, entries)
        self._names = sorted(n for n in self._tensors.files if not n.endswith("ffn.router"))
        self._kept = [path / name for name in (SOURCE_CONFIG, *KEPT_FILES) if name in entries]

    def layer(self, index: int) -> dict[str, Tensor]:
        prefix = f"layers.{index}."
        names = [n for n in self._names if n.startswith(prefix)]
        return {name.removeprefix(prefix): self._tensors[name] for name in names}

    def rest(self) -> dict[str, Tensor]:
        return {n: self._tensors[n] for n in self._names if not n.startswith("layers.")}

    def texts(self) -> dict[str, str]:
        """The files that an import, or somebody else, has put beside the weights."""
        return {path.name: read_text(path) for path in self._kept}


def open_source(path: Path) -> ModelSource:
    """The model in the directory `path`.

    Raises:
        CheckpointError: if there is none that can be imported; names the file and the reason.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    if (path / MANIFEST).is_file():
        return AmbidexSource(path)
    source = Source.open(path)
    source.check_tensors()
    return source


def read_tokenizer(path: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer beside the model of that shape.

    Raises:
        CheckpointError: if it is missing, not usable, or has more tokens than the model.
    """
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{path / 'tokenizer.json'}: missing; transformers' "
            f"AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR) makes it from older files"
        )
    tokenizer = Tokenizer.from_file(
        path / "tokenizer.json", config.eos_token_id, config.bos_token_id
    )
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path / 'tokenizer.json'}: has {tokenizer.vocab_size} tokens, the model only "
            f"{config.vocab_size}"
        )
    return tokenizer


def fingerprint(path: Path) -> str:
    """Identify the files of a source: SHA-256 over names, sizes and times of change.

    Not over their contents: reading tens of gigabytes once more would take longer than it helps.
    """
    digest = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file()):
        found = file.stat()
        digest.update(f"{file.name} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of that name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype
