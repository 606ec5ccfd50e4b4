"""From text to tokens: `open_tokens` for a run, `prepare_tokens` to prepare them beforehand.

    training.data.text        files -> documents, streamed
    training.data.corpus      documents -> training and held-out parts, fingerprint
    training.data.vocabulary  text -> tokenizer, token ids
    training.data.shards      token ids on disk
    training.data.batches     token ids -> batches by step number

Tokens that a run needs are made once, in its own directory, and used again as long as the files
and everything else that decided them are the same.
"""

from __future__ import annotations

import fcntl
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engine.config import check_range
from engine.errors import require
from engine.text.tokenizer import Tokenizer
from training.data.corpus import (
    Part,
    Sources,
    Survey,
    find_sources,
)
from training.data.shards import (
    INDEX,
    SHARD_BYTES,
    Ids,
    TokenArray,
    TokenShards,
    is_token_directory,
    open_shards,
    tokenizer_sha256,
    write_shards,
)
from training.data.vocabulary import MOST_CHARS, encode_fragments, train_tokenizer
from training.errors import DataError, writing

# Fewer characters than this are tokenised so fast that no progress is reported.
_QUIET_CHARS: Final = 1 << 25

Report = Callable[[str], None]
TokenizerFor = Callable[[str], Tokenizer | None]


@dataclass(frozen=True)
class TokenData:
    """What a run trains on.

    Attributes:
        tokenizer: gives the ids their meaning.
        train, valid: tokens to train on and held out.
        description: where the text came from, in words.
        fingerprint: SHA-256 over the names and texts, in order; for a directory that was prepared
            beforehand, SHA-256 over its tokenizer and shards.
    """

    tokenizer: Tokenizer
    train: TokenArray
    valid: TokenArray
    description: str
    fingerprint: str


def open_tokens(
    paths: Sequence[Path],
    valid_paths: Sequence[Path],
    out_dir: Path,
    *,
    vocab_size: int,
    valid_share: float,
    seed: int,
    report: Report,
    tokenizer_for: TokenizerFor = lambda _fingerprint: None,
    verify: bool = True,
) -> TokenData:
    """The tokens of a run: those of a prepared directory, or of text, tokenised into `out_dir`.

    Args:
        paths: files and folders of text, or one directory that `prepare_tokens` made; none mean
            the source of Python's standard library.
        valid_paths: text to hold out; none hold out a share of `paths`.
        out_dir: where tokens of text are kept, and looked for.
        vocab_size: the model's vocabulary: as many tokens a new tokenizer learns, and at most as
            many a prepared one may have.
        valid_share: share of the text (by characters) to hold out.
        seed: decides the split.
        report: hears what happens, in words.
        tokenizer_for: is called with the fingerprint before anything is written; it may refuse by
            raising, or return the tokenizer to use, as a resumed run does.
        verify: read everything that is there once and compare; see `open_shards`.

    Raises:
        DataError: if the text is missing, unreadable, empty or too small for `vocab_size`, or a
            prepared directory is damaged or does not fit; names the path.
        StorageError: if `out_dir` cannot be written.
    """
    prepared = [path for path in paths if is_token_directory(path)]
    if prepared:
        for others in (paths[1:], valid_paths):
            require(
                not others,
                f"{prepared[0]}: holds prepared tokens, held-out ones included, and cannot be "
                f"joined with {others[0] if others else ''}",
                DataError,
            )
        return _open_prepared(prepared[0], vocab_size, tokenizer_for, verify)
    sources = find_sources(paths, valid_paths)
    made_from = _made_from(sources, vocab_size, valid_share, seed)
    with _locked(out_dir):
        _sweep(out_dir)
        # Tokens of an earlier sitting are used again if the same files and settings made them and a
        # resumed run does not insist on another tokenizer.
        found = _reusable(out_dir, made_from, verify)
        tokenizer = None
        if found is not None:
            tokenizer = tokenizer_for(found.index.fingerprint)
            if tokenizer is None or tokenizer_sha256(tokenizer) == found.index.tokenizer_sha256:
                report(f"corpus: {sources.description}; tokens of {out_dir}")
                return _token_data(found, sources.description, found.index.fingerprint)
        survey = Survey(sources, valid_share, seed)
        if found is None:
            tokenizer = tokenizer_for(survey.fingerprint)
        report(f"corpus: {sources.description}, {survey.train_documents} documents to train on")
        intact = "free space there or give another directory, and run the same command again"
        _write(survey, tokenizer, out_dir, made_from, report, SHARD_BYTES, intact)
        shards = open_shards(out_dir, verify=False)
    return _token_data(shards, sources.description, survey.fingerprint)


def prepare_tokens(
    paths: Sequence[Path],
    valid_paths: Sequence[Path],
    out_dir: Path,
    *,
    vocab_size: int,
    valid_share: float,
    seed: int,
    report: Report,
    tokenizer: Tokenizer | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> TokenShards:
    """Tokenise text into the new directory `out_dir`, for runs to train on.

    Args:
        tokenizer: the one to use; None learns one of `vocab_size` tokens.
        shard_bytes: size of a shard at most.

    The others are those of `open_tokens`.

    Raises:
        ConfigError: if `valid_share`, `seed` or `shard_bytes` is out of range.
        DataError: if the text is missing, unreadable, empty or too small for `vocab_size`, or
            `out_dir` is there already.
        StorageError: if `out_dir` cannot be written; nothing is left there.
    """
    check_range("valid_share", valid_share, 0.001, 0.5)
    check_range("seed", seed, 0, (1 << 31) - 1)
    check_range("shard_bytes", shard_bytes, 1 << 10, 1 << 40)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise DataError(f"{out_dir}: is there already; give --out a new directory")
    sources = find_sources(paths, valid_paths)
    made_from = _made_from(sources, vocab_size, valid_share, seed)
    survey = Survey(sources, valid_share, seed)
    report(f"corpus: {sources.description}, {survey.train_documents} documents to train on")
    intact = "nothing is left there"
    _write(survey, tokenizer, out_dir, made_from, report, shard_bytes, intact)
    return open_shards(out_dir, verify=False)


def _token_data(shards: TokenShards, description: str, fingerprint: str) -> TokenData:
    return TokenData(shards.tokenizer, shards.train, shards.valid, description, fingerprint)


def _open_prepared(
    path: Path, vocab_size: int, tokenizer_for: TokenizerFor, verify: bool
) -> TokenData:
    shards = open_shards(path, verify=verify)
    if shards.index.vocab_size > vocab_size:
        raise DataError(
            f"{path}: was prepared with {shards.index.vocab_size} tokens, model.vocab_size is "
            f"{vocab_size}; prepare it with --vocab-size {vocab_size}"
        )
    fingerprint = shards.index.tokens_fingerprint
    tokenizer_for(fingerprint)  # the fingerprint covers the tokenizer: a run's own is this one
    return _token_data(shards, shards.index.description, fingerprint)


def _made_from(sources: Sources, vocab_size: int, valid_share: float, seed: int) -> dict[str, Any]:
    return {
        "files_sha256": sources.sha256(),
        "vocab_size": vocab_size,
        "valid_share": None if sources.valid is not None else valid_share,
        "seed": seed,
    }


def _reusable(path: Path, made_from: dict[str, Any], verify: bool) -> TokenShards | None:
    """The tokens in `path`, if they were made from the same and are whole."""
    if not (path / INDEX).is_file():
        return None
    try:
        found = open_shards(path, verify=verify)
    except DataError:
        return None  # the caller makes them anew from the text
    return found if found.index.made_from == made_from else None


def _write(
    survey: Survey,
    tokenizer: Tokenizer | None,
    path: Path,
    made_from: dict[str, Any],
    report: Report,
    shard_bytes: int,
    intact: str,
) -> None:
    description, chars = survey.sources.description, survey.train_chars
    if tokenizer is None:
        if chars > MOST_CHARS:
            report(f"tokenizer: learns from a sample of {MOST_CHARS:,} of {chars:,} characters")
        texts = survey.training_text(MOST_CHARS)
        tokenizer = train_tokenizer(texts, made_from["vocab_size"], description)
    write_shards(
        path,
        tokenizer,
        _reported(_ids(survey, tokenizer), chars, report),
        description=description,
        fingerprint=survey.fingerprint,
        made_from=made_from,
        shard_bytes=shard_bytes,
        intact=intact,
    )


def _ids(survey: Survey, tokenizer: Tokenizer) -> Iterator[tuple[tuple[bool, int], Ids]]:
    """((is held out, characters), ids) of every fragment."""
    tagged = (
        ((part is Part.VALID, len(fragment.text)), fragment)
        for part, _, fragment in survey.fragments()
    )
    yield from encode_fragments(tokenizer, tagged)


def _reported(
    ids: Iterator[tuple[tuple[bool, int], Ids]], chars: int, report: Report
) -> Iterator[tuple[bool, Ids]]:
    """Pass `ids` on, and say at every twentieth of a large corpus how far it got."""
    done = tokens = said = 0
    for (is_held_out, length), row in ids:
        yield is_held_out, row
        if is_held_out:
            continue
        done, tokens = done + length, tokens + row.size
        if chars > _QUIET_CHARS and done * 20 // chars > said:
            said = done * 20 // chars
            report(f"tokenised {done:,} of {chars:,} characters, {tokens:,} tokens")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time makes the tokens in `path`; the others wait and find them."""
    with writing(path.parent, "nothing was begun"):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock").open("w")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sweep(path: Path) -> None:
    """Remove what a kill left unfinished; the lock must be held."""
    unfinished = re.compile(rf"\.{re.escape(path.name)}\.\d+\.(tmp|old)")
    for found in path.parent.iterdir():
        if unfinished.fullmatch(found.name):
            shutil.rmtree(found)
