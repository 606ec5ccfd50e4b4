"""Reads a Hugging Face directory as a model in our names, one layer at a time.

Files are mapped, not read: a tensor is in memory while it is used. The files must hold exactly the
tensors that `config.json` implies, in its shapes; each is asked for at most once.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import torch
from torch import Tensor

from engine.checkpoint import read_json
from engine.config import DTYPES, ModelConfig
from engine.errors import CheckpointError, require
from engine.model.decoder import Decoder
from engine.text.chat_template import read_text
from training.importing.formats.families import Family, Weight, family_of
from training.importing.formats.stored import names_in, opened
from training.importing.formats.transforms import Shape

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Kept beside an imported model, so that it can be written back as it was.
SOURCE_CONFIG: Final = "source_config.json"
KEPT_FILES: Final = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
_TIED_HEAD: Final = "lm_head.weight"


class Source:
    """A directory that `open` found to hold a model.

    Attributes:
        path: the directory.
        table: gives the family's names their meaning.
        family: the table's name.
        model_config: the model's shape, with all neurons in one expert and the dtype of its
            weights.
        config_json: the content of its `config.json`.
    """

    def __init__(
        self,
        path: Path,
        table: Family,
        model_config: ModelConfig,
        config_json: dict[str, Any],
        files: Mapping[str, Path],
    ) -> None:
        self.path = path
        self.table = table
        self.model_config = model_config
        self.config_json = config_json
        self._files = dict(files)
        self._left = {n for n in files if not any(re.fullmatch(b, n) for b in table.buffers)}
        layer, self._rest_shapes = _our_shapes(model_config)
        self._layer_shapes = layer

    @property
    def family(self) -> str:
        return self.table.name

    @classmethod
    def open(cls, directory: Path | str, *, relufy: bool = False) -> Self:
        """Read what the directory holds; no tensor yet.

        Args:
            directory: holds `config.json` and safetensors files.
            relufy: read GELU and SiLU as ReLU, for a model that is to be trained so.

        Raises:
            CheckpointError: a file is missing, damaged, or one that is not read (pickle).
            ConfigError: the model is none that can be run.
        """
        path = Path(directory)
        if not path.is_dir():
            raise CheckpointError(f"{path}: no such directory")
        values = read_json(path / "config.json")
        table = family_of(values)
        config = table.read_config(values, relufy=relufy)
        files = _tensor_files(path)
        dtype = _common_dtype(files)
        return cls(path, table, dataclasses.replace(config, torch_dtype=dtype), values, files)

    def layer(self, index: int) -> dict[str, Tensor]:
        """The tensors of one layer, named and shaped as in `engine.model.Layer`, without router.

        Raises:
            CheckpointError: a tensor is missing, misshapen, or was asked for before.
        """
        assert 0 <= index < self.model_config.num_hidden_layers
        return self._read(self.table.layer, self._layer_shapes, index)

    def rest(self) -> dict[str, Tensor]:
        """All other tensors, as in `engine.model.Decoder`; raises as `layer` does."""
        found = self._read(self.table.rest, self._rest_shapes, 0)
        if self.model_config.tie_word_embeddings:
            self._check_tied_head(found["embedding.weight"])
        return found

    def check_tensors(self) -> None:
        """Compare names and shapes in the files with those that the model has; no tensor is read.

        Raises:
            CheckpointError: one is missing, misshapen, or is none of this family's.
        """
        wanted = self._wanted()
        for name in wanted:
            if name not in self._files:
                raise CheckpointError(f"{self.path}: no file holds the tensor {name}")
        for file in sorted({self._files[name] for name in wanted}):
            with opened(file) as found:
                for name in (n for n in wanted if self._files[n] == file):
                    self._check_shape(name, found.get_slice(name).get_shape(), wanted[name])
        extra = self._left - wanted.keys()
        if self.model_config.tie_word_embeddings:
            extra.discard(_TIED_HEAD)
        if extra:
            name = min(extra)
            raise CheckpointError(
                f"{self._files[name]}: no {self.family} model has a tensor {name}; nothing is left "
                f"out silently"
            )

    def _wanted(self) -> dict[str, Shape]:
        """Shapes of all tensors that the model has, by the files' names."""
        config = self.model_config
        layers = range(config.num_hidden_layers)
        parts = (
            (self.table.layer, self._layer_shapes, layers),
            (self.table.rest, self._rest_shapes, (0,)),
        )
        return {
            self._name(name.format(i=index)): shape
            for weights, shapes, indices in parts
            for weight in weights
            if weight.when(config)
            for name, shape in zip(
                weight.theirs, weight.transform.shapes(shapes[weight.ours], config), strict=True
            )
            for index in indices
        }

    def _check_shape(self, name: str, found: Sequence[int], wanted: Shape) -> None:
        if tuple(found) != wanted:
            raise CheckpointError(
                f"{self._files[name]}: tensor {name} has shape {list(found)}, config.json implies "
                f"{list(wanted)}"
            )

    def _name(self, name: str) -> str:
        """The name with or without the family's prefix, as the files have it."""
        bare = name.removeprefix(self.table.prefix)
        return bare if name not in self._files and bare in self._files else name

    def texts(self) -> dict[str, str]:
        """Files to keep beside the imported model, by name: what writing it back needs.

        Raises:
            CheckpointError: one is larger than a server reads, or not UTF-8.
        """
        texts = {SOURCE_CONFIG: read_text(self.path / "config.json")}
        for name in KEPT_FILES:
            if (self.path / name).is_file():
                texts[name] = read_text(self.path / name)
        return texts

    def _read(
        self, weights: Sequence[Weight], shapes: Mapping[str, Shape], index: int
    ) -> dict[str, Tensor]:
        config, found = self.model_config, {}
        for weight in weights:
            if not weight.when(config):
                continue
            names = [name.format(i=index) for name in weight.theirs]
            wanted = weight.transform.shapes(shapes[weight.ours], config)
            tensors = [self._tensor(n, shape) for n, shape in zip(names, wanted, strict=True)]
            found[weight.ours] = weight.transform.take(tensors, config)
        assert found.keys() == shapes.keys(), found.keys() ^ shapes.keys()
        return found

    def _tensor(self, name: str, shape: Shape) -> Tensor:
        """The tensor of that name, with or without the family's prefix."""
        name = self._name(name)
        if name not in self._files:
            raise CheckpointError(f"{self.path}: no file holds the tensor {name}")
        if name not in self._left:
            raise CheckpointError(f"{self.path}: the tensor {name} was read twice")
        self._left.remove(name)
        with opened(self._files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        self._check_shape(name, tensor.shape, shape)
        return tensor

    def _check_tied_head(self, embedding: Tensor) -> None:
        """A head that is stored although it is tied must be the embedding."""
        head = _TIED_HEAD
        if head in self._left and not torch.equal(
            self._tensor(head, tuple(embedding.shape)), embedding
        ):
            raise CheckpointError(
                f"{self._files[head]}: {head} differs from the embedding, although config.json "
                "says that they are tied (tie_word_embeddings)"
            )


def _our_shapes(config: ModelConfig) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Shapes of a layer's tensors, and of those outside of layers, by our names."""
    with torch.device("meta"):
        model = Decoder(dataclasses.replace(config, num_hidden_layers=1))
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items() if "router" not in n}
    first = "layers.0."
    layer = {n.removeprefix(first): s for n, s in shapes.items() if n.startswith(first)}
    return layer, {n: s for n, s in shapes.items() if not n.startswith(first)}


def _tensor_files(path: Path) -> dict[str, Path]:
    """The file of every tensor in the directory."""
    if (path / INDEX).is_file():
        return _indexed_files(path)
    if (path / SINGLE).is_file():
        return dict.fromkeys(names_in(path / SINGLE), path / SINGLE)
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{path / pickles[0]}: is a pickle file, which can run any code when it is read; save "
            "the model as safetensors first (transformers: save_pretrained)"
        )
    raise CheckpointError(f"{path}: holds neither {SINGLE} nor {INDEX}")


def _indexed_files(path: Path) -> dict[str, Path]:
    weight_map = read_json(path / INDEX).get("weight_map")
    plain = isinstance(weight_map, dict) and weight_map
    require(bool(plain), f"{path / INDEX}: has no weight_map", CheckpointError)
    assert isinstance(weight_map, dict)
    files: dict[str, Path] = {}
    for shard in sorted({str(name) for name in weight_map.values()}):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{path / INDEX}: {shard!r} is not a safetensors file beside it")
        if not (path / shard).is_file():
            raise CheckpointError(f"{path / shard}: missing, though {INDEX} names it")
        listed = {name for name, file in weight_map.items() if file == shard}
        held = set(names_in(path / shard))
        if held != listed:
            name = sorted(held ^ listed)[0]
            raise CheckpointError(f"{path / shard}: and {INDEX} disagree about the tensor {name}")
        files |= dict.fromkeys(held, path / shard)
    return files


def _common_dtype(files: Mapping[str, Path]) -> str:
    """The dtype of all matrices.

    Raises:
        CheckpointError: there are several, or one that is not run.
    """
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    found: dict[str, str] = {}
    for file in sorted(set(files.values())):
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                part = tensors.get_slice(name)
                if len(part.get_shape()) == 2:
                    found.setdefault(part.get_dtype(), f"{file}: tensor {name}")
    if len(found) > 1 or not found.keys() <= names.keys():
        listed = "; ".join(f"{where} has {dtype}" for dtype, where in found.items())
        raise CheckpointError(f"{listed}: all must have one dtype of {', '.join(DTYPES)}")
    return names[next(iter(found))] if found else "float32"
