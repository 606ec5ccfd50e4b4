"""Compiles one grammar in a process of its own, where time and memory can be bounded.

Some small schemas take minutes and gigabytes: whether an intersection of patterns is empty, for
one, is answered by building it. A thread cannot be stopped; a process can. `engine.text.structured`
starts this file, not the module: it needs nothing of the project, and starts in some 50 ms.

In: a grammar of llguidance, on standard input. Out: what is wrong with it, or nothing.
"""

from __future__ import annotations

import resource
import sys
from typing import Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

# limit of the address space, which the interpreter itself needs a part of
MAX_BYTES: Final = 1 << 30
# the parent gives up earlier; this limit ends the process if the parent has died
MAX_CPU_SECONDS: Final = 60


class Bytes:
    """A vocabulary of single bytes and an end; compiling takes as long with any vocabulary."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([value]) for value in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_SECONDS, MAX_CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    words = LLTokenizer(TokenizerWrapper(Bytes()), slices=[])
    limits = LLParserLimits(verbose_errors=False)
    matcher = LLMatcher(words, sys.stdin.buffer.read().decode(), log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    sys.stdout.buffer.write(matcher.get_error().encode())


if __name__ == "__main__":
    main()
