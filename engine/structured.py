"""From grammars to matchers: compiled by llguidance, within bounds, and kept.

A grammar is compiled once and copied for each request, which takes some microseconds. Whether it
can be compiled in time is tried out in a process of its own first (`engine.grammar_check`), so that
no client's schema can stop the server. What a step may spend on a grammar is bounded as well, in
llguidance's own units; a grammar that needs more fails its request.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from engine.errors import InvalidRequest, Overloaded
from engine.grammar import Grammar, Matcher
from engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

logger = logging.getLogger("ambidex.engine")

COMPILE_SECONDS: Final = 5.0
MAX_KEPT: Final = 32
# Of the states that the expressions of a grammar have been in, 1 to 2 kB each.
MAX_LEXER_STATES: Final = 20_000
MAX_REASON: Final = 200
_CHECK: Final = Path(__file__).with_name("grammar_check.py")


class Grammars:
    """The compiled grammars of one model, the latest used of them. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._vocabulary: LLTokenizer | None = None  # made when first needed: a second if large
        self._kept: OrderedDict[Grammar, LLMatcher | str] = OrderedDict()  # or what is wrong
        self._lock = threading.Lock()
        self._compiling = threading.Lock()

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the beginning of `grammar`; waits while it is compiled.

        Raises:
            InvalidRequest: it cannot be compiled, or not within the bounds.
            Overloaded: others are being compiled for longer than one may take.
        """
        compiled = self._compiled(grammar)
        if not isinstance(compiled, str) and _is_spent(compiled):
            with self._lock:
                self._kept.pop(grammar, None)
            compiled = self._compiled(grammar)
        if isinstance(compiled, str):
            raise InvalidRequest(f"{grammar.field} {compiled}")
        return Matcher(compiled.deep_copy(), grammar.field, self._vocab_size)

    def knows(self, grammar: Grammar) -> bool:
        """Whether `matcher` need not compile it."""
        with self._lock:
            return grammar in self._kept

    def _compiled(self, grammar: Grammar) -> LLMatcher | str:
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

    def _find(self, grammar: Grammar) -> LLMatcher | str | None:
        with self._lock:
            if grammar in self._kept:
                self._kept.move_to_end(grammar)
            return self._kept.get(grammar)

    def _keep(self, grammar: Grammar, compiled: LLMatcher | str) -> LLMatcher | str:
        with self._lock:
            self._kept[grammar] = compiled
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return compiled

    def _compile(self, grammar: Grammar) -> LLMatcher | str:
        """The compiled grammar, or what is wrong with it: a sentence without its subject."""
        from llguidance import LLMatcher, LLParserLimits  # nothing but grammars needs it

        try:
            source = _source(grammar)
        except ValueError as error:
            return _problem(str(error))
        if problem := _check(source):
            return problem
        limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        compiled = LLMatcher(self._words(), source, log_level=0, limits=limits)
        compiled.deep_copy().compute_bitmask()  # fills what all copies share
        first = compiled.deep_copy()
        first.compute_bitmask()
        if compiled.is_error():
            return _problem(compiled.get_error())
        return "is too complex" if first.is_error() else compiled

    def _words(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        if self._vocabulary is None:
            backend, eos = self._tokenizer.backend, self._tokenizer.eos_id
            try:
                self._vocabulary = LLTokenizer(backend.to_str(), self._vocab_size, eos)
            except ValueError as error:
                reason = f"grammar is not supported with this model's tokenizer: {error}"
                raise InvalidRequest(reason[:MAX_REASON]) from error
        return self._vocabulary


def _is_spent(compiled: LLMatcher) -> bool:
    """Whether its copies, which share what they have found out, have used up what they may."""
    probe = compiled.deep_copy()
    probe.compute_bitmask()
    return bool(probe.is_error())


def _source(grammar: Grammar) -> str:
    """The grammar as llguidance writes it."""
    from llguidance import LLMatcher

    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.source)
    # At most one space between the parts of JSON: small models never tire of white space.
    # A schema cannot change that, nor have what is not supported passed over.
    return LLMatcher.grammar_from_json_schema(
        grammar.source, overrides={"whitespace_pattern": " ", "lenient": False}
    )


def _check(source: str) -> str | None:
    """Compile within bounds of time and memory; what is wrong, a sentence without its subject."""
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
    """llguidance's complaint in one line; those about expressions quote and underline them."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    reason = next((x.removeprefix("error: ") for x in lines if x.startswith("error: ")), lines[0])
    return f"cannot be compiled: {reason}"[:MAX_REASON]
