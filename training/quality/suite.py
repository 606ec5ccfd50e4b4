"""What `ambidex eval` runs: text and task sets under several expert policies, in one result.

`prepare` reads, checks and tokenises everything, so that bad input is refused before the first
token is run; `Suite.run` does the work; `SuiteResult` is the table and the JSON.
"""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import tokenizers
import torch
from torch import Tensor

from engine.checkpoint import Checkpoint
from engine.errors import ConfigError, InvalidRequest, require
from engine.policy import SHARED_IS_GONE, ExpertPolicy
from training.errors import DataError, TrainingError
from training.experts.shares import SHARES, top_k_of
from training.quality.evaluation import Evaluation, TextSet, evaluate, read_text
from training.quality.tasks import EncodedTask, Measure, TaskResult, read_task

FORMAT: Final = 1
_NOTHING: Final = "-"

# Is called with the policy that runs and the tokens that were run since the last call.
Advance = Callable[[str, int], None]


@dataclass(frozen=True)
class PolicyResult:
    """What one policy scored; `text` is None without text, a task None where it was not run."""

    policy: ExpertPolicy
    text: Evaluation | None
    tasks: tuple[TaskResult | None, ...]

    @property
    def use(self) -> Evaluation | TaskResult:
        """Where the table's activated experts and coverage come from: text before tasks."""
        return self.text or next(task for task in self.tasks if task is not None)


@dataclass(frozen=True)
class Suite:
    """Everything that will be evaluated, checked and tokenised.

    Attributes:
        checkpoint: the model.
        text: for perplexity; None if only tasks were asked for.
        tasks: the task sets.
        names: theirs, distinct.
        policies: resolved and distinct, in the order of the table's rows.
        oracle_tasks: run tasks under oracle policies too; they were asked for by name.
    """

    checkpoint: Checkpoint
    text: TextSet | None
    tasks: tuple[EncodedTask, ...]
    names: tuple[str, ...]
    policies: tuple[ExpertPolicy, ...]
    oracle_tasks: bool

    @property
    def work(self) -> int:
        """Tokens that `run` takes, over all policies, padding included."""
        text = self.text.tokens if self.text else 0
        tasks = sum(task.work for task in self.tasks)
        return sum(text + tasks * self._runs_tasks(policy) for policy in self.policies)

    def _runs_tasks(self, policy: ExpertPolicy) -> bool:
        return self.oracle_tasks or policy.kind != "oracle"

    def run(self, advance: Advance = lambda _policy, _tokens: None) -> SuiteResult:
        """Evaluate everything under every policy.

        Raises:
            TrainingError: if the model's output is not finite.
        """
        return SuiteResult(self, tuple(self._run(policy, advance) for policy in self.policies))

    def _run(self, policy: ExpertPolicy, advance: Advance) -> PolicyResult:
        model = self.checkpoint.model

        def hear(tokens: int) -> None:
            advance(str(policy), tokens)

        hear(0)
        text = evaluate(model, _heard(self.text, hear), policy) if self.text else None
        require(
            text is None or math.isfinite(text.perplexity),
            f"the model's logits under {policy} are not finite",
            TrainingError,
        )
        run_tasks = self._runs_tasks(policy)
        tasks = tuple(t.run(model, policy, hear) if run_tasks else None for t in self.tasks)
        return PolicyResult(policy, text, tasks)


def _heard(text: TextSet, hear: Callable[[int], None]) -> Iterator[tuple[Tensor, Tensor]]:
    """The text's batches, each reported once it has been used."""
    for inputs_BL, targets_BL in text.batches:
        yield inputs_BL, targets_BL
        hear(targets_BL.numel())


def prepare(
    checkpoint: Checkpoint,
    data: Sequence[Path],
    tasks: Sequence[Path],
    experts: Sequence[str],
    max_tokens: int,
    max_examples: int | None,
) -> Suite:
    """Read and check what `ambidex eval` was given.

    Args:
        checkpoint: the model, in the dtype to evaluate it in.
        data: files and folders of text for perplexity. None mean what the checkpoint's training
            held out or, if there are tasks, no text.
        tasks: task files.
        experts: policies as text, dense, auto, top_k:N, mass:SHARE or oracle:N. None mean dense
            and SHARES of the experts, routed and, where there is text, by oracle.
        max_tokens: how many tokens of text are scored at most, in whole sequences.
        max_examples: how many examples of each task are run, its first ones; None means all.

    Raises:
        DataError: if a file cannot be used; names it and the line.
        ConfigError, InvalidRequest: if a policy is unknown or does not fit the model.
    """
    num_experts = checkpoint.config.experts.num_experts
    resolved = [_policy(text, checkpoint) for text in experts]
    twice = [path for path, count in Counter(p.resolve() for p in tasks).items() if count > 1]
    if twice:
        raise DataError(f"{twice[0]}: was given twice as a task")
    read = [read_task(path, max_examples) for path in tasks]
    context = checkpoint.config.max_position_embeddings
    encoded = tuple(EncodedTask(task, checkpoint.tokenizer, context) for task in read)
    text = read_text(checkpoint, data, max_tokens) if data or not tasks else None
    names = Counter(task.name for task in read)
    return Suite(
        checkpoint,
        text,
        encoded,
        tuple(task.name if names[task.name] == 1 else str(task.path) for task in read),
        tuple(dict.fromkeys(resolved)) or _default_policies(num_experts, oracle=text is not None),
        oracle_tasks=bool(experts),
    )


def _policy(text: str, checkpoint: Checkpoint) -> ExpertPolicy:
    try:
        policy = ExpertPolicy.parse(text)
    except InvalidRequest as error:
        require(SHARED_IS_GONE not in str(error), f"--experts: {error}", ConfigError)
        raise ConfigError(
            f"--experts must be dense, auto, top_k:N, mass:SHARE or oracle:N; got {text[:40]!r}"
        ) from error
    policy = policy.resolve(checkpoint.config.experts.default_policy)
    policy.validate(checkpoint.config.experts.num_experts)
    return policy


def _default_policies(num_experts: int, *, oracle: bool) -> tuple[ExpertPolicy, ...]:
    ks = sorted({top_k_of(share, num_experts) for share in SHARES})
    routed = [ExpertPolicy.top_k(k) for k in ks]
    best = [ExpertPolicy.oracle(k) for k in ks] if oracle else []
    return (ExpertPolicy.dense(), *routed, *best)


@dataclass(frozen=True)
class SuiteResult:
    """The results, one row for each policy."""

    suite: Suite
    rows: tuple[PolicyResult, ...]

    def relative(self, row: PolicyResult) -> float | None:
        """How much higher the perplexity is than dense, as a share; None if dense was not run."""
        dense = next((r.text for r in self.rows if r.policy.kind == "dense"), None)
        if row.text is None or dense is None:
            return None
        return row.text.perplexity / dense.perplexity - 1

    def header(self) -> list[str]:
        """The table's columns; a task's name is followed, on a line of its own, by the measure."""
        text = ["perplexity", "against dense"] if self.suite.text else []
        columns = ["policy", *text, "experts", "coverage"]
        for name, task in zip(self.suite.names, self.suite.tasks, strict=True):
            measures = ("acc", "perplexity") if task.task.kind == "cloze" else ("acc", "acc_norm")
            columns += [f"{name}\n{measure}" for measure in measures]
        return columns

    def cells(self) -> list[list[str]]:
        """The table's rows, one cell a column of `header`."""
        return [self._cells(row) for row in self.rows]

    def _cells(self, row: PolicyResult) -> list[str]:
        cells = [str(row.policy)]
        if row.text is not None:
            relative = self.relative(row)
            cells.append(f"{row.text.perplexity:.3f}")
            cells.append(_NOTHING if relative is None else f"{relative:+.2%}")
        cells += [f"{row.use.activated_ratio:.1%}", f"{row.use.coverage:.1%}"]
        for task in row.tasks:
            cells += [_cell(m) for m in task.measures] if task else [_NOTHING] * 2
        return cells

    def notes(self) -> list[str]:
        """What was evaluated, a sentence each: how much of the text and of every task."""
        text = self.suite.text
        lines = []
        if text is not None:
            lines.append(
                f"text: {text.tokens:,} tokens evaluated of {text.available:,}, "
                f"{text.sequences:,} x {text.length:,}"
            )
        for name, encoded in zip(self.suite.names, self.suite.tasks, strict=True):
            task = encoded.task
            line = f"{name}: {len(task.examples):,} examples of {task.available:,}"
            if task.chance is not None:
                line += f", chance {task.chance:.1%}"
            if encoded.truncated:
                line += f", {encoded.truncated:,} with the start of the context cut off to fit"
            lines.append(line)
        return lines

    def to_dict(self, version: str) -> dict[str, Any]:
        """Everything, for JSON; `version` is that of the software."""
        checkpoint, text = self.suite.checkpoint, self.suite.text
        return {
            "format": FORMAT,
            "model": {
                "path": str(checkpoint.path),
                "fingerprint": checkpoint.fingerprint,
                "num_experts": checkpoint.config.experts.num_experts,
                "dtype": str(checkpoint.model.embedding.weight.dtype).removeprefix("torch."),
            },
            "versions": {
                "ambidex": version,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "tokenizers": tokenizers.__version__,
            },
            "text": text
            and {
                "sources": list(text.sources),
                "tokens": text.tokens,
                "available_tokens": text.available,
                "sequences": text.sequences,
                "sequence_length": text.length,
            },
            "tasks": [
                {
                    "name": name,
                    "path": str(encoded.task.path),
                    "sha256": encoded.task.sha256,
                    "kind": encoded.task.kind,
                    "examples": len(encoded.task.examples),
                    "available_examples": encoded.task.available,
                    "truncated_examples": encoded.truncated,
                    "chance": encoded.task.chance,
                }
                for name, encoded in zip(self.suite.names, self.suite.tasks, strict=True)
            ],
            "results": [self._row_dict(row) for row in self.rows],
        }

    def _row_dict(self, row: PolicyResult) -> dict[str, Any]:
        text = row.text and {
            "perplexity": row.text.perplexity,
            "relative_to_dense": self.relative(row),
            "activated_ratio": row.text.activated_ratio,
            "coverage": row.text.coverage,
        }
        tasks = {
            name: task and _task_dict(task)
            for name, task in zip(self.suite.names, row.tasks, strict=True)
        }
        return {"policy": str(row.policy), "text": text, "tasks": tasks}


def _cell(measure: Measure) -> str:
    """Accuracies in percent with their standard error; perplexities as numbers."""
    if measure.name == "perplexity":
        return f"{measure.value:,.2f}"
    error = "" if measure.stderr is None else f" ±{100 * measure.stderr:.1f}"
    return f"{100 * measure.value:.1f}%{error}"


def _task_dict(task: TaskResult) -> dict[str, Any]:
    """Measures by name, a standard error as NAME_stderr; null where it is not defined."""
    values: dict[str, Any] = {}
    for measure in task.measures:
        values[measure.name] = measure.value
        if measure.name != "perplexity":
            values[f"{measure.name}_stderr"] = measure.stderr
    return values | {"activated_ratio": task.activated_ratio, "coverage": task.coverage}
