"""The text of an import: spread, held out, the same every time, refused if it is too little."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import processors

from engine.text.tokenizer import Tokenizer
from training.data.vocabulary import train_tokenizer
from training.errors import DataError
from training.importing.calibration import CalibrationText, read_calibration


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["a b c d e f g h"], 257)


def read(
    tokenizer: Tokenizer, paths: list[Path], valid: list[Path] | None = None, seed: int = 1
) -> CalibrationText:
    return read_calibration(
        tokenizer,
        paths,
        valid or [],
        length=16,
        calibration_tokens=320,
        held_out_tokens=160,
        seed=seed,
    )


def write(path: Path, documents: list[str]) -> Path:
    path.write_text("<|endoftext|>\n".join(documents), encoding="utf-8")
    return path


def test_whole_sequences_of_different_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    letters = "abcdefghijklmnopqrst"
    path = write(tmp_path / "text.txt", [letter * 90 + "\n" for letter in letters])
    text = read(tokenizer, [path])
    assert text.fit_BL.shape[1] == text.check_BL.shape[1] == text.length == 16
    assert text.calibration_tokens == 320
    assert text.held_BL.shape == (10, 17)
    assert text.held_out_tokens == 160
    assert 2 <= text.check_BL.shape[0] <= 3

    def seen(ids: torch.Tensor) -> set[str]:
        return set(tokenizer.decode(ids.flatten().tolist())) & set(letters)

    calibrated = seen(text.fit_BL) | seen(text.check_BL)
    assert len(calibrated) >= 4
    assert seen(text.held_BL)
    assert not calibrated & seen(text.held_BL)
    again = read(tokenizer, [path])
    assert again.fingerprint == text.fingerprint
    assert torch.equal(again.fit_BL, text.fit_BL)
    assert read(tokenizer, [path], seed=2).fingerprint != text.fingerprint


def test_a_large_document_is_sampled_all_over(tmp_path: Path, tokenizer: Tokenizer) -> None:
    words = [f"{n:06d} " for n in range(60_000)]  # 420 kB in order
    path = write(tmp_path / "book.txt", ["".join(words)])
    text = read(tokenizer, [path], [write(tmp_path / "other.txt", ["x" * 5000])])
    numbers = [
        int(piece)
        for piece in tokenizer.decode(text.fit_BL.flatten().tolist()).split()
        if piece.isdecimal() and len(piece) == 6
    ]
    assert max(numbers) - min(numbers) > 10_000
    assert len({number // 1000 for number in numbers}) >= 3
    assert set(tokenizer.decode(text.held_BL.flatten().tolist())) == {"x"}


def test_sequences_begin_as_prompts_do(tmp_path: Path, tokenizer: Tokenizer) -> None:
    letters = "abcdefghijklmnopqrst"
    path = write(tmp_path / "text.txt", [letter * 90 + "\n" for letter in letters])
    backend = tokenizers.Tokenizer.from_str(tokenizer.source)
    start = tokenizer.backend.id_to_token(7)
    backend.post_processor = processors.TemplateProcessing(f"{start} $A", None, [(start, 7)])
    text, other = read(Tokenizer(backend), [path]), read(tokenizer, [path])
    assert text.held_BL.shape == other.held_BL.shape == (10, 17)
    for sequences in (text.fit_BL, text.check_BL, text.held_BL):
        assert sequences[:, 0].tolist() == [7] * len(sequences)
    assert text.held_BL[0, 1:].tolist() == other.held_BL[0, :16].tolist()
    assert text.held_BL[1, 1:].tolist() == [*other.held_BL[0, 15:17], *other.held_BL[1, 1:15]]


def test_too_little_text_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    empty = write(tmp_path / "empty.txt", [" \n"])
    with pytest.raises(DataError, match="no text found"):
        read(tokenizer, [empty])
    short = write(tmp_path / "short.txt", ["abc"])
    with pytest.raises(DataError, match="fewer than 2 sequences of 16; give more text"):
        read(tokenizer, [short])
    long = write(tmp_path / "long.txt", ["abc" * 100])
    with pytest.raises(DataError, match="holds out 5 tokens, fewer than 1 sequence of 17"):
        read(tokenizer, [long], [short])
    with pytest.raises(DataError, match="no such file or folder"):
        read(tokenizer, [tmp_path / "none"])
