"""How long a random OPT-1.3B takes to import on this machine, and how much memory.

    python -m benchmarks.training.import_speed [--layers 24] [--model DIR] [--json FILE]

transformers makes the model (random weights, float16, safetensors), `ambidex import` imports it
with its default settings in a process of its own; the text is Python's standard library. The
figures are that process's wall clock and peak resident memory (wait4(2), ru_maxrss). Random weights
fire half of their neurons: quality means nothing here.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.records import MACHINE, VERSIONS, Record, write_records
from engine.config import check_range
from training.data.vocabulary import train_tokenizer

WIDTH, NEURONS, HEADS, VOCABULARY, CONTEXT = 2048, 8192, 32, 50272, 2048
LAYERS: Final = 24
TOKENIZER: Final = 4096
MIB: Final = 1 << 20


def make_model(out: Path, layers: int) -> None:
    """Write a random OPT of that many layers, with a tokenizer."""
    import transformers

    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=NEURONS,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
        dtype=torch.float16,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        model: Any = transformers.OPTForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(out)
    text = (path.read_text(encoding="utf-8") for path in sorted(library().glob("*.py")))
    train_tokenizer(text, TOKENIZER).backend.save(str(out / "tokenizer.json"))


def library() -> Path:
    """Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def import_it(model: Path, out: Path) -> tuple[float, int]:
    """Seconds and peak resident bytes of the import."""
    texts = [f"--calibrate={path}" for path in sorted(library().glob("*.py"))]
    command = [sys.executable, "-m", "ambidex", "import", str(model), "--out", str(out), *texts]
    began = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command[:4])
    return seconds, usage.ru_maxrss << 10


@contextmanager
def folder(given: Path | None) -> Iterator[Path]:
    """The directory of the model: the one that was named, which stays, or a temporary one."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="ambidex-import-") as temporary:
        yield Path(temporary) / "model"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both figures; with --json, keep the records."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--model", type=Path, help="make it here, or use what an earlier run made")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    parser.add_argument("--only-make", action="store_true", help="make the model, import nothing")
    given = parser.parse_args(arguments)
    check_range("layers", given.layers, 1, 1024)
    with folder(given.model) as model, tempfile.TemporaryDirectory() as temporary:
        if not (model / "config.json").is_file():
            # In a process of its own: a child's peak begins at its parent's size.
            subprocess.run([sys.executable, "-c", _MAKE, str(model), str(given.layers)], check=True)
        if given.only_make:
            return
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        seconds, peak = import_it(model, Path(temporary) / "out")
    params = {
        "shape": "opt-1.3b",
        "layers": given.layers,
        "source_bytes": size,
        "dtype": "bfloat16",
    }
    records = [
        Record("import_seconds", params, seconds, "s"),
        Record("import_memory", params, peak, "bytes"),
    ]
    print(f"{MACHINE}, torch {VERSIONS['torch']}, {given.layers} layers, {size / MIB:,.0f} MiB")
    print(f"{seconds:,.0f} s, peak resident memory {peak / MIB:,.0f} MiB")
    if given.json is not None:
        write_records(given.json, records)


_MAKE: Final = """
import sys
from pathlib import Path
from benchmarks.training.import_speed import make_model
make_model(Path(sys.argv[1]), int(sys.argv[2]))
"""


if __name__ == "__main__":
    main()
