"""What a corpus is: which documents it has, which of them are held out, and its fingerprint.

One pass over the files lists the documents (40 bytes each, whatever their length); texts are read
again when they are needed.
"""

from __future__ import annotations

import hashlib
import platform
import random
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from engine.checkpoint import file_sha256
from training.data.text import Fragment, TextFile, find_files, standard_library
from training.errors import DataError

# Whole documents are held out, so the share is overshot, but never by more than this factor.
_MOST_HELD_OUT: Final = 5
_DIGEST_BYTES: Final = 16


class Part(IntEnum):
    """What becomes of a document."""

    DROPPED = 0
    TRAIN = 1
    VALID = 2


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents split into training and held-out parts, in memory.

    Attributes:
        description: where they came from, in words.
        fingerprint: SHA-256 over names and texts, in order.
    """

    train: list[Document]
    valid: list[Document]
    description: str
    fingerprint: str


@dataclass(frozen=True)
class Sources:
    """The files of a corpus.

    Attributes:
        train: files of text; split where `valid` is None.
        valid: files that are held out.
        description: where they came from, in words.
    """

    train: list[TextFile]
    valid: list[TextFile] | None
    description: str

    def sha256(self) -> str:
        """Over the name, size and content of every file.

        Raises:
            DataError: if a file cannot be read.
        """
        digest = hashlib.sha256()
        for kind, files in (("train", self.train), ("valid", self.valid or [])):
            for file in files:
                try:
                    size, content = file.path.stat().st_size, file_sha256(file.path)
                except OSError as error:
                    raise DataError(f"{file.path}: cannot be read ({error.strerror})") from error
                digest.update(f"{kind} {file.name} {size} {content}\n".encode())
        return digest.hexdigest()


def find_sources(paths: Sequence[Path], valid_paths: Sequence[Path] = ()) -> Sources:
    """The files of a corpus; no paths mean the source of Python's standard library.

    Raises:
        DataError: if a path is missing or of an unknown kind.
    """
    if paths:
        files, description = find_files(paths), ", ".join(str(p) for p in paths)
    else:
        files = standard_library()
        description = f"source of the Python {platform.python_version()} standard library"
        if not files:
            raise DataError("this Python has no standard library sources; give --data")
    if not valid_paths:
        return Sources(files, None, description)
    held_out = ", ".join(str(p) for p in valid_paths)
    return Sources(files, find_files(valid_paths), f"{description}; held out: {held_out}")


@dataclass
class _Listing:
    """The documents of some files, in order.

    Attributes:
        first: number of each file's first document in this listing, and at the end their count.
        numbers: each document's number within its file.
        chars: its length in characters.
        digests: SHA-256 of its text, the first 16 bytes.
        versions: (size, time of change) of each file.
        repeated: which documents repeat an earlier one. Source files never count as repeats.
        named_after: the last repeat of each document that has any: it goes by that one's name.
        fingerprint: SHA-256 over names and texts, repeats left out.
    """

    files: list[TextFile]
    first: list[int] = field(default_factory=list)
    numbers: array[int] = field(default_factory=lambda: array("q"))
    chars: array[int] = field(default_factory=lambda: array("q"))
    digests: bytearray = field(default_factory=bytearray)
    versions: list[tuple[int, int]] = field(default_factory=list)
    repeated: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, dtype=np.bool_))
    named_after: dict[int, int] = field(default_factory=dict)
    fingerprint: str = ""

    @classmethod
    def of(cls, files: list[TextFile]) -> _Listing:
        listing, everything = cls(files), hashlib.sha256()
        for file in files:
            listing.first.append(len(listing.numbers))
            listing.versions.append(_version(file))
            length, digest = 0, None
            for fragment in file.fragments():
                if digest is None:
                    everything.update(file.document_name(fragment.document).encode())
                    length, digest = 0, hashlib.sha256()
                text = fragment.text.encode("utf-8", "surrogatepass")
                everything.update(text)
                digest.update(text)
                length += len(fragment.text)
                if fragment.last:
                    listing.numbers.append(fragment.document)
                    listing.chars.append(length)
                    listing.digests += digest.digest()[:_DIGEST_BYTES]
                    digest = None
        listing.first.append(len(listing.numbers))
        listing.repeated = np.zeros(len(listing.numbers), dtype=np.bool_)
        listing.fingerprint = everything.hexdigest()
        if not all(file.is_source for file in files):
            listing._find_repeats()
        return listing

    def fragments(self, file_number: int) -> Iterator[tuple[int, Fragment]]:
        """(document of this listing, fragment) of one file.

        Raises:
            DataError: if the file is not what it was when it was listed.
        """
        file, index = self.files[file_number], self.first[file_number]
        end = self.first[file_number + 1]
        changed = DataError(f"{file.path}: changed while it was being read; start again")
        if _version(file) != self.versions[file_number]:
            raise changed
        for fragment in file.fragments():
            if index >= end or self.numbers[index] != fragment.document:
                raise changed
            yield index, fragment
            index += fragment.last
        if index != end:
            raise changed

    def name(self, document: int) -> str:
        document = self.named_after.get(document, document)
        file_number = bisect_right(self.first, document) - 1
        return self.files[file_number].document_name(self.numbers[document])

    def _find_repeats(self) -> None:
        if len(self.numbers) < 2:
            return
        halves = np.frombuffer(self.digests, dtype=np.uint64).reshape(-1, 2)
        order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: repeats stay in order
        is_same = np.zeros(len(order) + 1, dtype=np.bool_)
        is_same[1:-1] = (halves[order[1:]] == halves[order[:-1]]).all(1)
        if not is_same.any():
            return
        self.repeated[order[is_same[:-1]]] = True
        firsts = order[~is_same[:-1] & is_same[1:]]
        lasts = order[is_same[:-1] & ~is_same[1:]]
        self.named_after = dict(zip(firsts.tolist(), lasts.tolist(), strict=True))
        self.fingerprint = self._fingerprint()

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for file_number in range(len(self.files)):
            is_begun = False
            for document, fragment in self.fragments(file_number):
                if not self.repeated[document]:
                    if not is_begun:
                        digest.update(self.name(document).encode())
                    digest.update(fragment.text.encode("utf-8", "surrogatepass"))
                is_begun = not fragment.last
        return digest.hexdigest()


def _version(file: TextFile) -> tuple[int, int]:
    try:
        found = file.path.stat()
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read ({error.strerror})") from error
    return found.st_size, found.st_mtime_ns


class Survey:
    """A corpus that has been listed and split; its texts stay on disk.

    Whole documents are held out, chosen by the seed; where all are too large for that, the end of
    the largest one is. With files of their own held out, none is chosen, and a document that is
    among those is not trained on.

    Attributes:
        sources: its files.
        fingerprint: SHA-256 over names and texts, in order.
        train_documents: how many there are to train on.

    Raises:
        DataError: if a file cannot be read, or there is no text at all.
    """

    def __init__(self, sources: Sources, valid_share: float, seed: int) -> None:
        self.sources = sources
        self._seed = seed
        self._tail: tuple[int, int] | None = None  # (document, its characters to train on)
        self._listing = _Listing.of(sources.train)
        self._valid = _Listing(files=[])
        # A text that comes twice could otherwise be trained on and held out as well.
        self._parts = np.where(self._listing.repeated, Part.DROPPED, Part.TRAIN).astype(np.int8)
        self.fingerprint = self._listing.fingerprint
        if not self._parts.any():
            raise DataError(f"{sources.description}: no text found")
        if sources.valid is None:
            self._split(valid_share)
        else:
            self._hold_out(sources.valid)
        self.train_documents = int((self._parts == Part.TRAIN).sum())

    def _split(self, share: float) -> None:
        kept = array("q", np.flatnonzero(self._parts).tolist())
        order = array("q", range(len(kept)))
        random.Random(self._seed).shuffle(order)
        chars = self._listing.chars
        total = sum(chars[i] for i in kept)
        most = min(_MOST_HELD_OUT * share, (1 + share) / 2) * total
        size = 0
        for position in order:
            length = chars[kept[position]]
            if size < share * total and size + length <= most:
                self._parts[kept[position]] = Part.VALID
                size += length
        # With a few large documents, no whole one is small enough.
        if not (self._parts == Part.VALID).any():
            largest = max(kept, key=lambda i: chars[i])
            self._tail = largest, chars[largest] - int(share * total)

    def _hold_out(self, files: list[TextFile]) -> None:
        self._valid = _Listing.of(files)
        if not self._valid.numbers:
            raise DataError(f"{', '.join(str(f.path) for f in files)}: no text found to hold out")
        both = f"{self.fingerprint} held out {self._valid.fingerprint}"
        self.fingerprint = hashlib.sha256(both.encode()).hexdigest()
        held, digests = self._valid.digests, self._listing.digests
        step = _DIGEST_BYTES
        found = {bytes(held[i : i + step]) for i in range(0, len(held), step)}
        for document in np.flatnonzero(self._parts).tolist():
            if bytes(digests[document * step : (document + 1) * step]) in found:
                self._parts[document] = Part.DROPPED
        if not self._parts.any():
            raise DataError(f"{self.sources.description}: every text is held out")

    def fragments(self) -> Iterator[tuple[Part, str, Fragment]]:
        """(part, name of the document, fragment) of everything kept, in order.

        Raises:
            DataError: if a file cannot be read or has changed.
        """
        for file_number in range(len(self._listing.files)):
            for document, part, fragment in self._kept(file_number):
                yield part, self._listing.name(document), fragment
        for file_number in range(len(self._valid.files)):
            for document, fragment in self._valid.fragments(file_number):
                if not self._valid.repeated[document]:
                    yield Part.VALID, self._valid.name(document), fragment

    def _kept(self, file_number: int) -> Iterator[tuple[int, Part, Fragment]]:
        tail, cut = self._tail or (-1, 0)
        seen = 0
        for document, fragment in self._listing.fragments(file_number):
            if document == tail:
                at = min(max(cut - seen, 0), len(fragment.text))
                seen += len(fragment.text)
                if seen - len(fragment.text) < cut:
                    head = Fragment(fragment.document, fragment.text[:at], last=seen >= cut)
                    yield document, Part.TRAIN, head
                if seen > cut or fragment.last:
                    rest = Fragment(fragment.document, fragment.text[at:], fragment.last)
                    yield document, Part.VALID, rest
            elif self._parts[document]:
                yield document, Part(int(self._parts[document])), fragment

    @property
    def train_chars(self) -> int:
        """Characters to train on."""
        chars = np.frombuffer(self._listing.chars, dtype=np.int64)
        total = int(chars[self._parts == Part.TRAIN].sum())
        if self._tail is not None:
            document, cut = self._tail
            total += cut - self._listing.chars[document]
        return total

    def training_text(self, most: int) -> Iterator[str]:
        """The text to train on, fragment by fragment; of a larger corpus about `most` characters.

        Those are whole documents chosen by the seed, and the beginning of the last one chosen.

        Raises:
            DataError: if a file cannot be read or has changed.
        """
        left = self._allowances(most) if self.train_chars > most else None
        for file_number in range(len(self._listing.files)):
            for document, part, fragment in self._kept(file_number):
                if part is Part.TRAIN and left is None:
                    yield fragment.text
                elif part is Part.TRAIN and left is not None and left[document] > 0:
                    yield fragment.text[: left[document]]
                    left[document] -= len(fragment.text)

    def _allowances(self, most: int) -> array[int]:
        """How many characters of each document the sample takes."""
        order = array("q", np.flatnonzero(self._parts == Part.TRAIN).tolist())
        random.Random(self._seed).shuffle(order)
        allowed = array("q", bytes(8 * len(self._listing.numbers)))
        for document in order:
            allowed[document] = min(most, self._listing.chars[document])
            most -= allowed[document]
        return allowed


def load_corpus(
    paths: Sequence[Path], valid_share: float, seed: int, valid_paths: Sequence[Path] = ()
) -> Corpus:
    """Read and split a corpus that fits in memory; no paths mean the standard library.

    Raises:
        DataError: if a path cannot be read or there is no text at all.
    """
    survey = Survey(find_sources(paths, valid_paths), valid_share, seed)
    found: dict[Part, list[Document]] = {Part.TRAIN: [], Part.VALID: []}
    begun: dict[Part, list[str]] = {Part.TRAIN: [], Part.VALID: []}
    for part, name, fragment in survey.fragments():
        begun[part].append(fragment.text)
        if fragment.last:
            found[part].append(Document(name, "".join(begun[part])))
            begun[part].clear()
    return Corpus(
        found[Part.TRAIN], found[Part.VALID], survey.sources.description, survey.fingerprint
    )


def read_paths(paths: Sequence[Path]) -> list[Document]:
    """All documents of files and folders, in order of name; the same text counts once.

    No paths mean the source of Python's standard library.

    Raises:
        DataError: if a path is missing, unreadable, or of an unknown kind, or holds no text.
    """
    documents: dict[str, Document] = {}
    for file in find_files(paths) if paths else standard_library():
        texts: list[str] = []
        for fragment in file.fragments():
            texts.append(fragment.text)
            if fragment.last:
                text = "".join(texts)
                documents[text] = Document(file.document_name(fragment.document), text)
                texts.clear()
    if not documents:
        raise DataError(f"{', '.join(str(p) for p in paths)}: no text found")
    return list(documents.values())
