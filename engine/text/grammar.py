"""What an output must look like, and how far one output has got. No tensors.

`Grammar` is what a request asks for, `Matcher` what one running request holds: it reads the drawn
tokens and tells which may come next. `engine.text.structured` makes the second from the first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from engine.errors import InvalidRequest, require

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_GRAMMAR_BYTES: Final = 1 << 16

GrammarKind = Literal["json_schema", "regex"]


@dataclass(frozen=True)
class Grammar:
    """The form that an output must have.

    Attributes:
        kind: how `source` is written.
        source: a JSON schema (as JSON text), or a regular expression in the syntax of Rust's
            `regex` crate that the whole output matches.
        field: what the client calls it, for sentences about it.

    Raises:
        InvalidRequest: if the source is too large or no Unicode.
    """

    kind: GrammarKind
    source: str
    field: str = field(default="grammar", compare=False)

    def __post_init__(self) -> None:
        try:
            size = len(self.source.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"{self.field} must be valid Unicode") from error
        require(
            size <= MAX_GRAMMAR_BYTES,
            f"{self.field} must have at most {MAX_GRAMMAR_BYTES} bytes, got {size}",
            InvalidRequest,
        )

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any], field: str = "grammar") -> Self:
        """JSON that satisfies `schema`; properties come in the schema's order.

        Raises:
            InvalidRequest: if it is no JSON, or too large.
        """
        try:
            source = json.dumps(schema, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
        except RecursionError as error:
            raise InvalidRequest(f"{field} is nested too deeply") from error
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"{field} must be a JSON schema: {error}") from error
        return cls("json_schema", source, field)

    @classmethod
    def json_object(cls, field: str = "grammar") -> Self:
        """Any JSON object."""
        return cls.json_schema({"type": "object"}, field)

    @classmethod
    def regex(cls, pattern: str, field: str = "grammar") -> Self:
        """Text that matches `pattern` as a whole.

        Raises:
            InvalidRequest: if it is too large.
        """
        return cls("regex", pattern, field)


class Matcher:
    """Where in its grammar one request's output stands.

    It depends on the output's tokens alone, so it survives a preemption, which keeps them.

    Args:
        state: llguidance's state at the grammar's beginning. Copies of one state share a budget for
            what they work out lazily.
        field: what the client calls the grammar.
        vocab_size: tokens of the model.
        renew: makes a state that shares nothing, for when the copies have used their budget up;
            None if that takes too long for a step.

    Attributes:
        failure: why it cannot go on, a sentence; None while it can.
    """

    def __init__(
        self,
        state: LLMatcher,
        field: str,
        vocab_size: int,
        renew: Callable[[], LLMatcher] | None = None,
    ) -> None:
        self.failure: str | None = None
        self._state = state
        self._field = field
        self._mask_bytes = (vocab_size + 63) // 64 * 8
        self._renew = renew
        self._read: list[int] = []

    def allowed(self, unwanted: Sequence[int] = ()) -> bytes:
        """Which tokens may come next, one bit each, the lowest bit of a byte first.

        The mask has whole words of 64 bits. The `unwanted` tokens are left out unless nothing else
        may come, because the grammar takes precedence. After a failure all bits are set, so that a
        caller who has not looked at `failure` yet can still draw.
        """
        mask = self._mask()
        if self._state.is_error() and self._renew is not None:
            self._state, self._renew = self._renew(), None
            self._state.consume_tokens(self._read)
            mask = self._mask()
        if self._state.is_error():
            self.failure = f"{self._field} is too complex to follow any further"
        elif not any(mask):
            self.failure = f"{self._field} needs text that this model has no tokens for"
        if self.failure is not None:
            return b"\xff" * self._mask_bytes
        return _without(mask[: self._mask_bytes], unwanted).ljust(self._mask_bytes, b"\0")

    def advance(self, token_id: int) -> bool:
        """Read a drawn token; whether it completes the output, so that nothing can follow."""
        self._read.append(token_id)
        self._state.consume_token(token_id)
        return self._state.is_stopped() and not self._state.is_error()

    def _mask(self) -> bytes:
        return b"" if self._state.is_error() else self._state.compute_bitmask()


def _without(mask: bytes, unwanted: Sequence[int]) -> bytes:
    """`mask` without the bits of `unwanted`; unchanged if no bit would be left."""
    if not unwanted:
        return mask
    rest = bytearray(mask)
    for token_id in unwanted:
        rest[token_id >> 3] &= ~(1 << (token_id & 7))
    return bytes(rest if any(rest) else mask)
