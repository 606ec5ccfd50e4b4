"""Progress bars: of training (phase, loss, speed, time left), an evaluation, an import."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ProgressMonitor:
    """A `trainer.Monitor` that draws on a terminal, and prints plain lines where there is none."""

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        self._console = console or Console()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[phase]:>6}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task(
            "train", total=total_steps, phase="", loss=float("nan"), speed=0.0
        )
        self._total = total_steps

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def message(self, text: str) -> None:
        self._console.print(text, highlight=False)

    def step(self, step: int, loss: float, phase: str, tokens_per_second: float) -> None:
        self._progress.update(
            self._task, completed=step + 1, loss=loss, phase=phase, speed=tokens_per_second
        )
        if not self._console.is_terminal and (step + 1) % max(1, self._total // 20) == 0:
            self.message(
                f"step {step + 1}/{self._total} {phase} loss {loss:.3f} "
                f"{tokens_per_second:,.0f} tokens/s"
            )


class _TokenProgress:
    """A bar of tokens that vanishes in the end, and lines where there is no terminal.

    Args:
        total_tokens: how many tokens the whole work has.
        console: where to draw.
        width: how wide the words before the bar are.
        period: seconds that the speed is averaged over.
    """

    def __init__(
        self, total_tokens: int, console: Console, width: int, period: float = 30.0
    ) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn(f"{{task.description:>{width}}}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=period,
        )
        self._task = self._progress.add_task("", total=total_tokens)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def message(self, text: str) -> None:
        """Something worth a line of its own."""
        self._console.print(text, highlight=False, markup=False)

    def advance(self, stage: str, tokens: int) -> None:
        """`tokens` more are done, at `stage`."""
        self._progress.update(self._task, advance=tokens, description=stage)


class EvaluationProgress(_TokenProgress):
    """How far an evaluation is, on a terminal; elsewhere a line for each policy it comes to."""

    def __init__(self, total_tokens: int, console: Console) -> None:
        super().__init__(total_tokens, console, width=10)
        self._policy = ""

    def advance(self, policy: str, tokens: int) -> None:
        """`tokens` more have been run, under `policy`."""
        super().advance(policy, tokens)
        if policy != self._policy and not self._console.is_terminal:
            self.message(policy)
        self._policy = policy


class ImportProgress(_TokenProgress):
    """How far an import is: tokens that have passed a layer; a line for each layer behind it."""

    def __init__(self, total_tokens: int, console: Console) -> None:
        # Clustering makes no progress for a while in each layer.
        super().__init__(total_tokens, console, width=24, period=300)
