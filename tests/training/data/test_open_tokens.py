"""The door to tokens: made once, used again while nothing changed, never half there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.text.tokenizer import END_OF_TEXT, Tokenizer
from training.config import TrainConfig
from training.data import tokens as token_module
from training.data.batches import TokenBatches
from training.data.corpus import load_corpus
from training.data.shards import open_shards, tokenizer_sha256
from training.data.tokens import TokenData, open_tokens, prepare_tokens
from training.data.vocabulary import encode_documents, train_tokenizer
from training.errors import DataError, StorageError, TrainingError
from training.run import run_state
from training.trainer import Trainer

SETTINGS: dict[str, Any] = {"vocab_size": 300, "valid_share": 0.1, "seed": 3}


def silent(_text: str) -> None:
    pass


def opened(corpus: Path, out: Path, valid: tuple[Path, ...] = (), **changes: Any) -> TokenData:
    return open_tokens([corpus], valid, out, **{**SETTINGS, "report": silent, **changes})


def refuse(*_: object) -> Any:
    raise AssertionError("the text was read again")


def made_words(count: int, salt: str) -> str:
    """Words that are the same on every machine."""
    found = []
    for number in range(count):
        digest = hashlib.sha256(f"{salt}{number}".encode()).digest()
        word = "".join("etaoinshrdlu"[byte % 12] for byte in digest[1 : 2 + digest[0] % 7])
        end = ".\n" if digest[9] % 11 == 0 else "\n\n" if digest[9] % 37 == 1 else None
        found.append(word + (end or ("  né東京 " if digest[9] % 53 == 2 else " ")))
    return "".join(found)


def make_mixed(folder: Path) -> None:
    """Every kind of file, with repeats, blank documents and odd line ends."""
    (folder / "sub").mkdir(parents=True)
    mark = f"\n{END_OF_TEXT}\n"
    texts = mark.join(made_words(300, f"a{i}") for i in range(7))
    (folder / "a.txt").write_text(f"{texts}{mark} \n")
    lines = [json.dumps({"text": made_words(200, f"b{i}")}) for i in range(9)]
    (folder / "b.jsonl").write_text("".join(f"{line}\n\n" for line in lines))
    packed = [made_words(300, "a3"), made_words(99, "c"), made_words(500, "c2")]
    (folder / "c.md.xz").write_bytes(lzma.compress(END_OF_TEXT.join(packed).encode()))
    (folder / "sub" / "d.py").write_bytes(made_words(250, "d").replace("\n", "\r\n").encode())
    (folder / "e.txt").write_text(made_words(200, "b2").strip("\n") + "\n")


def make_one(folder: Path) -> None:
    folder.mkdir()
    (folder / "one.txt").write_text(made_words(3000, "one"))


# Checkpoints name the fingerprint and depend on every batch: these may never change.
FIXED = [
    (
        make_mixed,
        0.1,
        1,
        "653b5653c5246452",
        "e81aa6bd609f9b8c",
        "41076e31a1cc5b3b",
        "0bf6b6f3683f",
    ),
    (
        make_mixed,
        0.03,
        3,
        "653b5653c5246452",
        "3ed0e9b355246bc8",
        "1eda3806d6138cad",
        "ecb4732182d",
    ),
    (make_one, 0.03, 1, "34a45dc7e93ffd3b", "6d0301e4863baac2", "24b253f09c3a3401", "d3144db61e5c"),
]


@pytest.mark.parametrize("case", FIXED, ids=lambda case: f"{case[0].__name__}-{case[2]}")
def test_tokens_and_batches_stay_what_they_are(case: tuple[Any, ...], tmp_path: Path) -> None:
    make, share, seed, *expected = case
    make(tmp_path / "corpus")
    out = tmp_path / "tokens"
    settings = {"vocab_size": 400, "valid_share": share, "seed": seed}
    tokens = open_tokens([tmp_path / "corpus"], [], out, report=silent, **settings)
    batches = TokenBatches(tokens.train, 4, 32, seed)
    rows = [t.numpy().tobytes() for step in (0, 1, 7, 1000) for t in batches.batch(step)]
    contents = [
        tokens.train[:].astype("<u4").tobytes(),
        tokens.valid[:].astype("<u4").tobytes(),
        b"".join(rows),
    ]
    found = [tokens.fingerprint, *(hashlib.sha256(content).hexdigest() for content in contents)]
    assert [f[: len(e)] for f, e in zip(found, expected, strict=True)] == expected


def test_shards_hold_what_tokenising_in_memory_gives(corpus: Path, tmp_path: Path) -> None:
    tokens = opened(corpus, tmp_path / "run" / "tokens")
    plain = load_corpus([corpus], SETTINGS["valid_share"], SETTINGS["seed"])
    tokenizer = train_tokenizer([d.text for d in plain.train], SETTINGS["vocab_size"])
    assert tokens.tokenizer.backend.to_str() == tokenizer.backend.to_str()
    train = encode_documents(tokenizer, plain.train)
    np.testing.assert_array_equal(tokens.train[:], train)
    valid = encode_documents(tokenizer, plain.valid)
    np.testing.assert_array_equal(tokens.valid[:], valid)
    assert (tokens.description, tokens.fingerprint) == (plain.description, plain.fingerprint)


def test_tokens_are_used_again_while_nothing_changed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run" / "tokens"
    first = opened(corpus, out)
    with monkeypatch.context() as patched:
        patched.setattr(token_module, "Survey", refuse)
        again = opened(corpus, out)
        assert again.fingerprint == first.fingerprint
        np.testing.assert_array_equal(again.train[:], first.train[:])
        for change in ({"seed": 4}, {"valid_share": 0.2}, {"vocab_size": 301}):
            with pytest.raises(AssertionError, match="read again"):
                opened(corpus, out, **change)
        with pytest.raises(AssertionError, match="read again"):
            opened(corpus, out, (corpus / "003.txt",))
    (corpus / "000.txt").write_text((corpus / "000.txt").read_text().replace("cat", "dog"))
    assert opened(corpus, out).fingerprint != first.fingerprint


def test_damaged_tokens_are_made_anew(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    first = opened(corpus, out)
    expected = first.train[:].copy()
    (out / "train-00000.bin").write_bytes(bytes(expected.nbytes))
    np.testing.assert_array_equal(opened(corpus, out).train[:], expected)
    leftover = tmp_path / ".tokens.4711.tmp"
    leftover.mkdir()
    (tmp_path / ".tokens.backup").mkdir()
    opened(corpus, out)
    assert not leftover.exists()
    assert (tmp_path / ".tokens.backup").exists()


def test_a_run_brings_its_own_tokenizer_or_refuses(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    opened(corpus, out)
    before = open_shards(out).index
    other = train_tokenizer(["a log and a tree under a mat " * 9], 265)
    seen: list[str] = []

    def own(fingerprint: str) -> Tokenizer:
        seen.append(fingerprint)
        return other

    def stop(fingerprint: str) -> None:
        raise TrainingError("another corpus")

    (corpus / "new.txt").write_text("new")
    with pytest.raises(TrainingError, match="another corpus"):
        opened(corpus, out, tokenizer_for=stop)
    assert open_shards(out).index == before
    (corpus / "new.txt").unlink()
    found = opened(corpus, out, tokenizer_for=own)
    assert seen == [before.fingerprint]
    assert tokenizer_sha256(found.tokenizer) == tokenizer_sha256(other)
    expected = load_corpus([corpus], SETTINGS["valid_share"], SETTINGS["seed"])
    np.testing.assert_array_equal(found.train[:], encode_documents(other, expected.train))


def prepared(corpus: Path, out: Path, **changes: Any) -> Path:
    prepare_tokens([corpus], [], out, **{**SETTINGS, "report": silent, **changes})
    return out


def test_a_prepared_directory_trains_like_its_text(
    micro: TrainConfig, corpus: Path, tmp_path: Path
) -> None:
    folder = prepared(corpus, tmp_path / "tokens", shard_bytes=1024)
    assert len(open_shards(folder).index.train) > 9
    of_text = Trainer(micro, tmp_path / "a", [corpus]).train()
    of_tokens = Trainer(micro, tmp_path / "b", [folder]).train()
    weights = [load_file(path / "model.safetensors") for path in (of_text, of_tokens)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not (tmp_path / "b" / "tokens").exists()
    Trainer(micro, tmp_path / "b", [folder])
    other = prepared(corpus, tmp_path / "other", seed=5)
    with pytest.raises(TrainingError, match="another corpus"):
        Trainer(micro, tmp_path / "b", [other])


def test_a_prepared_directory_stands_alone(corpus: Path, tmp_path: Path) -> None:
    folder, out = prepared(corpus, tmp_path / "tokens"), tmp_path / "out"
    with pytest.raises(DataError, match="cannot be joined with"):
        open_tokens([folder, corpus], [], out, report=silent, **SETTINGS)
    with pytest.raises(DataError, match="cannot be joined with"):
        opened(folder, out, (corpus,))
    with pytest.raises(DataError, match=r"300 tokens, model\.vocab_size is 299; prepare it with"):
        opened(folder, out, vocab_size=299)
    with pytest.raises(DataError, match=r"tokens: is there already"):
        prepared(corpus, folder)
    assert opened(folder, out, vocab_size=301).tokenizer.vocab_size == 300
    assert not out.exists()


def test_text_held_out_explicitly(micro: TrainConfig, corpus: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.txt"
    held.write_text("a cat under a log " * 50)
    tokens = opened(corpus, tmp_path / "tokens", (held,))
    assert tokens.tokenizer.decode(tokens.valid[:].tolist()) == held.read_text() + "\n"
    held.write_text("short")
    config = dataclasses.replace(micro, sequence_length=64)
    with pytest.raises(DataError, match=r"held-out part has \d tokens, fewer than one sequence of"):
        Trainer(config, tmp_path / "run", [corpus], valid_paths=[held])


def test_nothing_is_left_of_what_cannot_be_prepared(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    bad = tmp_path / "in" / "a.txt"
    out = tmp_path / "out" / "tokens"
    for content, sentence in (
        (b"", "no text found"),
        (b"a\0b", r"a\.txt: is not text, it holds NUL bytes"),
        (b"ok " * 999_999 + b"\xff", r"a\.txt: is not UTF-8"),
        (b"few words", r"a\.txt: gives 2\d\d tokens at most, fewer than model\.vocab_size 300"),
    ):
        bad.write_bytes(content)
        with pytest.raises(DataError, match=sentence):
            prepared(bad, out)
        assert not out.exists()
        assert not list(tmp_path.glob("out/.*"))
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        prepared(tmp_path / "nowhere", out)
    with pytest.raises(StorageError, match=r"a\.txt/tokens: cannot be written"):
        prepared(corpus, bad / "tokens")
    with pytest.raises(StorageError, match=r"a\.txt: cannot be written \(File exists\)"):
        opened(corpus, bad / "tokens")


def test_progress_of_a_large_corpus_is_told(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(token_module, "_QUIET_CHARS", 1000)
    monkeypatch.setattr(token_module, "MOST_CHARS", 30_000)
    tokens = opened(corpus, tmp_path / "tokens", report=said.append)
    assert said[1].startswith("tokenizer: learns from a sample of 30,000 of ")
    assert 15 <= sum(line.startswith("tokenised ") for line in said) <= 20
    assert f"{tokens.train.size:,} tokens" in said[-1]


def test_a_resumed_run_reads_no_text_again(
    micro: TrainConfig, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    whole = Trainer(micro, tmp_path / "whole", [corpus]).train()
    trainer = Trainer(micro, run, [corpus])
    save, steps = Trainer._save_state, []

    def stop(self: Trainer) -> None:
        save(self)
        steps.append(self.step)
        if self.step == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save_state", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    monkeypatch.setattr(token_module, "Survey", refuse)
    resumed = Trainer(micro, run, [corpus])
    assert run_state.load_progress(run) is not None
    path = resumed.train()
    assert steps[-1] == micro.steps
    weights = [load_file(p / "model.safetensors") for p in (whole, path)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
