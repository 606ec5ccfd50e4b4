"""Token shards: a tokenised corpus on disk, read by mapping it into memory.

    tokenizer.json     what the ids mean
    train-00000.bin    ids one after another, little-endian uint16, or uint32 above 65,536 tokens;
    train-00001.bin    every shard but the last holds tokens_per_shard of them
    valid-00000.bin    held out, likewise
    index.json         format, dtype, vocabulary, corpus, and of every shard tokens, size, SHA-256
    manifest.json      size and SHA-256 of every other file

A directory is written under a temporary name and renamed, so it is there whole or not at all.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from engine.checkpoint import (
    MANIFEST,
    atomic_directory,
    file_sha256,
    read_json,
    verify_manifest,
    write_json,
)
from engine.errors import CheckpointError
from engine.text.tokenizer import Tokenizer
from training.errors import DataError, writing

INDEX: Final = "index.json"
FORMAT: Final = 1
SHARD_BYTES: Final = 256 << 20
_TOKENIZER: Final = "tokenizer.json"
_DTYPES: Final[dict[str, np.dtype[Any]]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_STEMS: Final = ("train", "valid")

Ids = NDArray[np.unsignedinteger[Any]]


class TokenArray:
    """Tokens in several arrays, read as if they were one.

    Args:
        parts: each [tokens], in memory or mapped.
        name: what errors call it.
    """

    def __init__(self, parts: Sequence[Ids], name: str = "the corpus") -> None:
        self.name = name
        self._parts = list(parts)
        self._starts = [0, *accumulate(part.size for part in parts)]

    @classmethod
    def of(cls, tokens: Ids | TokenArray) -> TokenArray:
        return tokens if isinstance(tokens, TokenArray) else cls([tokens])

    @property
    def size(self) -> int:
        return self._starts[-1]

    def __getitem__(self, span: slice) -> Ids:
        """Consecutive tokens [stop - start]; a view where one part holds them all."""
        start, stop, step = span.indices(self.size)
        assert step == 1, "tokens are read in order"
        found = []
        number = bisect_right(self._starts, start) - 1
        while number < len(self._parts) and self._starts[number] < stop:
            begin = self._starts[number]
            found.append(self._parts[number][max(start - begin, 0) : stop - begin])
            number += 1
        return found[0] if len(found) == 1 else np.concatenate([*found, self._parts[0][:0]])


@dataclass(frozen=True)
class Shard:
    """One file of ids."""

    file: str
    tokens: int
    bytes: int
    sha256: str

    def check(self, index: Path, dtype: str) -> None:
        """Raise DataError, naming the file `index`, unless this can be one of its shards."""
        texts, counts = (self.file, self.sha256), (self.tokens, self.bytes)
        if not all(isinstance(t, str) for t in texts) or not all(type(n) is int for n in counts):
            raise DataError(f"{index}: is not an index of token shards ({self})")
        if Path(self.file).name != self.file or self.tokens < 1:
            raise DataError(f"{index}: {self.file!r} is not a shard of {self.tokens} tokens")
        if self.bytes != self.tokens * _DTYPES[dtype].itemsize:
            raise DataError(
                f"{index}: {self.file} cannot hold {self.tokens} tokens of {dtype} in "
                f"{self.bytes} bytes"
            )


@dataclass(frozen=True)
class Index:
    """`index.json`.

    Attributes:
        format: version of the layout.
        dtype: "uint16" or "uint32", little-endian.
        vocab_size: ids are below it.
        tokens_per_shard: how many every shard has, except the last one of train and of valid.
        tokenizer_sha256: of tokenizer.json.
        description: where the corpus came from, in words.
        fingerprint: SHA-256 over the corpus's names and texts, in order.
        train_tokens, valid_tokens: how many there are to train on and held out.
        train, valid: their shards.
        made_from: what decided the tokens: digest of the files, split, seed.
        eos_id: the token that ends a text; -1: the one that is spelled so (engine/text).
    """

    format: int
    dtype: str
    vocab_size: int
    tokens_per_shard: int
    tokenizer_sha256: str
    description: str
    fingerprint: str
    train_tokens: int
    valid_tokens: int
    train: list[Shard]
    valid: list[Shard]
    made_from: dict[str, Any]
    eos_id: int = -1

    @classmethod
    def read(cls, directory: Path) -> Index:
        """The index of `directory`.

        Raises:
            DataError: if it is missing, unreadable, or of another format.
        """
        path = directory / INDEX
        try:
            value = read_json(path)
        except CheckpointError as error:
            raise DataError(str(error)) from error
        if value.get("format") != FORMAT:
            raise DataError(
                f"{path}: format must be {FORMAT}, got {value.get('format')!r}; "
                f"make it anew with ambidex prepare"
            )
        try:
            for stem in _STEMS:
                value[stem] = [Shard(**shard) for shard in value[stem]]
            index = cls(**value)
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}: is not an index of token shards ({error})") from error
        index._check(path)
        return index

    def _check(self, path: Path) -> None:
        kinds = {"int": int, "str": str, "list[Shard]": list, "dict[str, Any]": dict}
        for f in fields(self):
            value = getattr(self, f.name)
            if not isinstance(value, kinds[str(f.type)]) or isinstance(value, bool):
                raise DataError(f"{path}: {f.name} must be of type {f.type}, got {value!r}")
        if self.dtype not in _DTYPES:
            raise DataError(f"{path}: dtype must be uint16 or uint32, got {self.dtype!r}")
        for stem, total in (("train", self.train_tokens), ("valid", self.valid_tokens)):
            shards: list[Shard] = getattr(self, stem)
            for shard in shards:
                shard.check(path, self.dtype)
            if any(shard.tokens != self.tokens_per_shard for shard in shards[:-1]):
                raise DataError(f"{path}: {stem} shards must hold {self.tokens_per_shard} tokens")
            if total != sum(shard.tokens for shard in shards) or not total:
                raise DataError(f"{path}: {stem}_tokens {total} is not what its shards hold")

    @property
    def tokens_fingerprint(self) -> str:
        """SHA-256 over tokenizer and shards: the same for the same batches."""
        train, valid = ([s.sha256 for s in shards] for shards in (self.train, self.valid))
        digests = [self.tokenizer_sha256, "train", *train, "valid", *valid]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()


class _ShardWriter:
    """Writes the ids of one part; a file is begun when there is something to write."""

    def __init__(self, directory: Path, stem: str, dtype: str, shard_tokens: int) -> None:
        self.shards: list[Shard] = []
        self._directory = directory
        self._stem = stem
        self._dtype = _DTYPES[dtype]
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self._sha256 = hashlib.sha256()
        self._count = 0

    @property
    def tokens(self) -> int:
        return self._count + sum(shard.tokens for shard in self.shards)

    def append(self, ids: Ids) -> None:
        while ids.size:
            if self._file is None:
                name = f"{self._stem}-{len(self.shards):05d}.bin"
                self._file = (self._directory / name).open("wb")
            part, ids = np.split(ids, [self._shard_tokens - self._count])
            content = part.astype(self._dtype).tobytes()
            self._file.write(content)
            self._sha256.update(content)
            self._count += part.size
            if self._count == self._shard_tokens:
                self.close()

    def close(self) -> None:
        """End the present shard."""
        if self._file is None:
            return
        file, self._file = self._file, None
        file.close()
        size = self._count * self._dtype.itemsize
        name = Path(file.name).name
        self.shards.append(Shard(name, self._count, size, self._sha256.hexdigest()))
        self._sha256, self._count = hashlib.sha256(), 0


def write_shards(
    path: Path,
    tokenizer: Tokenizer,
    ids: Iterable[tuple[bool, Ids]],
    *,
    description: str,
    fingerprint: str,
    made_from: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    intact: str = "nothing is left there",
) -> None:
    """Write a directory of token shards; memory holds one array of `ids` at a time.

    Args:
        path: the directory; one that is there is replaced when the new one is complete.
        tokenizer: gives the ids their meaning.
        ids: (is held out, ids [tokens]) one after another.
        description: where the corpus came from, in words.
        fingerprint: identifies the corpus.
        made_from: what decided the tokens, for whoever wants to reuse them.
        shard_bytes: how large a shard may be.
        intact: what an error says about the state of the disk.

    Raises:
        DataError: if one part has no tokens, or an id lies outside the tokenizer's vocabulary.
        StorageError: if the directory cannot be written, on a full disk for example.
    """
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    shard_tokens = max(1, shard_bytes // _DTYPES[dtype].itemsize)
    with writing(path, intact), atomic_directory(path) as directory:
        # The backend's own save is not used: for a full disk it raises something else than OSError.
        text = tokenizer.backend.to_str(pretty=True)
        (directory / _TOKENIZER).write_text(text, encoding="utf-8")
        writers = [_ShardWriter(directory, stem, dtype, shard_tokens) for stem in _STEMS]
        with ExitStack() as stack:
            for writer in writers:
                stack.callback(writer.close)
            for is_held_out, part in ids:
                _check_ids(part, tokenizer.vocab_size, description)
                writers[is_held_out].append(part)
        for writer, what in zip(writers, ("to train on", "to hold out"), strict=True):
            if not writer.tokens:
                raise DataError(f"{description}: has no text {what}")
        index = Index(
            format=FORMAT,
            dtype=dtype,
            vocab_size=tokenizer.vocab_size,
            tokens_per_shard=shard_tokens,
            tokenizer_sha256=hashlib.sha256(text.encode()).hexdigest(),
            description=description,
            fingerprint=fingerprint,
            train_tokens=writers[0].tokens,
            valid_tokens=writers[1].tokens,
            train=writers[0].shards,
            valid=writers[1].shards,
            made_from=dict(made_from),
            eos_id=tokenizer.eos_id,
        )
        write_json(directory / INDEX, asdict(index))


def _check_ids(ids: Ids, vocab_size: int, where: str) -> None:
    if ids.size and int(ids.max()) >= vocab_size:
        raise DataError(
            f"{where}: holds token {int(ids.max())}, outside the vocabulary of {vocab_size}"
        )


def is_token_directory(path: Path) -> bool:
    """Whether `path` is, or was, a directory of token shards."""
    return (path / INDEX).is_file() and (
        (path / _TOKENIZER).is_file() or any(path.glob("train-*.bin"))
    )


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """The digest by which the index of shards names its tokenizer."""
    return hashlib.sha256(tokenizer.backend.to_str(pretty=True).encode()).hexdigest()


@dataclass(frozen=True)
class TokenShards:
    """A directory of token shards, open for reading.

    Attributes:
        tokenizer: gives the ids their meaning.
        train, valid: tokens to train on and held out, mapped.
        index: what the directory says about itself.
    """

    tokenizer: Tokenizer
    train: TokenArray
    valid: TokenArray
    index: Index


def open_shards(path: Path, *, verify: bool = True) -> TokenShards:
    """Map the shards of the directory `path`.

    Args:
        path: the directory.
        verify: also read everything once: SHA-256 of every file, range of every id. Without it
            only sizes are compared, which is enough for the second process of a run.

    Raises:
        DataError: if anything is missing, truncated, damaged, of another format or with another
            tokenizer; names the file.
    """
    index = Index.read(path)
    try:
        entries = verify_manifest(path) if verify else read_json(path / MANIFEST).get("files")
        end = None if index.eos_id < 0 else index.eos_id
        tokenizer = Tokenizer.from_file(path / _TOKENIZER, end)
    except CheckpointError as error:
        raise DataError(str(error)) from error
    _check_tokenizer(path, index, tokenizer)
    arrays = []
    for shards, what in ((index.train, "train"), (index.valid, "held-out")):
        parts = [_map(path, shard, index, entries) for shard in shards]
        if verify:
            for part, shard in zip(parts, shards, strict=True):
                _check_shard_ids(part, index.vocab_size, path / shard.file)
        arrays.append(TokenArray(parts, f"{path}: the {what} part"))
    return TokenShards(tokenizer, arrays[0], arrays[1], index)


def _check_tokenizer(path: Path, index: Index, tokenizer: Tokenizer) -> None:
    file = path / _TOKENIZER
    if file_sha256(file) != index.tokenizer_sha256:
        raise DataError(f"{file}: is not the tokenizer that the shards were made with")
    if tokenizer.vocab_size != index.vocab_size:
        raise DataError(
            f"{file}: has {tokenizer.vocab_size} tokens, {INDEX} says {index.vocab_size}"
        )


def _map(path: Path, shard: Shard, index: Index, entries: object) -> Ids:
    file = path / shard.file
    entry = {"bytes": shard.bytes, "sha256": shard.sha256}
    if not isinstance(entries, dict) or entries.get(shard.file) != entry:
        raise DataError(f"{path / INDEX}: says otherwise about {shard.file} than {MANIFEST}")
    try:
        size = file.stat().st_size
        if size != shard.bytes:
            raise DataError(f"{file}: has {size} bytes, {INDEX} says {shard.bytes}")
        ids: Ids = np.memmap(file, dtype=_DTYPES[index.dtype], mode="r")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    return ids


def _check_shard_ids(ids: Ids, vocab_size: int, file: Path) -> None:
    step = 1 << 24
    for start in range(0, ids.size, step):
        _check_ids(ids[start : start + step], vocab_size, str(file))
