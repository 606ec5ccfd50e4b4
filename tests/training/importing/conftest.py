"""A small checkpoint of our own to import, and text for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine import checkpoint
from engine.model.decoder import Decoder
from tests.models import word_tokenizer
from training.config import TrainConfig
from training.importing import pipeline
from training.importing.curve import Quality
from training.importing.job import prepare_import
from training.importing.options import ImportOptions

Run = Callable[..., Quality]


@pytest.fixture
def model_dir(tmp_path: Path, micro: TrainConfig) -> Path:
    """Three layers of 32 neurons in random order of four planted kinds, context 16, float32."""
    tokenizer = word_tokenizer()
    shape = micro.model.model_config(16, tokenizer.eos_id, "float32")
    config = dataclasses.replace(shape, num_hidden_layers=3, initializer_range=0.3)
    model = Decoder(config)
    source = torch.Generator().manual_seed(0)
    model.initialize(source)
    with torch.no_grad():
        for ffn in model.ffns():
            centres = torch.randn(4, 16, generator=source).repeat(8, 1)
            ffn.up.copy_(centres + 0.3 * torch.randn(32, 16, generator=source))
    path = tmp_path / "model"
    checkpoint.save(path, model, tokenizer, {})
    return path


@pytest.fixture
def options() -> ImportOptions:
    return ImportOptions(num_experts=8, calibration_tokens=256, quality_tokens=128)


@pytest.fixture
def run(model_dir: Path, corpus: Path, options: ImportOptions) -> Run:
    """Import `model_dir`, with `options` unless others are given, into a directory."""

    def imported(
        out: Path,
        wanted: ImportOptions = options,
        monitor: pipeline.ImportMonitor | None = None,
        *,
        fresh: bool = False,
        source: Path = model_dir,
    ) -> Quality:
        prepared = prepare_import(source, out, [corpus], [], wanted)
        return pipeline.run(
            prepared, out, monitor or pipeline.SilentImport(), "ambidex import", fresh=fresh
        )

    return imported
