"""From grammars to matchers: compiled by llguidance, within bounds, and kept.

A grammar is compiled once and copied for each request, which takes some microseconds. Whether it
can be compiled in time is first tried in a process of its own (`engine.text.grammar_check`), so
that no client's schema can stop the server. What a step may spend on a grammar is bounded as well,
in llguidance's own units; a grammar that needs more fails its request. Copies share what they have
found out, and its bound: once one of them has used that up, the others go on with states of their
own.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from engine.errors import InvalidRequest, Overloaded
from engine.text.grammar import Grammar, Matcher
from engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger("ambidex.engine")

COMPILE_SECONDS: Final = 5.0
MAX_KEPT: Final = 32
# How many states of a grammar's expressions its copies may keep together; each takes 1 to 2 kB.
MAX_LEXER_STATES: Final = 20_000
# The same for a request that goes on by itself: every running request may keep so many.
MAX_OWN_STATES: Final = 5_000
# CPU time to compile a grammar again within a step; the usual one takes 1 to 6 ms.
MAX_RENEWAL_SECONDS: Final = 0.05
MAX_REASON: Final = 200
_CHECK: Final = Path(__file__).with_name("grammar_check.py")


@dataclass(frozen=True)
class _Compiled:
    """A grammar at its beginning, as llguidance writes it, and the CPU time that compiling took."""

    beginning: LLMatcher
    source: str
    seconds: float


class Grammars:
    """The most recently used compiled grammars of one model. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        # or a sentence about what is wrong with it
        self._kept: OrderedDict[Grammar, _Compiled | str] = OrderedDict()
        self._lock = threading.Lock()
        self._compiling = threading.Lock()

    def prepare(self) -> None:
        """Read the vocabulary now, not with the first grammar: other threads stand still meanwhile.

        Some 20 ms for 4k tokens, 0.3 s for 50k, and over a second for 128k, unless another model
        had the same tokenizer.
        """
        try:
            self._words()
        except InvalidRequest as error:
            logger.warning("%s", error)

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of `grammar`; waits while it is compiled.

        Raises:
            InvalidRequest: it cannot be compiled, or not within the bounds.
            Overloaded: others are being compiled for longer than one may take.
        """
        compiled = self._compiled(grammar)
        if not isinstance(compiled, str) and _is_spent(compiled.beginning):
            with self._lock:
                self._kept.pop(grammar, None)
            compiled = self._compiled(grammar)
        if isinstance(compiled, str):
            raise InvalidRequest(f"{grammar.field} {compiled}")
        renew = partial(self._build, compiled.source, MAX_OWN_STATES)
        quick = compiled.seconds <= MAX_RENEWAL_SECONDS
        beginning = compiled.beginning.deep_copy()
        return Matcher(beginning, grammar.field, self._vocab_size, renew if quick else None)

    def knows(self, grammar: Grammar) -> bool:
        """Whether the grammar is compiled already, so that `matcher` returns at once."""
        with self._lock:
            return grammar in self._kept

    def _compiled(self, grammar: Grammar) -> _Compiled | str:
        """The grammar as it was kept, or else compiled now; or what is wrong with it."""
        compiled = self._find(grammar)
        if compiled is not None:
            return compiled
        if not self._compiling.acquire(timeout=COMPILE_SECONDS):
            raise Overloaded("other grammars are being compiled; try again later")
        try:
            return self._find(grammar) or self._keep(grammar, self._compile(grammar))
        finally:
            self._compiling.release()

    def _find(self, grammar: Grammar) -> _Compiled | str | None:
        with self._lock:
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
            return self._kept.get(grammar)

    def _keep(self, grammar: Grammar, compiled: _Compiled | str) -> _Compiled | str:
        with self._lock:
            self._kept[grammar] = compiled
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return compiled

    def _compile(self, grammar: Grammar) -> _Compiled | str:
        """The compiled grammar, or a predicate that says what is wrong with it ("takes too
        long").
        """
        try:
            source = _source(grammar)
        except ValueError as error:
            return _problem(str(error))
        if problem := _check(source):
            return problem
        self._words()
        started = time.thread_time()
        compiled = self._build(source, MAX_LEXER_STATES)
        seconds = time.thread_time() - started
        compiled.deep_copy().compute_bitmask()  # fills what all copies share
        first = compiled.deep_copy()
        first.compute_bitmask()
        if compiled.is_error():
            return _problem(compiled.get_error())
        return "is too complex" if first.is_error() else _Compiled(compiled, source, seconds)

    def _build(self, source: str, max_states: int) -> LLMatcher:
        # imported late, because only grammars need it
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_lexer_states=max_states, verbose_errors=False)
        return LLMatcher(self._words(), source, log_level=0, limits=limits)

    def _words(self) -> LLTokenizer:
        """The vocabulary as llguidance needs it."""
        tokenizer = self._tokenizer
        try:
            return _vocabulary(tokenizer.source, self._vocab_size, tokenizer.eos_id)
        except ValueError as error:
            reason = f"grammar is not supported with this model's tokenizer: {error}"
            raise InvalidRequest(reason[:MAX_REASON]) from error


# two: the model that serves, and the one that takes its place (often with the same tokenizer)
@lru_cache(maxsize=2)
def _vocabulary(source: str, vocab_size: int, eos_id: int) -> LLTokenizer:
    """The tree of a tokenizer's words. llguidance keeps Python's lock while it grows."""
    from llguidance import LLTokenizer

    return LLTokenizer(source, vocab_size, eos_id)


def _is_spent(compiled: LLMatcher) -> bool:
    """Whether the copies of the grammar have used up the states that they may keep together."""
    probe = compiled.deep_copy()
    probe.compute_bitmask()
    return bool(probe.is_error())


def _source(grammar: Grammar) -> str:
    """The grammar as llguidance writes it."""
    from llguidance import LLMatcher

    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.source)
    # At most one space between the parts of JSON: small models repeat white space for ever.
    # A schema cannot change that, nor can it have unsupported keywords ignored.
    return LLMatcher.grammar_from_json_schema(
        grammar.source, overrides={"whitespace_pattern": " ", "lenient": False}
    )


def _check(source: str) -> str | None:
    """Compile within bounds of time and memory; returns a predicate that says what went wrong."""
    command = [sys.executable, "-I", str(_CHECK)]
    try:
        run = subprocess.run(
            command,
            input=source.encode(),
            capture_output=True,
            timeout=COMPILE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"takes more than {COMPILE_SECONDS:g} s to compile: make it simpler"
    if run.returncode < 0 or b"MemoryError" in run.stderr or b"memory allocation" in run.stderr:
        return "takes too much memory to compile: make it simpler"
    if run.returncode:
        logger.error("the check of a grammar failed: %s", run.stderr[-MAX_REASON:])
        raise RuntimeError("grammars cannot be checked")
    return _problem(run.stdout.decode("utf-8", "replace")) if run.stdout else None


def _problem(error: str) -> str:
    """llguidance's error in one line; it may quote an expression and underline a part of it."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    reason = next((x.removeprefix("error: ") for x in lines if x.startswith("error: ")), lines[0])
    return f"cannot be compiled: {reason}"[:MAX_REASON]
