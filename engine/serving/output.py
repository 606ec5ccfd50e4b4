"""From tokens to text for readers: characters whole, stop strings found across tokens."""

from __future__ import annotations

from collections.abc import Sequence

from engine.serving.request import Request
from engine.serving.sampler import Sampled
from engine.text.tokenizer import IncrementalDecoder, Tokenizer


class StopMatcher:
    """Finds the first stop string in a text that arrives in pieces.

    What may be the beginning of a stop string is held back until that is decided. So text once
    emitted stands, and a stop string comes whole, at the end of the last piece: a reader that wants
    it hidden cuts it there.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(the text that is certain now, whether it ends with a stop string)."""
        text = self._held + text
        ends = [at + len(stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self._held = ""
            return text[: min(ends)], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, when nothing follows."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that ends `text`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class RequestText:
    """The text side of one running request."""

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        self._request = request
        self._decoder = IncrementalDecoder(tokenizer, request.prompt_ids)
        self._stops = StopMatcher(request.sampling.stop)
        # The log-probability of each prompt token; the first token has none.
        self.prompt: list[Sampled | None] = [None] * request.prompt_len

    def push(self, token_id: int | None) -> tuple[str, bool]:
        """The text that the request's newest token made final, and whether a stop string ends it.

        `token_id` is None if the token leaves no text.
        """
        return self._search("" if token_id is None else self._decoder.push(token_id))

    def end(self) -> tuple[str, bool]:
        """All text that is left, and whether a stop string ends it."""
        text, stopped = self._search(self._decoder.flush())
        return (text, True) if stopped else (text + self._stops.flush(), False)

    def _search(self, text: str) -> tuple[str, bool]:
        """Look for stop strings in what follows the text of the first `min_tokens` tokens."""
        return self._stops.push(text) if self._request.may_end else (text, False)
