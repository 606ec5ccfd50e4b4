"""Streamed reading gives what reading whole files would; cutting a document changes no token."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.text.tokenizer import END_OF_TEXT, Tokenizer
from training.data import text
from training.data.text import TextFile
from training.data.vocabulary import train_tokenizer
from training.errors import DataError

WORDS = [
    END_OF_TEXT,
    END_OF_TEXT[:5],
    "\n",
    "\n\n",
    " ",
    "  ",
    "\t",
    "a",
    "word",
    "it's",
    "12",
    "_",
]
TEXTS = st.lists(st.sampled_from([*WORDS, "né", "東京。", "-->", "\u00a0", "\u2028", "\x1c"])).map(
    "".join
)
SMALL = {"_READ_CHARS": 7, "_FRAGMENT_CHARS": 20, "_LONGEST_CHARS": 60, "_SPARE_CHARS": 16}


def small_fragments(**sizes: int) -> object:
    return patch.multiple(text, **{**SMALL, **sizes})


def documents(file: TextFile) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    is_begun = False
    for fragment in file.fragments():
        if is_begun:
            assert found[-1][0] == fragment.document
            found[-1] = fragment.document, found[-1][1] + fragment.text
        else:
            found.append((fragment.document, fragment.text))
        is_begun = not fragment.last
    assert not is_begun
    return found


def simply_read(content: str) -> list[tuple[int, str]]:
    return [
        (number, part.strip("\n") + "\n")
        for number, part in enumerate(content.split(END_OF_TEXT))
        if part.strip()
    ]


@given(TEXTS)
def test_streamed_documents_are_those_of_the_whole_text(content: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.txt"
        path.write_text(content, encoding="utf-8", newline="")
        with small_fragments():  # type: ignore[attr-defined]
            assert documents(TextFile(path, "a")) == simply_read(content)


@given(TEXTS)
def test_json_lines_keep_their_texts(content: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_text("\n" + json.dumps({"text": content}) + "\n")
        with small_fragments():  # type: ignore[attr-defined]
            assert documents(TextFile(path, "a")) == [(2, content)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    sample = "word it's 12 né 東京。 --> a  b\n\nword word\n\t12 12 -->\n" * 40
    return train_tokenizer([sample], 262)


@given(st.one_of(TEXTS, st.text()))
def test_pieces_encode_like_the_whole(tokenizer: Tokenizer, content: str) -> None:
    with small_fragments(_LONGEST_CHARS=1 << 20):  # type: ignore[attr-defined]
        parts = list(text.pieces(content))
    assert "".join(parts) == content
    ids = [token for part in parts for token in tokenizer.encode(part)]
    assert ids == tokenizer.encode(content)


def test_long_texts_are_cut_and_ones_without_white_space_too() -> None:
    words = list(text.pieces("word " * 100_000))
    assert max(len(piece) for piece in words) <= 1 << 16
    runs = list(text.pieces("x" * 3_000_000))
    assert [len(piece) for piece in runs] == [1 << 20, 1 << 20, 3_000_000 - (2 << 20)]


def test_a_path_that_vanishes_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("here")
    (file,) = text.find_files([tmp_path])
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt: cannot be read"):
        list(file.fragments())
