"""TensorBoard events of a run: the same records as the run's log, as scalars and histograms.

    RUN/tensorboard/   one events file a sitting; `tensorboard --logdir RUN` shows them

The package is an optional extra, imported only when a log is opened.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from training.errors import TrainingError
from training.experts.study import ActivationStudy
from training.switching import Phase

FOLDER: Final = "tensorboard"
_PHASES: Final = {phase.value: number for number, phase in enumerate(Phase)}


class _Writer(Protocol):
    """The part of `torch.utils.tensorboard.SummaryWriter` that is used here."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def add_histogram(
        self, tag: str, values: NDArray[np.float64], global_step: int, bins: str
    ) -> None: ...

    def add_text(self, tag: str, text_string: str, global_step: int) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TensorBoardLog:
    """Writes log records to RUN/tensorboard.

    `train/phase` is 0 in dense, 1 in sparse and 2 in mixed phases.
    """

    def __init__(self, run: Path, purge_step: int) -> None:
        """Open a new events file.

        Args:
            run: the run's directory.
            purge_step: the step that comes next. Events at it and after it, left by an earlier
                sitting, are hidden by TensorBoard, so none appears twice; 0 for a new run.

        Raises:
            TrainingError: if the package is not installed.
        """
        try:
            module = importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise TrainingError(
                "writing TensorBoard events needs the extra: pip install 'ambidex[tensorboard]'"
            ) from error
        writer = module.SummaryWriter(log_dir=str(run / FOLDER), purge_step=purge_step)
        self._writer = cast("_Writer", writer)

    def write(self, step: int, **values: Any) -> None:
        """One record of the run's log: of a step, a probe, a validation or a switch.

        Raises:
            ConfigError: if a probe is not an `ActivationStudy`.
        """
        if "probe" in values:
            self._probe(step, values["probe"])
            self._scalars(step, "probe", {n: values.get(n) for n in ("settled", "drift")})
        elif "valid" in values:
            named = {k if k == "dense" else f"top_k_{k}": v for k, v in values["valid"].items()}
            self._scalars(step, "valid", named)
        elif "switch" in values:
            switch = values["switch"]
            text = f"{switch['phase']}: {switch['reason']}"
            self._writer.add_text("switch", text.replace("<", "&lt;"), step)
        else:
            numbers = {**values, "phase": _PHASES.get(values.get("phase", ""))}
            self._scalars(step, "train", numbers)
        self._writer.flush()  # so a killed run loses no step before its saved state

    def _scalars(self, step: int, group: str, values: Mapping[str, float | None]) -> None:
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                self._writer.add_scalar(f"{group}/{name}", float(value), step)

    def _probe(self, step: int, probe: Mapping[str, Any]) -> None:
        for number, layer in enumerate(ActivationStudy.from_dict(probe).layers):
            figures = {
                "active": layer.active,
                "never": layer.never,
                "oracle": layer.oracle,
                "coverage": layer.coverage,
                "cohesion": layer.cohesion,
                "load_entropy": layer.load_entropy,
                "dead_experts": layer.dead_experts if layer.load else None,
            }
            for name, value in figures.items():
                self._scalars(step, name, {f"layer_{number:02d}": value})
            if layer.load:
                load_E = np.array(layer.load)
                self._writer.add_histogram(f"load/layer_{number:02d}", load_E, step, "auto")

    def close(self) -> None:
        """Flush and close the events file."""
        self._writer.close()
