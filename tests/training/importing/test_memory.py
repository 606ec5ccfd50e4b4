"""Little more than one layer is in memory: the peak does not grow with the number of layers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from engine import checkpoint
from engine.config import ExpertConfig, ModelConfig
from engine.model.decoder import Decoder
from training.data.vocabulary import train_tokenizer

WIDTH, NEURONS = 256, 4096
LAYER_BYTES = 4 * (4 * WIDTH**2 + 2 * WIDTH * NEURONS)
SCRIPT = """
import sys
from pathlib import Path
import torch
from training.importing import pipeline
from training.importing.job import prepare_import
from training.importing.options import ImportOptions

torch.set_num_threads(1)
folder = Path(sys.argv[1])
options = ImportOptions(16, calibration_tokens=128, quality_tokens=64, router="centroid")
prepared = prepare_import(folder / "model", folder / "out", [folder / "text.txt"], [], options)
pipeline.run(prepared, folder / "out", pipeline.SilentImport())
status = Path("/proc/self/status").read_text()  # not getrusage, which begins at the parent's size
print(int(status.split("VmHWM:")[1].split()[0]) << 10)
"""


def peak(folder: Path, layers: int) -> int:
    """Peak resident bytes of an import of so many layers."""
    folder.mkdir()
    tokenizer = train_tokenizer(["a b c d"], 257)
    model = Decoder(ModelConfig(257, WIDTH, NEURONS, layers, 4, 4, 64, ExpertConfig(64, 64)))
    model.initialize(torch.Generator().manual_seed(0))
    checkpoint.save(folder / "model", model, tokenizer, {})
    text = "<|endoftext|>\n".join("abcd"[n % 4] * 500 for n in range(40))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    command = [sys.executable, "-c", SCRIPT, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=240, text=True)
    return int(done.stdout)


def test_the_peak_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    few, many = peak(tmp_path / "few", 2), peak(tmp_path / "many", 12)
    assert 10 * LAYER_BYTES > 80 << 20  # what keeping them would have taken
    assert many - few < 2.5 * LAYER_BYTES
