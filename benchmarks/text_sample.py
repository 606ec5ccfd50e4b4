"""A sample of whole documents from large files of text, so that a benchmark need not tokenise all.

python -m benchmarks.text_sample --data PATH... --out FILE [--chars N] [--seed N]
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.text.tokenizer import END_OF_TEXT
from training.data.text import TextFile, find_files


def documents(file: TextFile) -> Iterator[str]:
    """The whole documents of one file."""
    parts: list[str] = []
    for fragment in file.fragments():
        parts.append(fragment.text)
        if fragment.last:
            yield "".join(parts)
            parts.clear()


def write_sample(paths: Sequence[Path], out: Path, chars: int, seed: int) -> int:
    """Write about `chars` characters of documents; returns how many.

    Each one is drawn with the same chance, `chars` over all there are: files keep their shares.
    """
    files = find_files(paths)
    total = sum(len(text) for file in files for text in documents(file))
    chance, draw, written = min(1.0, chars / max(1, total)), random.Random(seed), 0
    with out.open("w", encoding="utf-8") as target:
        for file in files:
            for text in documents(file):
                if draw.random() < chance:
                    target.write(f"{text}\n{END_OF_TEXT}\n")
                    written += len(text)
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--chars", type=int, default=16_000_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print(f"{write_sample(options.data, options.out, options.chars, options.seed):,} characters")


if __name__ == "__main__":
    main()
