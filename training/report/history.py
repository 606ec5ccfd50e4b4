"""What a run's directory says about the run, finished or not: its log and, at the end, its report.

    RUN/log.jsonl                            one JSON object a line, each with "step" and one of
        phase, loss, outside, ...              a training step
        probe, settled, drift                  an `ActivationStudy` and the similarities
        valid                                  held-out perplexity: {"dense": .., "8": ..}
        switch                                 a change of phase and its reason
    RUN/checkpoint/training_report.json      once the run is finished

Reading is lenient, because a run may be going on or have been killed: a line cut short, or of a
kind not known here, is counted and left out; a number that is not finite is missing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from engine.checkpoint import read_json
from engine.errors import ConfigError, require
from training.errors import TrainingError
from training.experts.study import ActivationStudy
from training.run.run_state import LOG

REPORT: Final = Path("checkpoint") / "training_report.json"


@dataclass(frozen=True)
class StepRecord:
    """One logged training step; None where the log has no finite number.

    Attributes:
        step: number of the step.
        phase: "dense", "sparse" or "mixed"; "" if the log does not say.
        loss: mean cross-entropy, nats per token.
        outside: share of the true activation mass outside the chosen experts; None if dense.
        top_k: experts per token; None if dense.
        lr: learning rate.
        grad_norm: before clipping.
        tokens_per_second: how fast this step was.
        flops: training FLOPs so far.
        seconds: training time so far.
    """

    step: int
    phase: str
    loss: float | None
    outside: float | None
    top_k: int | None
    lr: float | None
    grad_norm: float | None
    tokens_per_second: float | None
    flops: float | None
    seconds: float | None


@dataclass(frozen=True)
class ProbeRecord:
    """One look at the activations, with the similarities that the switching decides by."""

    step: int
    study: ActivationStudy
    settled: float | None
    drift: float | None


@dataclass(frozen=True)
class ValidRecord:
    """Held-out perplexity by policy: "dense", or the number of experts per token as text."""

    step: int
    perplexity: dict[str, float]


@dataclass(frozen=True)
class SwitchRecord:
    """A change of phase before `step`; `cluster` says whether neurons were clustered anew."""

    step: int
    phase: str
    reason: str
    cluster: bool


Record = StepRecord | ProbeRecord | ValidRecord | SwitchRecord
_Kind = TypeVar("_Kind", StepRecord, ProbeRecord, ValidRecord, SwitchRecord)


def number(value: object) -> float | None:
    """A finite float, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def dig(value: object, *keys: str) -> Any:
    """`value[key][key]...`, or None where something on the way is missing."""
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def parse_record(line: str) -> Record | None:
    """One line of the log; None if it is cut short or of no known kind."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = number(dig(values, "step"))
    if step is None or step < 0:
        return None
    if isinstance(values.get("probe"), Mapping):
        return _probe(int(step), values)
    if isinstance(values.get("valid"), Mapping):
        found = {str(k): number(v) for k, v in values["valid"].items()}
        known = {
            k: v for k, v in found.items() if v is not None and (k == "dense" or k.isdecimal())
        }
        return ValidRecord(int(step), known)
    if isinstance(values.get("switch"), Mapping):
        return _switch(int(step), values["switch"])
    return _step(int(step), values) if "loss" in values else None


def _probe(step: int, values: Mapping[str, Any]) -> ProbeRecord | None:
    try:
        study = ActivationStudy.from_dict(values["probe"])
    except ConfigError:
        return None
    return ProbeRecord(step, study, number(values.get("settled")), number(values.get("drift")))


def _switch(step: int, values: Mapping[str, Any]) -> SwitchRecord:
    phase, reason = str(values.get("phase", "")), str(values.get("reason", ""))
    return SwitchRecord(step, phase, reason, bool(values.get("cluster")))


def _step(step: int, values: Mapping[str, Any]) -> StepRecord:
    names = ("loss", "outside", "lr", "grad_norm", "tokens_per_second", "flops", "seconds")
    top_k = number(values.get("top_k"))
    return StepRecord(
        step=step,
        phase=str(values.get("phase", "")),
        top_k=None if top_k is None else int(top_k),
        **{name: number(values.get(name)) for name in names},
    )


@dataclass(frozen=True)
class RunHistory:
    """A run's records by kind, each in order of step, and its report once it is finished.

    Attributes:
        run: the directory.
        steps, probes, valids, switches: the log.
        report: `training_report.json`; empty while the run is not finished.
        skipped: lines of the log that could not be understood.
    """

    run: Path
    steps: tuple[StepRecord, ...]
    probes: tuple[ProbeRecord, ...]
    valids: tuple[ValidRecord, ...]
    switches: tuple[SwitchRecord, ...]
    report: dict[str, Any]
    skipped: int = 0

    @classmethod
    def read(cls, run: Path) -> Self:
        """Read the directory of a run.

        Raises:
            TrainingError: if it holds no run.
            CheckpointError: if the finished run's report is damaged.
        """
        log = run / LOG
        require(
            log.is_file(),
            f"{run}: holds no training run, there is no {LOG} in it; give the directory that was "
            f"`ambidex train --out`",
            TrainingError,
        )
        lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        records = [parse_record(line) for line in lines]
        report = read_json(run / REPORT) if (run / REPORT).exists() else {}
        return cls(
            run,
            _by_step(records, StepRecord),
            _by_step(records, ProbeRecord),
            _by_step(records, ValidRecord),
            _by_step(records, SwitchRecord),
            report,
            sum(record is None for record in records),
        )

    @property
    def last_step(self) -> int:
        """The highest step that any record names; 0 if there is none."""
        kinds: tuple[Sequence[Record], ...] = (self.steps, self.probes, self.valids, self.switches)
        return max((record.step for records in kinds for record in records), default=0)

    @property
    def total_steps(self) -> int | None:
        """Steps of the whole run; known once it is finished."""
        total = number(dig(self.report, "config", "steps"))
        return None if total is None else int(total)

    @property
    def end(self) -> int:
        """Where the run ended, or how far it has come."""
        return max(self.total_steps or 0, self.last_step)

    @property
    def phases(self) -> list[tuple[int, int, str]]:
        """(first step, end, phase) of every stretch of the run so far."""
        first = self.steps[0].phase if self.steps and self.steps[0].phase else "dense"
        starts = [(0, first), *((s.step, s.phase) for s in self.switches)]
        ends = [step for step, _ in starts[1:]] + [max(self.end, starts[-1][0])]
        return [(a, b, phase) for (a, phase), b in zip(starts, ends, strict=True) if b > a]


def _by_step(records: Iterable[Record | None], kind: type[_Kind]) -> tuple[_Kind, ...]:
    """The records of one kind in order of step; of two of the same step, the one written last."""
    found = {record.step: record for record in records if isinstance(record, kind)}
    return tuple(found[step] for step in sorted(found))
