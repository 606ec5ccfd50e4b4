"""When to train dense, sparse, or mixed: a pure state machine that never sees a tensor.

    DENSE  --settled, or the phase reached its bound-->            SPARSE
    SPARSE --clustering gone stale, or the phase reached its bound--> DENSE
    either --the last share of the run begins-->                   MIXED (dense and sparse in turn)

Entering SPARSE, or MIXED from DENSE, asks for a new clustering. All decisions depend on the step
and the measured similarities alone, so a resumed run repeats them. In mode `dense` no phase ever
ends; in mode `static` the first sparse phase lasts to the end of the run.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from typing import Any, Self

from training.config import TrainConfig


class Phase(enum.Enum):
    """How the steps of a stretch of training run."""

    DENSE = "dense"
    SPARSE = "sparse"
    MIXED = "mixed"


@dataclass(frozen=True)
class Decision:
    """A change of phase before `step`, why, and whether the neurons are clustered anew."""

    step: int
    phase: Phase
    reason: str
    cluster: bool

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "phase": self.phase.value}


@dataclass
class SwitchController:
    """Decides the phase of every step.

    Attributes:
        config: the run, with its `switch` settings.
        phase: the phase of the current step.
        phase_start: the step at which it began.
        settled: similarity of the last two probes; None until one was made in this phase.
        drift: similarity of the last probe to the clustering's birth; None in dense phases.
        first_sparse: the first sparse step of the run; None before it.
    """

    config: TrainConfig
    phase: Phase = Phase.DENSE
    phase_start: int = 0
    settled: float | None = None
    drift: float | None = None
    first_sparse: int | None = None

    @property
    def mixed_start(self) -> int:
        """First step of the mixed phase; the run's end if there is none."""
        switch = self.config.switch
        share = switch.mixed_share if switch.mode == "ssd" else 0.0
        return self.config.steps - (self.config.steps_of(share) if share else 0)

    def wants_probe(self, step: int) -> bool:
        """Whether the activations should be looked at before `step`."""
        every = self.config.steps_of(self.config.switch.probe_share)
        return step > 0 and step % every == 0

    def observe(self, settled: float | None, drift: float | None) -> None:
        """Take in a probe: similarity to the previous probe, and to the clustering's birth."""
        self.settled, self.drift = settled, drift

    def decide(self, step: int) -> Decision | None:
        """The change of phase that takes place before `step`, if any."""
        if self.config.switch.mode == "dense":
            return None
        if self.phase is not Phase.MIXED and step >= self.mixed_start:
            return self._enter(Phase.MIXED, step, "the last phase begins")
        if self.phase is Phase.DENSE:
            return self._leave_dense(step)
        if self.phase is Phase.SPARSE:
            return self._leave_sparse(step)
        return None

    def _leave_dense(self, step: int) -> Decision | None:
        switch, length = self.config.switch, step - self.phase_start
        if length < self.config.steps_of(switch.min_dense_share):
            return None
        if self.settled is not None and self.settled >= switch.settled:
            reason = f"activations settled: similarity {self.settled:.3f} >= {switch.settled:g}"
            return self._enter(Phase.SPARSE, step, reason)
        if length >= self.config.steps_of(switch.max_dense_share):
            return self._enter(Phase.SPARSE, step, f"dense for {length} steps, the bound")
        return None

    def _leave_sparse(self, step: int) -> Decision | None:
        switch, length = self.config.switch, step - self.phase_start
        if switch.mode == "static" or length < self.config.steps_of(switch.min_sparse_share):
            return None
        if self.drift is not None and self.drift < switch.stale:
            reason = f"clustering stale: similarity {self.drift:.3f} < {switch.stale:g}"
            return self._enter(Phase.DENSE, step, reason)
        if length >= self.config.steps_of(switch.max_sparse_share):
            return self._enter(Phase.DENSE, step, f"sparse for {length} steps, the bound")
        return None

    def _enter(self, phase: Phase, step: int, reason: str) -> Decision:
        cluster = phase is not Phase.DENSE and self.phase is Phase.DENSE
        self.phase, self.phase_start = phase, step
        self.settled = self.drift = None
        if phase is Phase.SPARSE and self.first_sparse is None:
            self.first_sparse = step
        return Decision(step, phase, reason, cluster)

    def step_top_k(self, step: int) -> int | None:
        """Experts per token of `step`; None for a dense step."""
        switch = self.config.switch
        if self.phase is Phase.DENSE:
            return None
        if self.phase is Phase.SPARSE:
            assert self.first_sparse is not None
            stretch = max(1, self.mixed_start - self.first_sparse)
            turn = (step - self.first_sparse) * len(switch.top_k) // stretch
            return switch.top_k[min(turn, len(switch.top_k) - 1)]
        turn, position = divmod(step - self.phase_start, switch.mixed_dense_every)
        if position == 0:
            return None
        sparse_steps = turn * (switch.mixed_dense_every - 1) + position - 1
        return switch.mixed_top_k[sparse_steps % len(switch.mixed_top_k)]

    def to_dict(self) -> dict[str, Any]:
        """The state that a resumed run needs, as JSON."""
        return {
            "phase": self.phase.value,
            "phase_start": self.phase_start,
            "settled": self.settled,
            "drift": self.drift,
            "first_sparse": self.first_sparse,
        }

    @classmethod
    def from_dict(cls, config: TrainConfig, state: dict[str, Any]) -> Self:
        return cls(config, **{**state, "phase": Phase(state["phase"])})
