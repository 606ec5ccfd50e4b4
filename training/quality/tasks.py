"""Task sets: cloze and multiple choice, read from JSON lines, one example a line.

Cloze: the model continues a context, right if greedy decoding gives the target exactly.

    {"text": "... all of it, the last word is the target"}        as in LAMBADA
    {"context": "...", "target": "..."}

Multiple choice: the answer is the choice with the highest log-likelihood given the context.

    {"question": "...", "choices": ["...", "..."], "answer": 0}   `context` means the same

One space joins a context and its target or choice, unless there is white space between them
already; a field "delimiter" gives another string to join them with, perhaps the empty one. Fields
of other names, such as an id, are notes to the reader of the file and mean nothing here.

Measures are named and defined as in EleutherAI's lm-evaluation-harness: `acc`; `acc_norm`, where
log-likelihoods are first divided by the choices' length in UTF-8 bytes (the harness counts
characters, the same for ASCII); `perplexity` of cloze targets, exp of the mean negative
log-likelihood per target (not per token).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from engine.checkpoint import file_sha256
from engine.model.decoder import Decoder
from engine.policy import ExpertPolicy
from engine.text.tokenizer import Tokenizer
from training.data.text import is_unicode
from training.errors import DataError
from training.quality.expert_use import ExpertUse
from training.quality.scoring import Score, encode_pairs, padded_tokens, score

Kind = Literal["cloze", "choice"]

# Which field tells what a line is. A line with two of them is ambiguous and refused.
_MARKS: Final = ("text", "target", "choices")
_FORMS: Final = 'must have "text", or "context" and "target", or "question", "choices" and "answer"'
_MAX_EXPONENT: Final = 700.0  # exp of more does not fit a float


@dataclass(frozen=True)
class Example:
    """One example.

    Attributes:
        line: its line in the file, from 1.
        context: the text that comes before.
        continuations: the texts that may follow, with their delimiters; one if cloze.
        lengths: UTF-8 bytes of each continuation as the file has it.
        answer: index of the right continuation.
    """

    line: int
    context: str
    continuations: tuple[str, ...]
    lengths: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Task:
    """A task file.

    Attributes:
        name: the file's name without its suffix.
        path: the file.
        sha256: of its bytes, hex.
        kind: cloze or choice; a file holds one kind.
        examples: the examples to run, in the file's order.
        available: how many the file has.
    """

    name: str
    path: Path
    sha256: str
    kind: Kind
    examples: tuple[Example, ...]
    available: int

    @property
    def chance(self) -> float | None:
        """Accuracy of guessing among the choices; None if cloze."""
        if self.kind == "cloze":
            return None
        return sum(1 / len(e.continuations) for e in self.examples) / len(self.examples)


@dataclass(frozen=True)
class Measure:
    """One number about a task, with its standard error where that is defined."""

    name: str
    value: float
    stderr: float | None = None


@dataclass(frozen=True)
class TaskResult:
    """One policy's result on one task.

    Attributes:
        measures: acc and perplexity if cloze, acc and acc_norm if choice.
        activated_ratio: share of the experts that tokens used, over all layers and examples.
        coverage: share of the true activation mass inside the chosen experts; 1 if dense.
    """

    measures: tuple[Measure, ...]
    activated_ratio: float
    coverage: float


def read_task(path: Path, max_examples: int | None = None) -> Task:
    """Read and check a task file; keep its first `max_examples` examples.

    Raises:
        DataError: naming file and line, if it is missing, unreadable, empty, or has a line that is
            not an example of the file's kind.
    """
    examples: list[Example] = []
    kinds: list[Kind] = []
    for number, line in _lines(path):
        where = f"{path}:{number}"
        kind, example = _parse(line, number, where)
        kinds.append(kind)
        if kind != kinds[0]:
            raise DataError(f"{where}: is {kind}, but the file began with {kinds[0]}")
        examples.append(example)
    if not examples:
        raise DataError(f"{path}: has no examples")
    kept = tuple(examples[:max_examples])
    return Task(path.stem, path, file_sha256(path), kinds[0], kept, len(examples))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    if not path.exists():
        raise DataError(f"{path}: no such task file")
    if not path.is_file():
        raise DataError(f"{path}: is not a file")
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    line = raw.decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{path}:{number}: is not UTF-8 text ({error.reason})"
                    ) from error
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _parse(line: str, number: int, where: str) -> tuple[Kind, Example]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be an object, got {_kind_of(value)}")
    marks = [name for name in _MARKS if name in value]
    if not marks:
        raise DataError(f"{where}: {_FORMS}")
    if len(marks) > 1:
        raise DataError(
            f"{where}: has both {marks[0]!r} and {marks[1]!r}, which exclude each other"
        )
    if marks == ["choices"]:
        return "choice", _choice(value, number, where)
    return "cloze", _cloze(value, number, where)


def _cloze(value: dict[str, Any], number: int, where: str) -> Example:
    if "text" in value:
        for name in ("context", "question", "delimiter"):
            if name in value:
                raise DataError(f"{where}: has both 'text' and {name!r}, which exclude each other")
        text = _string(value, "text", where).rstrip()
        target = text.split()[-1]
        # The white space before the last word is its delimiter and stays with it.
        context, delimiter = text[: len(text) - len(target)], ""
        if not context.strip():
            raise DataError(f"{where}: text must have at least two words")
    else:
        context = _string(value, "context", where, blank=True)
        target = _string(value, "target", where)
        delimiter = _delimiter(value, context, target, where)
    return Example(number, context, (delimiter + target,), (len(target.encode()),), 0)


def _choice(value: dict[str, Any], number: int, where: str) -> Example:
    names = [name for name in ("question", "context") if name in value]
    if len(names) != 1:
        raise DataError(f'{where}: must have either "question" or "context"')
    context = _string(value, names[0], where, blank=True)
    choices = value["choices"]
    if not isinstance(choices, list) or len(choices) < 2:
        got = len(choices) if isinstance(choices, list) else _kind_of(choices)
        raise DataError(f"{where}: choices must be a list of at least 2 strings, got {got}")
    numbered = {f"choices[{i}]": choice for i, choice in enumerate(choices)}
    texts = [_string(numbered, name, where) for name in numbered]
    answer = value.get("answer")
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise DataError(f"{where}: answer must be an integer, got {_kind_of(answer)}")
    if not 0 <= answer < len(texts):
        raise DataError(f"{where}: answer must be from 0 to {len(texts) - 1}, got {_shown(answer)}")
    continuations = tuple(_delimiter(value, context, text, where) + text for text in texts)
    return Example(number, context, continuations, tuple(len(t.encode()) for t in texts), answer)


def _delimiter(value: dict[str, Any], context: str, continuation: str, where: str) -> str:
    """The text between context and continuation: the line's own, or one space if it has none."""
    if "delimiter" in value:
        return _string(value, "delimiter", where, blank=True)
    apart = not context or context[-1].isspace() or continuation[0].isspace()
    return "" if apart else " "


def _string(value: dict[str, Any], name: str, where: str, *, blank: bool = False) -> str:
    """The string field `name`; blank ones are refused unless `blank`."""
    if name not in value:
        raise DataError(f'{where}: needs a field "{name}"')
    text = value[name]
    if not isinstance(text, str):
        raise DataError(f"{where}: {name} must be a string, got {_kind_of(text)}")
    if not blank and not text.strip():
        raise DataError(f"{where}: {name} must not be blank")
    if not is_unicode(text):
        raise DataError(f"{where}: {name} has half of a surrogate pair, which is no text")
    return text


def _kind_of(value: object) -> str:
    """A JSON value's type, as its file's author calls it."""
    names: dict[type, str] = {
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "nothing")


def _shown(number: int) -> str:
    return str(number) if abs(number) < 1 << 63 else "a huge number"


class EncodedTask:
    """A task in one model's tokens, ready to run under any policy.

    Attributes:
        task: the task that it encodes.
        truncated: examples whose context lost its oldest tokens to fit the model.
        work: tokens that one run takes, padding included.

    Raises:
        DataError: naming file and line, if a continuation does not fit the model by itself.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer, max_inputs: int) -> None:
        pairs = [(e.context, text) for e in task.examples for text in e.continuations]
        owners = [e for e in task.examples for _ in e.continuations]
        encoded = encode_pairs(tokenizer, pairs)
        for example, continuation in zip(owners, encoded, strict=True):
            if not 1 <= continuation.targets <= max_inputs:
                raise DataError(
                    f"{task.path}:{example.line}: a target or choice must have from 1 to "
                    f"{max_inputs} tokens, got {continuation.targets}"
                )
        self.task = task
        self._continuations = [c.fitted(max_inputs) for c in encoded]
        pairs_cut = zip(owners, encoded, self._continuations, strict=True)
        self.truncated = len({e.line for e, c, fitted in pairs_cut if fitted != c})
        self.work = padded_tokens(self._continuations)

    def run(
        self,
        model: Decoder,
        policy: ExpertPolicy,
        advance: Callable[[int], None] = lambda _tokens: None,
    ) -> TaskResult:
        """Score every example under `policy`; `advance` gets each batch's number of tokens."""
        use = ExpertUse()
        scores = score(model, self._continuations, policy, use, advance)
        groups: list[list[Score]] = []
        first = 0
        for example in self.task.examples:
            groups.append(scores[first : first + len(example.continuations)])
            first += len(example.continuations)
        measure = _cloze_measures if self.task.kind == "cloze" else _choice_measures
        return TaskResult(measure(self.task.examples, groups), use.activated_ratio, use.coverage)


def _cloze_measures(
    _examples: Sequence[Example], groups: Sequence[Sequence[Score]]
) -> tuple[Measure, ...]:
    loss = -sum(group[0].loglikelihood for group in groups) / len(groups)
    return (
        _accuracy("acc", [group[0].greedy for group in groups]),
        Measure("perplexity", math.exp(min(loss, _MAX_EXPONENT))),
    )


def _choice_measures(
    examples: Sequence[Example], groups: Sequence[Sequence[Score]]
) -> tuple[Measure, ...]:
    plain, normalised = [], []
    for example, group in zip(examples, groups, strict=True):
        likelihoods = [s.loglikelihood for s in group]
        per_byte = [x / n for x, n in zip(likelihoods, example.lengths, strict=True)]
        plain.append(likelihoods.index(max(likelihoods)) == example.answer)
        normalised.append(per_byte.index(max(per_byte)) == example.answer)
    return _accuracy("acc", plain), _accuracy("acc_norm", normalised)


def _accuracy(name: str, right: Sequence[bool]) -> Measure:
    """Share of right answers and its standard error, sample deviation / sqrt(n)."""
    n = len(right)
    share = sum(right) / n
    return Measure(name, share, math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None)
