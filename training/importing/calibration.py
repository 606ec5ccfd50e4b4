"""The text of an import: tokens to calibrate on, and others to measure quality on.

Whole documents are held out, as in training, or files of their own. Of a large corpus a sample of
pieces, spread over all of it, is tokenised; which ones is decided by the seed.

Shapes: B sequences, L length.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from engine.text.tokenizer import Tokenizer
from training.data.corpus import Part, Survey, find_sources
from training.data.vocabulary import Tokens
from training.errors import DataError

VALID_SHARE: Final = 0.2  # share of the text that is held out where no files are named for it
MOST_LENGTH: Final = 512  # tokens of a sequence
_PIECE_SEQUENCES: Final = 2  # roughly; more and smaller pieces would cut more texts
_CHARS_A_TOKEN: Final = 8  # more than any usual tokenizer needs
_CHECK_SHARE: Final = 8  # every eighth calibration sequence judges the routers and fits none


@dataclass(frozen=True)
class CalibrationText:
    """Token ids of an import.

    Attributes:
        fit_BL: sequences that cluster the neurons and fit the routers.
        check_BL: others of the same documents, on which layers are studied and routers compared.
        held_BL: held-out sequences with one more token each, the last target: [B, L + 1].
        description: where the text came from, in words.
        fingerprint: SHA-256 over the ids.
    """

    fit_BL: Tensor
    check_BL: Tensor
    held_BL: Tensor
    description: str
    fingerprint: str

    @property
    def length(self) -> int:
        """L, tokens that go through the model in each sequence."""
        return self.fit_BL.shape[1]

    @property
    def calibration_tokens(self) -> int:
        return self.fit_BL.numel() + self.check_BL.numel()

    @property
    def held_out_tokens(self) -> int:
        """Tokens predicted for the quality curve."""
        return self.held_BL.shape[0] * self.length


def read_calibration(
    tokenizer: Tokenizer,
    paths: Sequence[Path],
    valid_paths: Sequence[Path],
    *,
    length: int,
    calibration_tokens: int,
    held_out_tokens: int,
    seed: int,
) -> CalibrationText:
    """Sample, tokenise and cut the text of an import.

    Args:
        tokenizer: the model's tokenizer.
        paths: files and folders of text.
        valid_paths: text to hold out; none hold out documents of `paths`.
        length: tokens of a sequence.
        calibration_tokens: at most; whole sequences, at least two.
        held_out_tokens: at most; whole sequences, at least one.
        seed: decides what is held out and what is sampled.

    Raises:
        DataError: if a path is missing or unreadable, or there is too little text.
    """
    survey = Survey(find_sources(paths, valid_paths), VALID_SHARE, seed)
    name = survey.sources.description
    wanted = {Part.TRAIN: calibration_tokens, Part.VALID: held_out_tokens}
    piece = _PIECE_SEQUENCES * length * 4
    sampled = sample_tokens(survey, tokenizer, wanted, seed, piece)
    start, train, valid = tokenizer.start_ids, sampled[Part.TRAIN], sampled[Part.VALID]
    fit = _sequences(start, train, length, 0, calibration_tokens, 2, f"{name}: gives")
    held = _sequences(start, valid, length, 1, held_out_tokens, 1, f"{name}: holds out")
    is_check = torch.arange(fit.shape[0]) % _CHECK_SHARE == 1
    digest = hashlib.sha256(fit.numpy().tobytes() + b"held out" + held.numpy().tobytes())
    return CalibrationText(fit[~is_check], fit[is_check], held, name, digest.hexdigest())


def sample_tokens(
    survey: Survey, tokenizer: Tokenizer, wanted: dict[Part, int], seed: int, piece_chars: int
) -> dict[Part, Tokens]:
    """At least `wanted` tokens of each part, if it has as many, from pieces all over it.

    A piece has `piece_chars` characters at most, of one text or of several short ones. An
    end-of-text token follows each, also where it breaks off.
    """
    source = random.Random(seed)
    kept: dict[Part, list[tuple[float, int, list[str]]]] = {part: [] for part in wanted}
    most = {part: -(-n * _CHARS_A_TOKEN // piece_chars) + 1 for part, n in wanted.items()}
    for number, (part, piece) in enumerate(_pieces(survey, piece_chars)):
        if part not in wanted:
            continue
        # Each piece gets a random number; those with the lowest numbers are a random sample.
        entry = (-source.random(), number, piece)
        if len(kept[part]) < most[part]:
            heapq.heappush(kept[part], entry)
        elif entry > kept[part][0]:
            heapq.heapreplace(kept[part], entry)
    chosen = {part: [piece for *_, piece in sorted(kept[part], reverse=True)] for part in kept}
    return {part: _encode(tokenizer, pieces, wanted[part]) for part, pieces in chosen.items()}


def _pieces(survey: Survey, chars: int) -> Iterator[tuple[Part, list[str]]]:
    """Everything that is kept, in pieces of bounded length: texts that short documents share."""
    open_pieces: dict[Part, list[str]] = {}
    sizes: dict[Part, int] = dict.fromkeys(Part, 0)
    is_begun = False
    for part, _, fragment in survey.fragments():
        texts = open_pieces.setdefault(part, [])
        if is_begun and texts:
            texts[-1] += fragment.text
        else:
            texts.append(fragment.text)
        is_begun = not fragment.last
        sizes[part] += len(fragment.text)
        if sizes[part] >= chars:
            *whole, text = open_pieces.pop(part)
            yield part, [*whole, text[:chars]]
            yield from ((part, [piece]) for piece in _cut(text[chars:], chars))
            sizes[part] = 0
    yield from open_pieces.items()


def _cut(text: str, chars: int) -> Iterator[str]:
    for start in range(0, len(text), chars):
        yield text[start : start + chars]


def _encode(tokenizer: Tokenizer, pieces: list[list[str]], wanted: int) -> Tokens:
    rows: list[list[int]] = []
    size = 0
    for text in (text for piece in pieces for text in piece):
        if size > wanted:
            break
        rows.append([*tokenizer.encode(text), tokenizer.eos_id])
        size += len(rows[-1])
    return np.array([token for row in rows for token in row], dtype=np.uint32)


def _sequences(
    start: list[int], tokens: Tokens, length: int, more: int, most: int, least: int, name: str
) -> Tensor:
    """Whole sequences [B, L + more], int64, of `most` tokens together at most.

    Each begins with `start`, as prompts do when the model serves.
    """
    new = length - len(start)
    count = min((tokens.size - more) // new, max(least, most // length))
    if count < least:
        raise DataError(
            f"{name} {tokens.size} tokens, fewer than {least} "
            f"sequence{'s' * (least > 1)} of {length + more}; give more text"
        )
    rows = [tokens[i * new : (i + 1) * new + more] for i in range(count)]
    found = np.pad(np.stack(rows).astype(np.int64), ((0, 0), (len(start), 0)))
    found[:, : len(start)] = start
    return torch.from_numpy(found)
