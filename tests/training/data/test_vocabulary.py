"""Encoding fragment by fragment, and tokenizers that cannot be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.errors import CheckpointError
from engine.text.tokenizer import Tokenizer
from training.data.corpus import Document
from training.data.text import Fragment
from training.data.vocabulary import (
    encode_documents,
    encode_fragments,
    read_tokenizer,
    train_tokenizer,
)
from training.errors import DataError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat, the dog on the log\n" * 20], 270)


def test_fragments_keep_their_order_and_tags(tokenizer: Tokenizer) -> None:
    texts = [f"the cat number {i}" * (i % 5) for i in range(300)]
    fragments = [(i, Fragment(0, text, last=i % 3 == 2)) for i, text in enumerate(texts)]
    found = list(encode_fragments(tokenizer, iter(fragments)))
    assert [tag for tag, _ in found] == list(range(300))
    for (_, row), (tag, fragment) in zip(found, fragments, strict=True):
        end = [tokenizer.eos_id] if fragment.last else []
        assert row.tolist() == tokenizer.encode(texts[tag]) + end


def test_long_documents_encode_like_short_ones(tokenizer: Tokenizer) -> None:
    documents = [Document("a", "the cat sat on 東京 \n\n" * 20_000), Document("b", "dog")]
    expected = [t for d in documents for t in [*tokenizer.encode(d.text), tokenizer.eos_id]]
    np.testing.assert_array_equal(encode_documents(tokenizer, documents), expected)


def test_a_vocabulary_that_cannot_be_learned_is_refused() -> None:
    with pytest.raises(DataError, match=r"model\.vocab_size must be at least 257 .* got 256"):
        train_tokenizer(["text"], 256)
    with pytest.raises(DataError, match=r"a\.txt: gives 26\d tokens at most, fewer than"):
        train_tokenizer(["text text"], 1000, "a.txt")


def test_a_tokenizer_is_read_from_a_file_or_a_checkpoint(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert read_tokenizer(path).backend.to_str() == tokenizer.backend.to_str()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a readable tokenizer"):
        read_tokenizer(tmp_path / "nowhere" / "tokenizer.json")
