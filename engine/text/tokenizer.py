"""Text to token ids and back, one token at a time when streaming."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

import tokenizers

from engine.errors import CheckpointError

END_OF_TEXT: Final = "<|endoftext|>"
_REPLACEMENT: Final = "\ufffd"  # what decoding an incomplete UTF-8 character yields
_BYTE_TOKEN: Final = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's spelling of a single byte
_SPACE: Final = "\u2581"  # and of a space
_CONTEXT: Final = 4  # how many tokens of the prompt are decoded together with its continuation
_MOST_CONTEXT: Final = 16  # the same where these give no text, or begin inside a character


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in the tokens of byte-level BPE (GPT-2's table).

    Printable bytes stand for themselves, the others for the characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


_BYTES: Final = _byte_alphabet()


class Tokenizer:
    """A Hugging Face tokenizer, and which of its tokens begins and ends a text.

    Args:
        backend: the library's object.
        eos_id: the token that ends a text; None: the one that is spelled END_OF_TEXT.
        bos_id: the one that templates call `bos_token`; None: `eos_id`.

    Raises:
        CheckpointError: there is no such token.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        eos_id: int | None = None,
        bos_id: int | None = None,
    ) -> None:
        if eos_id is None:
            eos_id = backend.token_to_id(END_OF_TEXT)
            if eos_id is None:
                raise CheckpointError(f"tokenizer.json: has no {END_OF_TEXT} token")
        elif backend.id_to_token(eos_id) is None:
            raise CheckpointError(f"tokenizer.json: has no token {eos_id}, which is to end a text")
        self.backend = backend
        self.eos_id: int = eos_id
        self.bos_id: int = eos_id if bos_id is None else bos_id
        # A cache; it holds at most one entry for each token of the vocabulary.
        self._token_texts: dict[int, str] = {}
        self._token_bytes: dict[int, bytes] = {}
        # A prompt that spells the special token must not end the text: it is encoded as plain text.
        backend.encode_special_tokens = True

    @classmethod
    def from_file(
        cls, path: Path, eos_id: int | None = None, bos_id: int | None = None
    ) -> Tokenizer:
        """Read a `tokenizer.json`; `eos_id` and `bos_id` as above.

        Raises:
            CheckpointError: if the file is missing or not a tokenizer.
        """
        try:
            source = path.read_text(encoding="utf-8")
            found = cls(tokenizers.Tokenizer.from_str(source), eos_id, bos_id)
        except CheckpointError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path.name}: not a readable tokenizer ({error})") from error
        found.source = source
        return found

    @cached_property
    def source(self) -> str:
        """The tokenizer's JSON; the file's own text if it came from one."""
        return self.backend.to_str()

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone."""
        return self.backend.encode(text, add_special_tokens=False).ids

    @cached_property
    def start_ids(self) -> list[int]:
        """What stands in front of every text, `<s>` for one; empty for models trained here.

        It is read from the post-processor in `tokenizer.json`, as transformers does. Tokens that
        the post-processor puts behind a text are left out, because a prompt is continued.
        """
        plain = self.encode("a")
        whole = self.backend.encode("a", add_special_tokens=True).ids
        places = range(len(whole) - len(plain) + 1)
        at = next((i for i in places if whole[i : i + len(plain)] == plain), 0)
        return whole[:at]

    def started(self, ids: list[int]) -> list[int]:
        """`ids` behind `start_ids`, unless they begin so themselves."""
        start = self.start_ids
        return ids if ids[: len(start)] == start else start + ids

    def encode_prompt(self, text: str, truncate: int | None = None) -> list[int]:
        """Ids of a text that the model is to continue: `start_ids`, then the text's own.

        Args:
            text: the prompt's text.
            truncate: how many tokens to keep: `start_ids` and the last ones of the text.
        """
        ids = self.started(self.encode(text))
        if truncate is None or len(ids) <= truncate:
            return ids
        start = self.start_ids[:truncate]
        return start + ids[len(ids) - truncate + len(start) :]

    @property
    def eos_token(self) -> str:
        """How the token that ends a text is spelled."""
        token = self.backend.id_to_token(self.eos_id)
        assert token is not None  # checked when it was made
        return token

    @property
    def bos_token(self) -> str:
        """How `bos_id` is spelled; empty if it is no token, as where a model has none."""
        return self.backend.id_to_token(self.bos_id) or ""

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """How the special tokens are spelled, long ones first."""
        added = self.backend.get_added_tokens_decoder().values()
        texts = {token.content for token in added if token.special} | {END_OF_TEXT}
        return tuple(sorted(texts, key=len, reverse=True))

    @cached_property
    def _parsing(self) -> tokenizers.Tokenizer:
        """A second backend: the flag belongs to a backend, and other threads use the first one."""
        backend = tokenizers.Tokenizer.from_str(self.source)
        backend.encode_special_tokens = False
        return backend

    def encode_parsing(self, text: str) -> list[int]:
        """Ids of a text in which the spelling of a special token stands for that token.

        Only for texts of our own, such as chat templates: a client's text must not end the prompt.
        """
        return self._parsing.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`; special tokens leave no trace."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def spell(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens spelled out."""
        return self.backend.decode(ids, skip_special_tokens=False)

    def token_text(self, token_id: int) -> str:
        """One token's text by itself; bytes of an incomplete character show as U+FFFD."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self.backend.decode([token_id], skip_special_tokens=False)
            self._token_texts[token_id] = text
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text's UTF-8, also where it is a part of a character.

        Empty for ids that are no tokens, as at the end of a padded vocabulary.
        """
        raw = self._token_bytes.get(token_id)
        if raw is None:
            raw = self._token_bytes[token_id] = self._read_bytes(token_id)
        return raw

    def _read_bytes(self, token_id: int) -> bytes:
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added:
            return token.encode()
        if "ByteLevel" in self._decoders:
            known = [_BYTES.get(char) for char in token]
            return token.encode() if None in known else bytes(b for b in known if b is not None)
        if "ByteFallback" in self._decoders and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        if self._decoders & {"Metaspace", "ByteFallback"}:
            return token.replace(_SPACE, " ").encode()
        return self.token_text(token_id).encode()

    @cached_property
    def _added(self) -> frozenset[int]:
        """Tokens that are spelled as they are, such as special ones."""
        return frozenset(self.backend.get_added_tokens_decoder())

    @cached_property
    def _decoders(self) -> frozenset[str]:
        """The types of the decoder's steps, which tell how the letters of a token spell bytes."""
        if self.backend.decoder is None:
            return frozenset()
        # Only the decoder's JSON: that of a whole tokenizer of 50k tokens takes 80 ms.
        found = json.loads(self.backend.decoder.__getstate__())
        return frozenset(step["type"] for step in found.get("decoders", [found]))

    def is_special(self, token_id: int) -> bool:
        return token_id == self.eos_id


class IncrementalDecoder:
    """Turns a stream of token ids into text without ever emitting half a character.

    Decodes a short window whose start lies at a known text boundary; what the window's text gained
    since the last call is final unless it ends inside a UTF-8 character. The window keeps all
    tokens of the last piece of text: a decoder with byte fallback makes text of a run of bytes only
    as a whole, so a character is never to be cut from its left.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self._window = prompt_ids[_context_start(tokenizer, prompt_ids) :]
        raw = [tokenizer.token_bytes(token) for token in self._window]
        begun = _begun_bytes(b"".join(raw))
        # The text of the first `_read` tokens has been returned; it ends with `_known`, the text
        # that the window begins with.
        self._read = len(self._window)
        tail = b""
        while len(tail) < begun:
            self._read -= 1
            tail = raw[self._read] + tail
        rest = tail[: len(tail) - begun].decode("utf-8", "replace")
        self._known = tokenizer.decode(self._window[: self._read]) + rest

    def push(self, token_id: int) -> str:
        """The text that became final with this token; may be empty."""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        return "" if text.endswith(_REPLACEMENT) else self._emit(text)

    def flush(self) -> str:
        """What is left at the end; an incomplete character shows as U+FFFD."""
        return self._emit(self._tokenizer.decode(self._window))

    def _emit(self, text: str) -> str:
        if text.startswith(self._known):
            new = text[len(self._known) :]
        else:
            # Bytes that never became a character change how those before them decode, whose text
            # has been returned already.
            new = self._tokenizer.decode(self._window[self._read :])
        if new:
            self._window = self._window[self._read :]
            self._read = len(self._window)
            self._known = self._tokenizer.decode(self._window)
        return new


def _context_start(tokenizer: Tokenizer, ids: list[int]) -> int:
    """Where the last part of a prompt begins, which is decoded together with what follows it.

    That end begins at a character and is not empty as text: some tokenizers drop a space in front
    of the first token.
    """
    start = max(0, len(ids) - _CONTEXT)
    while start > 0 and len(ids) - start < _MOST_CONTEXT:
        first = tokenizer.token_bytes(ids[start])[:1]
        if not _is_inside(first) and tokenizer.decode(ids[start:]):
            break
        start -= 1
    return start


def _is_inside(byte: bytes) -> bool:
    """Whether a UTF-8 character goes on with this byte."""
    return b"\x80" <= byte <= b"\xbf"


def _begun_bytes(raw: bytes) -> int:
    """How many bytes at the end of `raw` begin a UTF-8 character that lacks others."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(raw)
    return len(decoder.getstate()[0])


def text_offsets(tokens: Sequence[bytes], text: str) -> list[int]:
    """Where each token of `text` begins in it, in characters.

    A token that begins inside a character begins where that does. Bytes that are no UTF-8 count as
    the U+FFFD that decoding makes of them.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offsets, at = [], 0  # `at` counts the complete characters so far
    if tokens and tokens[0].startswith(b" ") and not text.startswith(" "):
        at = -1  # some tokenizers put a space in front, which is no part of the text
    for raw in tokens:
        at += len(decoder.decode(raw[:1]))
        inside = bool(decoder.getstate()[0])  # the first byte belongs to the character at `at`
        offsets.append(at if inside or not raw else at - 1)
        at += len(decoder.decode(raw[1:]))
    return [min(max(offset, 0), len(text)) for offset in offsets]
