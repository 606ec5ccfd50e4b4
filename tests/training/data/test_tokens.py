"""Corpora of every kind; bad ones get a sentence; batches depend on the step alone."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard

from engine.text.tokenizer import END_OF_TEXT
from training.data.batches import TokenBatches
from training.data.corpus import load_corpus, read_paths
from training.data.text import standard_library
from training.data.vocabulary import encode_documents, train_tokenizer
from training.errors import DataError


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.md").write_text("# mark")
    (tmp_path / "c.py").write_text("x = 1")
    (tmp_path / "d.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    (tmp_path / "e.txt.xz").write_bytes(lzma.compress(f"p\n{END_OF_TEXT}\nq\n".encode()))
    (tmp_path / "f.txt.gz").write_bytes(gzip.compress(b"zipped"))
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    texts = [d.text.strip() for d in read_paths([tmp_path])]
    assert texts == ["plain", "# mark", "x = 1", "one", "two", "p", "q", "zipped"]


def test_zstandard_is_read_frame_by_frame(tmp_path: Path) -> None:
    frames = zstandard.compress(DIGITS) + zstandard.compress(b"") + zstandard.compress(b" end")
    (tmp_path / "a.txt.zst").write_bytes(frames)
    assert [d.text for d in read_paths([tmp_path])] == [DIGITS.decode() + " end\n"]


DIGITS = " ".join(str(i) for i in range(5000)).encode()
BAD = {
    "empty folder": (lambda p: p.mkdir(), "no text found"),
    "missing": (lambda p: None, "no such file or folder"),
    "blank": (lambda p: p.with_suffix(".txt").write_text("  \n"), "no text found"),
    "binary": (lambda p: p.with_suffix(".txt").write_bytes(b"\xff\xfe\0"), "is not UTF-8"),
    "nul": (lambda p: p.with_suffix(".txt").write_bytes(b"a\0b"), "holds NUL bytes"),
    "half": (lambda p: p.with_suffix(".jsonl").write_text('{"text": "\\ud800"}'), "surrogate"),
    "zst": (lambda p: p.with_suffix(".txt.zst").write_bytes(b"no zstandard"), "cannot be read"),
    "cut zst": (
        lambda p: p.with_suffix(".txt.zst").write_bytes(zstandard.compress(DIGITS)[:-500]),
        "cannot be read",
    ),
    "kind": (lambda p: p.with_suffix(".pdf").write_text("x"), "unknown kind of file"),
    "json": (lambda p: p.with_suffix(".jsonl").write_text("{"), "line 1: not JSON"),
    "surrogate": (
        lambda p: p.with_suffix(".jsonl").write_text('{"text": "\\ud800"}'),
        "line 1: holds half of a surrogate pair",
    ),
    "no text": (lambda p: p.with_suffix(".jsonl").write_text('{"a": 1}'), "string field"),
    "gzip": (lambda p: p.with_suffix(".gz").write_bytes(b"no"), "unknown kind of file"),
    "cut": (lambda p: p.with_suffix(".txt.gz").write_bytes(gzip.compress(b"x")[:9]), "cannot be"),
    "damaged": (
        lambda p: p.with_suffix(".txt.gz").write_bytes(gzip.compress(b"x" * 999)[:-8] + bytes(8)),
        "cannot be read",
    ),
    "xz": (lambda p: p.with_suffix(".txt.xz").write_bytes(b"no xz"), "cannot be read"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_corpora_get_a_sentence(tmp_path: Path, kind: str) -> None:
    make, message = BAD[kind]
    make(tmp_path / "bad")
    path = next((p for p in tmp_path.iterdir()), tmp_path / "bad")
    with pytest.raises(DataError, match=message):
        read_paths([path])


def test_held_out_documents_are_whole_and_chosen_by_the_seed(corpus: Path) -> None:
    first = load_corpus([corpus], 0.1, seed=1)
    again = load_corpus([corpus], 0.1, seed=1)
    other = load_corpus([corpus], 0.1, seed=2)
    assert first == again
    assert first.fingerprint == other.fingerprint
    assert {d.name for d in first.valid} != {d.name for d in other.valid}
    assert not {d.name for d in first.train} & {d.name for d in first.valid}
    assert len(first.train) + len(first.valid) == 30


def test_the_fingerprint_changes_with_the_text(corpus: Path) -> None:
    before = load_corpus([corpus], 0.1, 1).fingerprint
    (corpus / "000.txt").write_text("changed")
    assert load_corpus([corpus], 0.1, 1).fingerprint != before


def test_one_document_gives_its_tail(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("abcdefghij" * 10)
    corpus = load_corpus([tmp_path], 0.1, 1)
    assert corpus.train[0].text + corpus.valid[0].text == "abcdefghij" * 10 + "\n"


def test_the_default_corpus_is_there_and_has_no_tests() -> None:
    names = [d.name for d in standard_library()]
    assert "json/decoder.py" in names
    assert not any("test" in Path(n).parts or "site-packages" in n for n in names)


def test_batches_shift_by_one_and_each_epoch_sees_every_sequence_once() -> None:
    tokens = np.arange(1 + 6 * 5, dtype=np.uint32)
    batches = TokenBatches(tokens, batch_size=2, length=5, seed=1)
    assert batches.num_sequences == 6
    inputs, targets = zip(*(batches.batch(step) for step in range(6)), strict=True)
    torch.testing.assert_close(torch.cat(inputs) + 1, torch.cat(targets))
    starts = torch.cat(inputs)[:, 0].tolist()
    assert sorted(starts[:6]) == sorted(starts[6:]) == [0, 5, 10, 15, 20, 25]
    assert starts[:6] != starts[6:]


def test_a_batch_is_a_function_of_its_step() -> None:
    tokens = np.arange(1000, dtype=np.uint32)
    forward = TokenBatches(tokens, 3, 7, seed=2)
    expected = [forward.batch(step)[0] for step in range(40)]
    resumed = TokenBatches(tokens, 3, 7, seed=2)
    assert torch.equal(resumed.batch(33)[0], expected[33])
    assert torch.equal(resumed.batch(2)[0], expected[2])


def test_too_little_text_is_refused() -> None:
    with pytest.raises(DataError, match="has 5 tokens, fewer than one sequence of 9"):
        TokenBatches(np.arange(5, dtype=np.uint32), 1, 8, 0)


def test_the_tokenizer_encodes_any_bytes_and_needs_enough_text(corpus: Path) -> None:
    documents = read_paths([corpus])
    tokenizer = train_tokenizer([d.text for d in documents], 300)
    text = "naïve 東京 🙂\t\0 not in the corpus"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(DataError, match=r"fewer than model\.vocab_size 60000"):
        train_tokenizer([documents[0].text], 60_000)


def test_documents_end_with_the_end_of_text(corpus: Path) -> None:
    documents = read_paths([corpus])[:3]
    tokenizer = train_tokenizer([d.text for d in documents], 280)
    ids = encode_documents(tokenizer, documents)
    assert int((ids == tokenizer.eos_id).sum()) == 3
    assert ids[-1] == tokenizer.eos_id


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("sizes", [[1_000_000, 1000], [1_000_000, *[1000] * 5], [5000] * 3, [900]])
def test_a_lopsided_corpus_keeps_most_of_its_text_for_training(
    tmp_path: Path, sizes: list[int], seed: int
) -> None:
    for number, size in enumerate(sizes):
        (tmp_path / f"{number}.txt").write_text(f"{number} " + "x" * size)
    corpus = load_corpus([tmp_path], 0.03, seed)
    held = sum(len(d.text) for d in corpus.valid)
    total = held + sum(len(d.text) for d in corpus.train)
    assert 0 < held <= 0.16 * total


def test_a_text_given_twice_counts_once(corpus: Path) -> None:
    once = load_corpus([corpus], 0.1, 1)
    (corpus / "copy.txt").write_text((corpus / "000.txt").read_text())
    twice = load_corpus([corpus, corpus, corpus / "000.txt"], 0.1, 1)
    assert len(twice.train) + len(twice.valid) == len(once.train) + len(once.valid)
    assert not {d.text for d in twice.train} & {d.text for d in twice.valid}
