"""Checkpoints: the contract between training and engine.

A checkpoint is a directory of safetensors and JSON:

    config.json               the model's shape, its experts, its quality by k
    model.safetensors         the weights (in shards with an index above 5 GB)
    tokenizer.json            Hugging Face tokenizer
    generation_config.json    end-of-text id, for tools that read Hugging Face checkpoints
    chat_template.jinja       how a chat becomes a prompt, or in tokenizer_config.json; optional
    training_report.json      how it was made and what it scored
    manifest.json             size and SHA-256 of every other file

A directory is written under a temporary name, synced and renamed, so it is there whole or not at
all; loading verifies the manifest first and refuses a damaged or foreign directory with a sentence
that names the file. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import ModelConfig, check_choice
from engine.errors import CheckpointError, ConfigError, require
from engine.gpu._triton import cache_problem
from engine.model.decoder import Decoder
from engine.text.chat_template import read_chat_template
from engine.text.tokenizer import Tokenizer

STARTER: Final = Path(__file__).parent / "starter"
MANIFEST: Final = "manifest.json"
FORMAT: Final = 1
SHARD_BYTES: Final = 5 << 30
MAX_JSON_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        path: where it came from.
        config: the model's shape.
        model: in eval mode, on the device and in the dtype asked for.
        tokenizer: its tokenizer.
        report: `training_report.json`.
        fingerprint: SHA-256 over the weight files, hex.
        digest: SHA-256 over all its files, hex; empty if it did not come from a directory.
        chat_template: its Jinja template of chats; None if it has none.
    """

    path: Path
    config: ModelConfig
    model: Decoder
    tokenizer: Tokenizer
    report: dict[str, Any]
    fingerprint: str
    digest: str = ""
    chat_template: str | None = None


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; raises CheckpointError naming the file if there is none."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: larger than {MAX_JSON_BYTES >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: nested too deeply") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return value


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_directory(path: Path, *, manifest: bool = True) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path`, with a manifest, if the block succeeds.

    `manifest` false leaves that out: what is written is no checkpoint.
    An existing `path` is replaced only after the new directory is safely on disk; if the block
    fails (a full disk, say), it stays as it was and nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    retired = path.with_name(f".{path.name}.{os.getpid()}.old")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if manifest:
            _write_manifest(temporary)
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors makes files that only their owner can read
            _sync(file)
        _sync(temporary)
        if path.exists():
            shutil.rmtree(retired, ignore_errors=True)
            path.rename(retired)
        temporary.rename(path)
        _sync(path.parent)
    finally:
        if retired.exists() and not path.exists():
            retired.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


def _write_manifest(directory: Path) -> None:
    files = sorted(p for p in directory.iterdir() if p.name != MANIFEST)
    entries = {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in files}
    write_json(directory / MANIFEST, {"format": FORMAT, "files": entries})


def verify_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Check every file of the directory `path` against its manifest; returns the entries.

    Raises:
        CheckpointError: naming the first file that is missing, unreadable, unsafe, or differs.
    """
    try:
        return _verified_entries(path)
    except OSError as error:
        who = f"user {os.getuid()} cannot read it"
        raise CheckpointError(f"{error.filename or path}: {who}: {error.strerror}") from error


def _verified_entries(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint directory")
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path / MANIFEST}: format must be {FORMAT}")
    entries = manifest.get("files")
    if not isinstance(entries, dict) or not entries:
        raise CheckpointError(f"{path / MANIFEST}: lists no files")
    for name, entry in entries.items():
        file = path / name
        if Path(name).name != name or not isinstance(entry, dict):
            raise CheckpointError(f"{path / MANIFEST}: {name!r} is not a plain file entry")
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != entry.get("bytes"):
            raise CheckpointError(
                f"{file}: has {file.stat().st_size} bytes, manifest says {entry.get('bytes')}"
            )
        if file_sha256(file) != entry.get("sha256"):
            raise CheckpointError(f"{file}: damaged, its SHA-256 differs from the manifest")
    return entries


def save_tensors(directory: Path, tensors: Mapping[str, Tensor], stem: str = "model") -> None:
    """Write tensors as `stem.safetensors`, or as shards with an index above SHARD_BYTES."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], directory / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(directory / f"{stem}.safetensors.index.json", index)


def load_tensors(
    directory: Path, entries: Mapping[str, Any], stem: str = "model"
) -> dict[str, Tensor]:
    """The tensors that `save_tensors` wrote; only files that the manifest's `entries` list."""
    names = sorted(n for n in entries if n.startswith(stem) and n.endswith(".safetensors"))
    if not names:
        raise CheckpointError(f"{directory / MANIFEST}: lists no {stem}.safetensors")
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            tensors |= load_file(directory / name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{directory / name}: {error}") from error
    return tensors


def save(
    path: Path,
    model: Decoder,
    tokenizer: Tokenizer,
    report: Mapping[str, Any],
    extra_files: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint in the dtype of `model.config.torch_dtype`; routers stay float32.

    `extra_files` are texts to include by name, such as a model card.
    """
    config = model.config
    dtype = getattr(torch, config.torch_dtype)
    tensors = {
        name: tensor if name.endswith("ffn.router") else tensor.to(dtype)
        for name, tensor in model.state_dict().items()
    }
    with atomic_directory(path) as directory:
        write_json(directory / "config.json", config.to_dict())
        write_json(directory / "generation_config.json", {"eos_token_id": config.eos_token_id})
        write_json(directory / "training_report.json", dict(report))
        tokenizer.backend.save(str(directory / "tokenizer.json"))
        save_tensors(directory, tensors)
        for name, text in (extra_files or {}).items():
            (directory / name).write_text(text, encoding="utf-8")


def load(path: Path | str, device: str = "cpu", dtype: str = "auto") -> Checkpoint:
    """Verify and load the checkpoint at `path`.

    Args:
        path: the directory.
        device: "cpu" or "cuda".
        dtype: "float32", "bfloat16", "float16", or "auto" for the checkpoint's own.

    Raises:
        CheckpointError: if anything is missing, damaged, foreign, or does not fit together.
    """
    path = Path(path)
    check_device(device)
    entries = verify_manifest(path)
    for name in ("config.json", "tokenizer.json", "training_report.json"):
        if name not in entries:
            raise CheckpointError(f"{path / MANIFEST}: does not list {name}")
    try:
        config = ModelConfig.from_dict(read_json(path / "config.json"))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    tokenizer = Tokenizer.from_file(
        path / "tokenizer.json", config.eos_token_id, config.bos_token_id
    )
    _check_tokenizer(path / "tokenizer.json", tokenizer, config)
    weights = [e["sha256"] for name, e in sorted(entries.items()) if name.endswith("safetensors")]
    loaded = Checkpoint(
        path=path,
        config=config,
        model=_load_model(path, entries, config, device, dtype),
        tokenizer=tokenizer,
        report=read_json(path / "training_report.json"),
        fingerprint=hashlib.sha256("".join(weights).encode()).hexdigest(),
        digest=_digest(entries),
        chat_template=read_chat_template(path, entries),
    )
    if content_digest(path) != loaded.digest:
        raise CheckpointError(f"{path}: was replaced while it was read")
    return loaded


def content_digest(path: Path) -> str:
    """SHA-256 over all files of the checkpoint `path`, hex, as its manifest has it.

    Raises:
        CheckpointError: there is no manifest that can be read.
    """
    return _digest(read_json(path / MANIFEST).get("files"))


def _digest(entries: Any) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def check_device(device: str) -> None:
    """Raise ConfigError unless `device` is a known one that this machine has and can use."""
    check_choice("device", device, ("cpu", "cuda"))
    if device == "cuda":
        require(torch.cuda.is_available(), "device cuda: torch sees no CUDA device here")
        problem = cache_problem()
        require(problem is None, f"device cuda: {problem}")


def _check_tokenizer(path: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raise CheckpointError unless the model has an embedding for every token."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path}: has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}"
        )


def _load_model(
    path: Path, entries: Mapping[str, Any], config: ModelConfig, device: str, dtype: str
) -> Decoder:
    """The decoder with its weights, in eval mode."""
    tensors = load_tensors(path, entries)
    with torch.device("meta"):
        model = Decoder(config)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{path}: tensor {name} has shape {found.get(name)}, "
                f"config.json asks for {expected.get(name)}"
            )
    target = getattr(torch, config.torch_dtype if dtype == "auto" else dtype)
    require(
        device == "cuda" or target is not torch.float16,
        "dtype float16 needs device cuda; on the CPU use bfloat16 or float32",
    )
    cast = {
        name: t.to(device, torch.float32 if name.endswith("ffn.router") else target)
        for name, t in tensors.items()
    }
    for name, tensor in cast.items():
        # On the CPU a tensor may lie in the mapped file. Packing copies the matrices out of it, but
        # one small tensor that stays would keep the whole file mapped, and resident.
        if tensor.dim() == 1 or name.endswith("ffn.router"):
            cast[name] = tensor.clone()
    model.load_state_dict(cast, assign=True)
    model.materialize_tables(device)
    return model.eval().requires_grad_(False)
