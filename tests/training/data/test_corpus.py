"""Splitting and fingerprint, against a plain version that holds everything in memory."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from engine.text.tokenizer import END_OF_TEXT
from training.data.corpus import Part, Survey, find_sources, load_corpus
from training.errors import DataError

Named = list[tuple[str, str]]


def simply_split(named: Named, share: float, seed: int) -> tuple[Named, Named, str]:
    """(to train on, held out, fingerprint) of documents read one after another."""
    documents = list({text: (name, text) for name, text in named}.values())
    digest = hashlib.sha256("".join(name + text for name, text in documents).encode())
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    total = sum(len(text) for _, text in documents)
    most = min(5 * share, (1 + share) / 2) * total
    held: set[int] = set()
    size = 0
    for index in order:
        length = len(documents[index][1])
        if size < share * total and size + length <= most:
            held.add(index)
            size += length
    train = [d for i, d in enumerate(documents) if i not in held]
    valid = [d for i, d in enumerate(documents) if i in held]
    if not held:
        name, text = max(documents, key=lambda d: len(d[1]))
        cut = len(text) - int(share * total)
        train = [(n, t[:cut] if t == text else t) for n, t in documents]
        valid = [(name, text[cut:])]
    return train, valid, digest.hexdigest()


def write_mixed(folder: Path, seed: int, documents: int, longest: int) -> Named:
    """Text and JSON lines with repeats; returns the names and texts in the order of reading."""
    source = random.Random(seed)
    texts = [
        "".join(source.choice("ab né\n12 ") for _ in range(source.randint(1, longest))) + "x\n"
        for _ in range(documents)
    ]
    texts += [source.choice(texts) for _ in range(documents // 3)]
    texts = [text.strip("\n") + "\n" for text in texts]
    half = len(texts) // 2
    (folder / "a.txt").write_text(END_OF_TEXT.join(texts[:half]))
    lines = [json.dumps({"text": text}) for text in texts[half:]]
    (folder / "b.jsonl").write_text("\n".join(lines))
    named = [(f"a.txt#{i}", text) for i, text in enumerate(texts[:half])]
    return named + [(f"b.jsonl#{i}", text) for i, text in enumerate(texts[half:], start=1)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("documents", "longest"), [(40, 50), (3, 200_000), (2, 9), (12, 90_000)])
def test_the_split_is_that_of_the_plain_version(
    tmp_path: Path, seed: int, documents: int, longest: int
) -> None:
    named = write_mixed(tmp_path, seed, documents, longest)
    for share in (0.03, 0.4):
        train, valid, fingerprint = simply_split(named, share, seed)
        corpus = load_corpus([tmp_path], share, seed)
        assert [(d.name, d.text) for d in corpus.train] == train
        assert [(d.name, d.text) for d in corpus.valid] == valid
        assert corpus.fingerprint == fingerprint


def test_text_to_hold_out_is_not_trained_on(corpus: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.txt"
    held.write_text(f"new\n{END_OF_TEXT}\n" + (corpus / "004.txt").read_text())
    found = load_corpus([corpus], 0.1, 1, [held])
    assert [d.name for d in found.valid] == ["held.txt#0", "held.txt#1"]
    assert len(found.train) == 29
    assert not {d.text for d in found.train} & {d.text for d in found.valid}
    assert found.description == f"{corpus}; held out: {held}"
    held.write_text("other\n")
    assert load_corpus([corpus], 0.1, 1, [held]).fingerprint != found.fingerprint
    with pytest.raises(DataError, match="every text is held out"):
        load_corpus([corpus], 0.1, 1, [corpus])
    held.write_text(" \n")
    with pytest.raises(DataError, match=r"held\.txt: no text found to hold out"):
        load_corpus([corpus], 0.1, 1, [held])


def test_a_file_that_changes_while_it_is_read_is_refused(corpus: Path) -> None:
    survey = Survey(find_sources([corpus]), 0.1, 1)
    fragments = survey.fragments()
    next(fragments)
    (corpus / "020.txt").write_text("other")
    with pytest.raises(DataError, match=r"020\.txt: changed while it was being read"):
        list(fragments)
    (corpus / "020.txt").unlink()
    with pytest.raises(DataError, match=r"020\.txt: cannot be read"):
        list(survey.training_text(1 << 20))


def test_a_tokenizer_learns_from_a_sample_of_a_large_corpus(corpus: Path) -> None:
    survey = Survey(find_sources([corpus]), 0.1, 1)
    train = [f.text for part, _, f in survey.fragments() if part is Part.TRAIN]
    total = sum(len(text) for text in train)
    assert survey.train_chars == total
    assert list(survey.training_text(total)) == train
    sample = list(survey.training_text(total // 2))
    assert sum(len(text) for text in sample) == total // 2
    assert sum(text in train for text in sample) == len(sample) - 1
    assert train.index(sample[-2]) > len(sample)  # not the first documents
    other = Survey(find_sources([corpus]), 0.1, 2)
    assert list(other.training_text(total // 2)) != sample


def test_a_sample_of_one_long_document_is_its_beginning(tmp_path: Path) -> None:
    content = "word " * 60_000
    (tmp_path / "a.txt").write_text(content)
    survey = Survey(find_sources([tmp_path]), 0.03, 1)
    assert "".join(survey.training_text(100_000)) == content[:100_000]
    assert survey.train_chars == len("".join(survey.training_text(1 << 20)))
