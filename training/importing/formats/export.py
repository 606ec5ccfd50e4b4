"""Writes a checkpoint's dense model in the format of its family, for transformers to load.

The inverse of the table in `families`: neurons stay in their experts' order, which is the same
function. Routers and quality are left out. A model that was imported gets its own `config.json`
back; one that was trained here goes to the first family that can express it exactly.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from safetensors.torch import save_file
from torch import Tensor

from engine.checkpoint import atomic_directory, read_json, verify_manifest, write_json
from engine.config import ModelConfig
from engine.errors import ConfigError, require
from engine.text.tokenizer import Tokenizer
from training.importing.formats.configs import one_expert
from training.importing.formats.families import FAMILIES, Family, Weight, family_of
from training.importing.formats.reader import INDEX, KEPT_FILES, SINGLE, SOURCE_CONFIG
from training.importing.formats.stored import StoredTensors

SHARD_BYTES: Final = 2 << 30
_FOREIGN: Final = ("fatrelu", "drelu")  # activations that transformers does not have


def export(checkpoint: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> Family:
    """Write the dense model of `checkpoint` into the new directory `out`; returns its family.

    One file's tensors are in memory at a time. The directory is there whole or not at all.

    Raises:
        CheckpointError: `checkpoint` is none, or is damaged.
        ConfigError: `out` exists, or no family can express the model.
    """
    entries = verify_manifest(checkpoint)
    config = ModelConfig.from_dict(read_json(checkpoint / "config.json"))
    require(not out.exists(), f"{out}: exists already; name a new directory")
    family, values = _written_config(checkpoint, config)
    with atomic_directory(out, manifest=False) as directory:
        write_json(directory / "config.json", values)
        _write_weights(StoredTensors(checkpoint, entries), family, config, directory, shard_bytes)
        _write_tokenizer(checkpoint, directory, config)
    return family


# --- which family ---------------------------------------------------------------------------------


def _written_config(checkpoint: Path, config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The family, and its `config.json`: the one that was imported if it still tells the truth."""
    kept = checkpoint / SOURCE_CONFIG
    if kept.is_file():
        values = read_json(kept)
        family = family_of(values)
        if not _differences(family.read_config(values, relufy=True), config):
            act = {} if _is_relu(family, values) else {family.activation_key: "relu"}
            # transformers 5 writes `dtype`, which it prefers to the older name.
            dtypes = {"dtype": config.torch_dtype} if "dtype" in values else {}
            return family, {**values, **act, **_dtype(config), **dtypes}
    closest: tuple[int, str] | None = None
    for family in FAMILIES:
        values = _common(family, config) | family.write_config(config)
        try:
            differences = _differences(family.read_config(values), config)
        except ConfigError as error:
            differences = [str(error).removeprefix("config.json: ")] * 9
        if not differences:
            _check_in_transformers(checkpoint, family, config)
            return family, values
        reason = f"{family.name} models differ in {'; '.join(dict.fromkeys(differences))}"
        if closest is None or len(differences) < closest[0]:
            closest = (len(differences), reason)
    assert closest is not None
    raise ConfigError(
        f"{checkpoint}: no family of transformers' can express this model; of the closest, "
        f"{closest[1]}"
    )


def _check_in_transformers(checkpoint: Path, family: Family, config: ModelConfig) -> None:
    """Raise ConfigError unless transformers itself runs this model of the family."""
    missing = f"the activation {config.hidden_act}" if config.hidden_act in _FOREIGN else ""
    missing = missing if family.in_transformers else f"{family.name} models"
    require(
        not missing,
        f"{checkpoint}: transformers does not have {missing}; their authors' code is named by the "
        f"config.json of the model that was imported, and the checkpoint has no {SOURCE_CONFIG} "
        f"that fits it",
    )


def _is_relu(family: Family, values: Mapping[str, Any]) -> bool:
    try:
        family.read_config(values)
    except ConfigError:
        return False
    return True


def _differences(found: ModelConfig, wanted: ModelConfig) -> list[str]:
    """The settings in which two models differ, as `name: value instead of value`."""
    if found.intermediate_size != wanted.intermediate_size:
        return [f"intermediate_size: {found.intermediate_size}"]
    a, b = _function(found), _function(wanted)
    return [f"{key}: {a[key]!r} instead of {b[key]!r}" for key in a if a[key] != b[key]]


def _function(config: ModelConfig) -> dict[str, Any]:
    """The settings that decide what a dense model computes."""
    same = dataclasses.replace(
        config,
        experts=one_expert(config.intermediate_size),
        torch_dtype="float32",
        initializer_range=0.02,
    )
    return dataclasses.asdict(same)


def _common(family: Family, config: ModelConfig) -> dict[str, Any]:
    """The part of the configuration that all families share."""
    return {
        "model_type": family.model_types[0],
        "architectures": [family.architecture],
        "vocab_size": config.vocab_size,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "tie_word_embeddings": config.tie_word_embeddings,
        **_dtype(config),
    }


def _dtype(config: ModelConfig) -> dict[str, str]:
    return {"torch_dtype": config.torch_dtype}


# --- weights --------------------------------------------------------------------------------------


def _write_weights(
    tensors: StoredTensors,
    family: Family,
    config: ModelConfig,
    directory: Path,
    shard_bytes: int,
) -> None:
    shards: list[list[tuple[str, Weight, int]]] = [[]]
    size = 0
    for item in _weights(family, config):
        nbytes = tensors.nbytes(item[0])
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += nbytes
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        name = SINGLE
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        theirs = dict(_theirs(tensors, shard, config))
        save_file(theirs, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(theirs, name)
        total += sum(tensor.nbytes for tensor in theirs.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / INDEX, index)


def _weights(family: Family, config: ModelConfig) -> Iterator[tuple[str, Weight, int]]:
    """(name of ours, weight, layer) of everything that such a model has."""
    for weight in family.rest:
        if weight.when(config):
            yield weight.ours, weight, 0
    for layer in range(config.num_hidden_layers):
        for weight in family.layer:
            if weight.when(config):
                yield f"layers.{layer}.{weight.ours}", weight, layer


def _theirs(
    tensors: StoredTensors, shard: list[tuple[str, Weight, int]], config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    for ours, weight, layer in shard:
        parts = weight.transform.give(tensors[ours], config)
        for name, part in zip(weight.theirs, parts, strict=True):
            yield name.format(i=layer), part.clone()


# --- the rest -------------------------------------------------------------------------------------


def _write_tokenizer(checkpoint: Path, directory: Path, config: ModelConfig) -> None:
    for name in ("tokenizer.json", *KEPT_FILES):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, directory / name)
    if not (directory / "tokenizer_config.json").exists():
        backend = Tokenizer.from_file(checkpoint / "tokenizer.json").backend
        values = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": backend.id_to_token(config.eos_token_id),
            "model_max_length": config.max_position_embeddings,
        }
        write_json(directory / "tokenizer_config.json", values)
    # An imported model keeps its own file, which may name several ends of text and its authors' way
    # to sample.
    generation = directory / "generation_config.json"
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    write_json(generation, ends | (read_json(generation) if generation.exists() else {}))
