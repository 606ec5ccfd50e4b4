"""All that must be known before an import begins: source, plan, and text to calibrate on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from engine.cpu import native
from engine.cpu.build import processor
from engine.text.tokenizer import Tokenizer
from training.errors import TrainingError
from training.importing.calibration import MOST_LENGTH, CalibrationText, read_calibration
from training.importing.formats import source as sources
from training.importing.formats.source import ModelSource
from training.importing.options import ImportOptions
from training.importing.plan import Plan

_FORMAT: Final = 1


@dataclass(frozen=True)
class ImportJob:
    """An import that could begin: everything that may refuse it has been read.

    Attributes:
        path: the source's directory.
        source: the opened model.
        tokenizer: the source's own.
        plan: what will be done.
        text: the tokens that the experts are made with and the quality is measured on.
        kept: files of the source to keep beside the checkpoint, by name.
    """

    path: Path
    source: ModelSource
    tokenizer: Tokenizer
    plan: Plan
    text: CalibrationText
    kept: Mapping[str, str]

    @property
    def identity(self) -> dict[str, Any]:
        """What a half-done import must share with the one that goes on from it."""
        return {
            "format": _FORMAT,
            "source": sources.fingerprint(self.path),
            "settings": dataclasses.asdict(self.plan.options),
            "text": self.text.fingerprint,
            "threads": torch.get_num_threads(),
            "version of torch": torch.__version__,
            "CPU kernels": _kernels(),
            "processor": processor(),
        }

    def describe(self) -> Iterator[tuple[str, str]]:
        """The plan for people; tokens are those that the text really has."""
        for name, value in self.plan.describe():
            yield name, value
            if name == "tokens":
                text = self.text
                yield (
                    "the text gives",
                    f"{text.calibration_tokens:,} and {text.held_out_tokens:,}, in sequences of "
                    f"{text.length}",
                )

    @property
    def work(self) -> int:
        """Tokens that pass a layer, over all layers and ways to choose experts."""
        plan, text = self.plan, self.text
        tokens = text.calibration_tokens + len(plan.streams) * text.held_out_tokens
        return tokens * plan.config.num_hidden_layers


def _kernels() -> str:
    """Which operators compute; others round sums in another order."""
    return "native" if native.available() else "torch"


def prepare_import(
    path: Path,
    out: Path,
    paths: Sequence[Path],
    valid_paths: Sequence[Path],
    options: ImportOptions,
) -> ImportJob:
    """Read everything that can refuse an import, and write nothing.

    Raises:
        CheckpointError: if the source cannot be imported.
        ConfigError: if an option does not fit it.
        DataError: if there is too little text.
        TrainingError: if `out` is there already.
    """
    if out.exists() or out.is_symlink():
        raise TrainingError(f"{out}: is there already; give --out a new directory")
    source = sources.open_source(path)
    plan = Plan.make(source.family, source.model_config, options)
    tokenizer, kept = sources.read_tokenizer(path, plan.config), source.texts()
    text = read_calibration(
        tokenizer,
        paths,
        valid_paths,
        length=min(plan.config.max_position_embeddings, MOST_LENGTH),
        calibration_tokens=plan.calibration_tokens,
        held_out_tokens=plan.quality_tokens,
        seed=options.seed,
    )
    return ImportJob(path, source, tokenizer, plan, text, kept)
