"""Text to token batches: files and folders -> documents -> token arrays -> batches by step number.

The default corpus is one that every machine has: the source text of Python's standard library.
A batch is a pure function of (seed, step), so a resumed run sees the data an uninterrupted one
would.

Shapes: B sequences, L length.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import lzma
import platform
import random
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, cast

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from engine.checkpoint import file_sha256
from engine.tokenizer import END_OF_TEXT, Tokenizer
from training.errors import DataError

TEXT_SUFFIXES: Final = (".txt", ".md", ".py", ".jsonl")
PACKED_SUFFIXES: Final = (".xz", ".gz", ".zst")
# Whole documents are held out, so the share is overshot, but never by more than this factor.
_MOST_HELD_OUT: Final = 5
# Tests and vendored packages repeat themselves and are absent from some distributions' Python.
_SKIPPED_STDLIB: Final = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
}

Tokens = NDArray[np.uint32]


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents split into training and held-out parts.

    Attributes:
        description: where they came from, in words.
        fingerprint: SHA-256 over names and texts, in order.
    """

    train: list[Document]
    valid: list[Document]
    description: str
    fingerprint: str


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".zst":
        try:
            zstandard = importlib.import_module("zstandard")
        except ImportError as error:
            raise DataError(f"{path}: reading .zst needs the extra: ambidex[zst]") from error
        return cast("IO[str]", zstandard.open(path, "rt", encoding="utf-8"))
    return path.open(encoding="utf-8")


def _inner(path: Path) -> Path:
    """`path` without the suffix of its compression."""
    return path.with_suffix("") if path.suffix in PACKED_SUFFIXES else path


def _is_text_file(path: Path) -> bool:
    return _inner(path).suffix in TEXT_SUFFIXES


def _json_line_text(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON") from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{where}: every line must be an object with a string field "text"')
    if not is_unicode(text):
        raise DataError(f"{where}: text has half of a surrogate pair, which is no text")
    return text


def is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8; JSON can spell halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_documents(path: Path, name: str) -> Iterator[Document]:
    """The documents of one file: one per JSON line, or per text between end-of-text lines.

    Raises:
        DataError: if the file cannot be read, is not UTF-8, or is not the JSON lines it claims.
    """
    try:
        with _open_text(path) as file:
            if _inner(path).suffix == ".jsonl":
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        text = _json_line_text(line, f"{path}, line {number}")
                        yield Document(f"{name}#{number}", text)
                return
            for number, text in enumerate(file.read().split(END_OF_TEXT)):
                if text.strip():
                    yield Document(f"{name}#{number}", text.strip("\n") + "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error.reason})") from error
    except DataError:
        raise
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def _files_below(path: Path) -> Iterator[tuple[Path, str]]:
    if path.is_file():
        if not _is_text_file(path):
            kinds = ", ".join((*TEXT_SUFFIXES, *PACKED_SUFFIXES))
            raise DataError(f"{path}: unknown kind of file; known are {kinds}")
        yield path, path.name
    elif path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file() and _is_text_file(p)):
            yield file, file.relative_to(path).as_posix()
    else:
        raise DataError(f"{path}: no such file or folder")


def standard_library() -> list[Document]:
    """The source of Python's standard library, without its tests, in order of name."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_STDLIB.isdisjoint(relative.parts):
            try:
                text = path.read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue  # a dangling link, or not ours to read
            if text.strip():
                documents.append(Document(relative.as_posix(), text))
    return documents


def read_paths(paths: Sequence[Path]) -> list[Document]:
    """All documents of files and folders, in order of name; the same text counts once.

    Raises:
        DataError: if a path is missing, unreadable, or of an unknown kind, or holds no text.
    """
    files = {f.resolve(): (f, name) for p in paths for f, name in _files_below(p)}
    found = (d for f, name in files.values() for d in read_documents(f, name))
    # A text that comes twice could be trained on and held out.
    documents = list({d.text: d for d in found}.values())
    if not documents:
        raise DataError(f"{', '.join(str(p) for p in paths)}: no text found")
    return documents


def path_sha256(path: Path) -> str:
    """SHA-256 of a text file's bytes, or of a folder's list of text files and their SHA-256.

    The list is what `sha256sum` prints for the folder's text files in order of name.
    """
    if path.is_file():
        return file_sha256(path)
    lines = (f"{file_sha256(file)}  {name}\n" for file, name in _files_below(path))
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def load_corpus(paths: Sequence[Path], valid_share: float, seed: int) -> Corpus:
    """Read and split the corpus; no paths mean the standard library.

    Whole documents are held out, chosen by the seed; where all are too large for that, the end of
    the largest one is.

    Raises:
        DataError: if a path cannot be read or there is no text at all.
    """
    if paths:
        documents = read_paths(paths)
        description = ", ".join(str(p) for p in paths)
    else:
        documents = standard_library()
        if not documents:
            raise DataError("this Python has no standard library sources; give --data")
        description = f"source of the Python {platform.python_version()} standard library"
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.name.encode())
        digest.update(document.text.encode("utf-8", "surrogatepass"))
    train, valid = _split(documents, valid_share, seed)
    return Corpus(train, valid, description, digest.hexdigest())


def _split(
    documents: list[Document], share: float, seed: int
) -> tuple[list[Document], list[Document]]:
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    total = sum(len(d.text) for d in documents)
    most = min(_MOST_HELD_OUT * share, (1 + share) / 2) * total
    held: set[int] = set()
    size = 0
    for index in order:
        length = len(documents[index].text)
        if size < share * total and size + length <= most:
            held.add(index)
            size += length
    if not held:  # a few large documents: no whole one is small enough
        return _split_tail(documents, share)
    train = [d for i, d in enumerate(documents) if i not in held]
    return train, [d for i, d in enumerate(documents) if i in held]


def _split_tail(documents: list[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Hold out the end of the largest document."""
    largest = max(documents, key=lambda d: len(d.text))
    wanted = int(share * sum(len(d.text) for d in documents))
    cut = len(largest.text) - wanted
    train = [Document(d.name, d.text[:cut] if d is largest else d.text) for d in documents]
    return train, [Document(largest.name, largest.text[cut:])]


def train_tokenizer(documents: list[Document], vocab_size: int) -> Tokenizer:
    """A byte-level BPE learned from `documents`; it can encode any text.

    Raises:
        DataError: if the text is too small for that many tokens.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((d.text for d in documents), trainer)
    if backend.get_vocab_size() != vocab_size:
        raise DataError(
            f"the corpus gives {backend.get_vocab_size()} tokens at most, fewer than "
            f"model.vocab_size {vocab_size}"
        )
    return Tokenizer(backend)


def encode_documents(tokenizer: Tokenizer, documents: list[Document]) -> Tokens:
    """All documents one after another, each ended by the end-of-text token."""
    ids: list[NDArray[np.uint32]] = []
    for start in range(0, len(documents), 64):
        rows = tokenizer.encode_batch([d.text for d in documents[start : start + 64]])
        ids.extend(np.array([*row, tokenizer.eos_id], dtype=np.uint32) for row in rows)
    return np.concatenate(ids)


class TokenBatches:
    """Sequences of one token array, shuffled anew each epoch; a batch depends on its step alone.

    Raises:
        DataError: if the tokens do not fill one sequence.
    """

    def __init__(self, tokens: Tokens, batch_size: int, length: int, seed: int) -> None:
        if tokens.size < length + 1:
            raise DataError(
                f"the corpus has {tokens.size} tokens, fewer than one sequence of {length + 1}"
            )
        self._tokens = tokens
        self._batch_size = batch_size
        self._length = length
        self._seed = seed
        self.num_sequences = (tokens.size - 1) // length
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def _sequence(self, number: int) -> NDArray[np.int64]:
        epoch, position = divmod(number, self.num_sequences)
        if epoch != self._epoch:
            random_state = np.random.default_rng((self._seed, epoch))
            self._order, self._epoch = random_state.permutation(self.num_sequences), epoch
        start = int(self._order[position]) * self._length
        return self._tokens[start : start + self._length + 1].astype(np.int64)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of `step`, each int64 [B, L]; targets are the next tokens."""
        first = step * self._batch_size
        rows = np.stack([self._sequence(first + i) for i in range(self._batch_size)])
        return torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])


def consecutive_batches(
    tokens: Tokens, batch_size: int, length: int, max_batches: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets over `tokens` in order, for evaluation; the last batch may be smaller."""
    count = (tokens.size - 1) // length
    for first in range(0, min(count, batch_size * max_batches), batch_size):
        starts = range(first, min(first + batch_size, count))
        rows = np.stack([tokens[s * length : (s + 1) * length + 1] for s in starts])
        batch_BL = torch.from_numpy(rows.astype(np.int64))
        yield batch_BL[:, :-1], batch_BL[:, 1:]
