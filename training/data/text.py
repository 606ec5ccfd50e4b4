"""Text files to documents, streamed: no file and no document has to fit in memory.

A document comes as one fragment or more. A long one is cut before white space that follows a
letter, a digit or a sign: no token of a byte-level BPE spans such a place, so encoding fragment by
fragment gives the tokens of the whole.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import json
import lzma
import re
import sys
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from engine.checkpoint import file_sha256
from engine.text.tokenizer import END_OF_TEXT
from training.errors import DataError

TEXT_SUFFIXES: Final = (".txt", ".md", ".py", ".jsonl")
PACKED_SUFFIXES: Final = (".xz", ".gz", ".zst")
# Tests and vendored packages are left out: they repeat themselves, and some distributions of
# Python do not have them.
_SKIPPED_STDLIB: Final = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
}
_READ_CHARS: Final = 1 << 20
_READ_BYTES: Final = 1 << 17
_FRAGMENT_CHARS: Final = 1 << 16
# Text without any white space is cut after this many characters.
_LONGEST_CHARS: Final = 1 << 20
# So much is kept back at the end of a stream, so that an end-of-text mark is never cut in two.
_SPARE_CHARS: Final = 64
# The first holds for most tokenizers of others too, whose tokens may join a sign and a line break.
_BOUNDARIES: Final = (re.compile(r"(?<=\w)(?=[ \n])"), re.compile(r"(?<=\S)(?=[ \n])"))


@dataclass(frozen=True, slots=True)
class Fragment:
    """A part of a document, or all of it.

    Attributes:
        document: number of the document within its file; numbers may be missing.
        text: some 65,000 characters, or more where the text has no white space.
        last: whether it ends the document.
    """

    document: int
    text: str
    last: bool


@dataclass(frozen=True)
class TextFile:
    """One file of text.

    Attributes:
        path: where it is.
        name: what it is called in the fingerprint: its path below the folder that was given.
        is_source: a source file of Python: one document, odd bytes replaced.
    """

    path: Path
    name: str
    is_source: bool = False

    def document_name(self, number: int) -> str:
        return self.name if self.is_source else f"{self.name}#{number}"

    def fragments(self) -> Iterator[Fragment]:
        """Its documents in order; ones of white space alone are left out.

        Raises:
            DataError: if the file cannot be read, is not UTF-8 text, or is not the JSON lines it
                claims; names it.
        """
        try:
            if self.is_source:
                text = self.path.read_text(encoding="utf-8", errors="replace")
                if text.strip():
                    yield from _cut(0, text)
                return
            with _open_text(self.path) as file:
                if _inner(self.path).suffix == ".jsonl":
                    yield from _json_documents(file, self.path)
                else:
                    yield from _trimmed(_split(_chunks(file, self.path)))
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: is not UTF-8 text ({error.reason})") from error
        except _read_errors() as error:
            raise DataError(f"{self.path}: cannot be read ({error})") from error


def _read_errors() -> tuple[type[Exception], ...]:
    """What reading may raise; Zstandard's own error only where that package is in use."""
    zstandard = sys.modules.get("zstandard")
    extra = () if zstandard is None else (zstandard.ZstdError,)
    return (OSError, EOFError, lzma.LZMAError, zlib.error, *extra)


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    if path.suffix == ".zst":
        try:
            zstandard = importlib.import_module("zstandard")
        except ImportError as error:
            raise DataError(f"{path}: reading .zst needs the extra: ambidex[zst]") from error
        raw = _ZstandardFile(path, zstandard.ZstdDecompressor())
        return io.TextIOWrapper(io.BufferedReader(raw), encoding="utf-8")
    return path.open(encoding="utf-8")


class _ZstandardFile(io.RawIOBase):
    """All frames of a .zst file; the package's own reader ends at the first, or where it is cut."""

    def __init__(self, path: Path, decompressor: Any) -> None:
        self._source = path.open("rb")
        self._decompressor = decompressor
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._source.read(_READ_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("Compressed file ended before the end of its last frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._output = memoryview(self._frame.decompress(self._input))
            self._input = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

    def close(self) -> None:
        self._source.close()
        super().close()


def _inner(path: Path) -> Path:
    """`path` without the suffix of its compression."""
    return path.with_suffix("") if path.suffix in PACKED_SUFFIXES else path


def _is_text_file(path: Path) -> bool:
    return _inner(path).suffix in TEXT_SUFFIXES


def _chunks(file: IO[str], path: Path) -> Iterator[str]:
    while chunk := file.read(_READ_CHARS):
        if "\0" in chunk:
            raise DataError(f"{path}: is not text, it holds NUL bytes")
        yield chunk


def _json_documents(file: IO[str], path: Path) -> Iterator[Fragment]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield from _cut(number, _json_line_text(line, f"{path}, line {number}"))


def _json_line_text(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON") from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{where}: every line must be an object with a string field "text"')
    if not is_unicode(text):
        raise DataError(f"{where}: holds half of a surrogate pair")
    return text


def is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8; JSON can spell halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _split(chunks: Iterator[str]) -> Iterator[Fragment]:
    """The texts between end-of-text marks, blank ones included."""
    number, rest = 0, ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(END_OF_TEXT)
        for text in whole:
            yield from _cut(number, text)
            number += 1
        *heads, rest = pieces(rest)
        for head in heads:
            yield Fragment(number, head, last=False)
    yield Fragment(number, rest, last=True)


def _cut(number: int, text: str) -> Iterator[Fragment]:
    *heads, tail = pieces(text)
    for head in heads:
        yield Fragment(number, head, last=False)
    yield Fragment(number, tail, last=True)


def pieces(text: str) -> Iterator[str]:
    """`text` in pieces of bounded length that encode like the whole; at least one, maybe empty."""
    start = 0
    while end := _boundary(text, start):
        yield text[start:end]
        start = end
    yield text[start:]


def _boundary(text: str, start: int) -> int:
    """Where the piece from `start` must end; 0 if what is left is short enough."""
    for length in (_FRAGMENT_CHARS, _LONGEST_CHARS):
        end = start + length
        if end + _SPARE_CHARS >= len(text):
            return 0
        for pattern in _BOUNDARIES:
            for begin in (max(start, end - 1024), start):
                found = [m.start() for m in pattern.finditer(text, begin + 1, end)]
                if found:
                    return found[-1]
    return end


def _trimmed(fragments: Iterator[Fragment]) -> Iterator[Fragment]:
    """Drop blank documents; every other one loses outer line breaks and ends with one."""
    held, is_begun = "", False
    for fragment in fragments:
        text, held = held + fragment.text, ""
        if not is_begun and not text.strip():
            held = "" if fragment.last else text
            continue
        text = text if is_begun else text.lstrip("\n")
        body = text.rstrip("\n")
        is_begun = not fragment.last
        if fragment.last:
            yield Fragment(fragment.document, body + "\n", last=True)
        else:
            held = text[len(body) :]
            yield Fragment(fragment.document, body, last=False)


def _files_below(path: Path) -> Iterator[TextFile]:
    if path.is_file():
        if not _is_text_file(path):
            kinds = ", ".join((*TEXT_SUFFIXES, *PACKED_SUFFIXES))
            raise DataError(f"{path}: unknown kind of file; known are {kinds}")
        yield TextFile(path, path.name)
    elif path.is_dir():
        for file in sorted(p for p in path.rglob("*") if p.is_file() and _is_text_file(p)):
            yield TextFile(file, file.relative_to(path).as_posix())
    else:
        raise DataError(f"{path}: no such file or folder")


def find_files(paths: Sequence[Path]) -> list[TextFile]:
    """The text files at and below `paths`, in order of name; the same file counts once.

    Raises:
        DataError: if a path is missing or a file of unknown kind.
    """
    return list({f.path.resolve(): f for p in paths for f in _files_below(p)}.values())


def path_sha256(path: Path) -> str:
    """SHA-256 of a text file's bytes, or of a folder's list of text files and their SHA-256.

    The list is what `sha256sum` prints for the folder's text files in order of name.
    """
    if path.is_file():
        return file_sha256(path)
    lines = (f"{file_sha256(file.path)}  {file.name}\n" for file in _files_below(path))
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def standard_library() -> list[TextFile]:
    """The source files of Python's standard library, without its tests, in order of name."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_STDLIB.isdisjoint(relative.parts) and _is_readable(path):
            found.append(TextFile(path, relative.as_posix(), is_source=True))
    return found


def _is_readable(path: Path) -> bool:
    try:
        path.open("rb").close()
    except OSError:  # the link leads nowhere, or we may not read the file
        return False
    return True
