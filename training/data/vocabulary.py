"""Text to token ids: learning a tokenizer and encoding fragment by fragment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from engine.checkpoint import read_json
from engine.text.tokenizer import END_OF_TEXT, Tokenizer
from training.data.corpus import Document
from training.data.text import Fragment, pieces
from training.errors import DataError

# Learning takes 0.4 s a megabyte for 8,192 tokens and 0.7 s for 32,768, on two CPU cores: minutes
# for this many characters, and hours for the whole of a larger corpus.
MOST_CHARS: Final = 1 << 28
# The 256 bytes and the end of text.
_LEAST_TOKENS: Final = 257
_BATCH_FRAGMENTS: Final = 64
_BATCH_CHARS: Final = 1 << 20

Tokens = NDArray[np.uint32]
Tag = TypeVar("Tag")


def train_tokenizer(texts: Iterable[str], vocab_size: int, name: str = "the corpus") -> Tokenizer:
    """A byte-level BPE learned from `texts`; it can encode any text.

    Args:
        texts: whole documents, or fragments of them (see `training.data.text`).
        vocab_size: tokens, at least 257.
        name: what errors call the corpus.

    Raises:
        DataError: if the text is too small for that many tokens.
    """
    if vocab_size < _LEAST_TOKENS:
        raise DataError(
            f"model.vocab_size must be at least {_LEAST_TOKENS} to learn a tokenizer from {name}, "
            f"got {vocab_size}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() != vocab_size:
        raise DataError(
            f"{name}: gives {backend.get_vocab_size()} tokens at most, fewer than "
            f"model.vocab_size {vocab_size}"
        )
    return Tokenizer(backend)


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, or of the checkpoint that holds one.

    Raises:
        CheckpointError: if it is missing or not a tokenizer.
    """
    if not path.is_dir():
        return Tokenizer.from_file(path)
    found = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    end = found.get("eos_token_id")
    return Tokenizer.from_file(path / "tokenizer.json", end if isinstance(end, int) else None)


def encode_fragments(
    tokenizer: Tokenizer, fragments: Iterable[tuple[Tag, Fragment]]
) -> Iterator[tuple[Tag, Tokens]]:
    """The ids of each fragment under its tag; the end-of-text token follows a document's last."""
    batch: list[tuple[Tag, Fragment]] = []
    chars = 0
    for item in fragments:
        batch.append(item)
        chars += len(item[1].text)
        if len(batch) >= _BATCH_FRAGMENTS or chars >= _BATCH_CHARS:
            yield from _encode(tokenizer, batch)
            batch, chars = [], 0
    yield from _encode(tokenizer, batch)


def _encode(
    tokenizer: Tokenizer, batch: list[tuple[Tag, Fragment]]
) -> Iterator[tuple[Tag, Tokens]]:
    rows = tokenizer.encode_batch([fragment.text for _, fragment in batch])
    for (tag, fragment), row in zip(batch, rows, strict=True):
        end = [tokenizer.eos_id] if fragment.last else []
        yield tag, np.array(row + end, dtype=np.uint32)


def encode_documents(tokenizer: Tokenizer, documents: Iterable[Document]) -> Tokens:
    """All documents one after another, each ended by the end-of-text token, in memory."""
    fragments = ((None, fragment) for document in documents for fragment in _fragments(document))
    ids = [row for _, row in encode_fragments(tokenizer, fragments)]
    return np.concatenate(ids) if ids else np.empty(0, dtype=np.uint32)


def _fragments(document: Document) -> Iterator[Fragment]:
    *heads, tail = pieces(document.text)
    for head in heads:
        yield Fragment(0, head, last=False)
    yield Fragment(0, tail, last=True)
