"""Task files: what a line means, what is refused, and the measures against plain arithmetic."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import Checkpoint
from engine.policy import ExpertPolicy
from tests.models import WORDS
from training.errors import DataError
from training.quality.tasks import EncodedTask, TaskResult, read_task

CHOICE = {"question": "the cat sat on", "choices": ["the mat", "tree"], "answer": 0}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def values(result: TaskResult) -> dict[str, float]:
    return {measure.name: measure.value for measure in result.measures}


@pytest.mark.parametrize(
    ("line", "context", "continuation"),
    [
        ({"text": "the cat sat on"}, "the cat sat ", "on"),
        ({"text": "the  cat\n\non \n"}, "the  cat\n\n", "on"),
        ({"text": "the cat sat, on."}, "the cat sat, ", "on."),
        ({"context": "the cat", "target": "sat on"}, "the cat", " sat on"),
        ({"context": "the cat ", "target": "sat"}, "the cat ", "sat"),
        ({"context": "the cat", "target": "\nsat"}, "the cat", "\nsat"),
        ({"context": "", "target": "sat"}, "", "sat"),
        ({"context": "f(", "target": "x)", "delimiter": ""}, "f(", "x)"),
        ({"context": "f(", "target": "x)", "delimiter": "\n\n", "id": 7}, "f(", "\n\nx)"),
    ],
)
def test_a_cloze_line(
    line: dict[str, Any], context: str, continuation: str, tmp_path: Path
) -> None:
    (example,) = read_task(write(tmp_path / "a.jsonl", line)).examples
    assert (example.context, example.continuations) == (context, (continuation,))


def test_a_choice_line_counts_bytes_of_the_choice_alone(tmp_path: Path) -> None:
    line = {"question": "wie?", "choices": ["größer", " so", "東京"], "answer": 2, "source": "x"}
    task = read_task(write(tmp_path / "quiz.jsonl", line, CHOICE))
    first, second = task.examples
    assert first.continuations == (" größer", " so", " 東京")
    assert first.lengths == (8, 3, 6)
    assert (first.answer, first.line, second.line) == (2, 1, 2)
    assert (task.name, task.kind) == ("quiz", "choice")
    assert task.chance == pytest.approx((1 / 3 + 1 / 2) / 2)
    same = {**CHOICE, "context": CHOICE["question"]}
    del same["question"]
    (other,) = read_task(write(tmp_path / "same.jsonl", same)).examples
    assert other.continuations == second.continuations


def test_blank_lines_marks_and_line_ends_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": "the\u2028cat sat"}, ensure_ascii=False).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line)
    task = read_task(path)
    assert [example.line for example in task.examples] == [1, 4]
    assert task.examples[0].context == "the\u2028cat "
    assert task.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_first_examples_are_kept_and_all_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[{"text": f"the cat {i}"} for i in range(5)])
    task = read_task(path, 2)
    assert [e.continuations for e in task.examples] == [("0",), ("1",)]
    assert task.available == 5
    with path.open("a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match=r"a\.jsonl:6: must have"):
        read_task(path, 2)


REFUSED = [
    ("{", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ('{"text": "a b", "n": ' + "9" * 5000 + "}", "is not JSON"),
    ("[1]", "must be an object, got a list"),
    ('"a b"', "must be an object, got a string"),
    ("{}", 'must have "text", or "context" and "target", or "question", "choices" and "answer"'),
    ('{"context": "a"}', 'must have "text", or'),
    ('{"text": 3}', "text must be a string, got a number"),
    ('{"text": null}', "text must be a string, got nothing"),
    ('{"text": " "}', "text must not be blank"),
    ('{"text": " word "}', "text must have at least two words"),
    ('{"text": "a b", "target": "c"}', "has both 'text' and 'target'"),
    ('{"text": "a b", "context": "c"}', "has both 'text' and 'context'"),
    ('{"text": "a b", "delimiter": ""}', "has both 'text' and 'delimiter'"),
    ('{"text": "a \\ud800"}', "text has half of a surrogate pair"),
    ('{"target": "a"}', 'needs a field "context"'),
    ('{"context": "a", "target": ""}', "target must not be blank"),
    ('{"context": ["a"], "target": "b"}', "context must be a string, got a list"),
    ('{"context": "a", "target": "b", "delimiter": 1}', "delimiter must be a string"),
    ('{"choices": ["a", "b"], "answer": 0}', 'must have either "question" or "context"'),
    (
        '{"question": "q", "context": "c", "choices": ["a", "b"], "answer": 0}',
        'must have either "question" or "context"',
    ),
    ('{"question": "q", "choices": ["a"], "answer": 0}', "at least 2 strings, got 1"),
    ('{"question": "q", "choices": "ab", "answer": 0}', "at least 2 strings, got a string"),
    ('{"question": "q", "choices": ["a", 2], "answer": 0}', "choices[1] must be a string"),
    ('{"question": "q", "choices": ["a", " "], "answer": 0}', "choices[1] must not be blank"),
    ('{"question": "q", "choices": ["a", "b"]}', "answer must be an integer, got nothing"),
    ('{"question": "q", "choices": ["a", "b"], "answer": "0"}', "an integer, got a string"),
    ('{"question": "q", "choices": ["a", "b"], "answer": true}', "an integer, got a boolean"),
    ('{"question": "q", "choices": ["a", "b"], "answer": 1.0}', "an integer, got a number"),
    ('{"question": "q", "choices": ["a", "b"], "answer": 2}', "answer must be from 0 to 1, got 2"),
    ('{"question": "q", "choices": ["a", "b"], "answer": -1}', "from 0 to 1, got -1"),
    (
        '{"question": "q", "choices": ["a", "b"], "answer": ' + "9" * 4000 + "}",
        "from 0 to 1, got a huge number",
    ),
    (json.dumps(CHOICE), "is choice, but the file began with cloze"),
]


@pytest.mark.parametrize(("line", "sentence"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_bad_line_is_named(line: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "the cat"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_task(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 150


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    binary, empty = tmp_path / "binary.jsonl", tmp_path / "empty.jsonl"
    binary.write_bytes(b'{"text": "the cat"}\n\x80\xff\x00')
    empty.write_bytes(b"\n")
    with pytest.raises(DataError, match=r"binary\.jsonl:2: is not UTF-8 text"):
        read_task(binary)
    with pytest.raises(DataError, match=r"empty\.jsonl: has no examples"):
        read_task(empty)
    with pytest.raises(DataError, match=r"none\.jsonl: no such task file"):
        read_task(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is not a file"):
        read_task(tmp_path)


def loglikelihood(tiny: Checkpoint, policy: ExpertPolicy, context: str, rest: str) -> float:
    """The reference: whole sequence, all logits, a loop; valid where no token spans the cut."""
    before = tiny.tokenizer.encode(context)
    ids = tiny.tokenizer.encode(context + rest)
    assert ids[: len(before)] == before
    logprobs_LV = tiny.model.logits(torch.tensor([ids[:-1]]), policy)[0].double().log_softmax(-1)
    return sum(float(logprobs_LV[i - 1, ids[i]]) for i in range(len(before), len(ids)))


@pytest.mark.parametrize("policy", ["dense", "top_k:3"])
def test_choice_measures_are_plain_arithmetic(
    policy: str, tiny: Checkpoint, tmp_path: Path
) -> None:
    chosen = ExpertPolicy.parse(policy)
    choices = ["on", "the mat and the log", "größer", "cat under"]
    lines = [
        {"question": f"the {word} then ran", "choices": choices, "answer": i % 4}
        for i, word in enumerate(WORDS)
    ]
    task = read_task(write(tmp_path / "a.jsonl", *lines))
    result = EncodedTask(task, tiny.tokenizer, 64).run(tiny.model, chosen)
    right: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for line in lines:
        scores = [
            loglikelihood(tiny, chosen, str(line["question"]), f" {choice}") for choice in choices
        ]
        lengths = [len(choice.encode()) for choice in choices]
        best = max(range(4), key=lambda i: scores[i])
        best_norm = max(range(4), key=lambda i: scores[i] / lengths[i])
        right["acc"].append(float(best == line["answer"]))
        right["acc_norm"].append(float(best_norm == line["answer"]))
    assert right["acc"] != right["acc_norm"]
    for measure in result.measures:
        assert 0 < measure.value < 1
        assert measure.value == pytest.approx(statistics.mean(right[measure.name]))
        deviation = statistics.stdev(right[measure.name])
        assert measure.stderr == pytest.approx(deviation / math.sqrt(len(lines)))
    assert [measure.name for measure in result.measures] == ["acc", "acc_norm"]


def likeliest_text(tiny: Checkpoint, policy: ExpertPolicy) -> tuple[str, str]:
    """A context whose likeliest next token is text of its own: the token that greedy gets right."""
    for context in (f"the {first} {second}" for first in WORDS for second in WORDS):
        ids = tiny.tokenizer.encode(context)
        ids.append(int(tiny.model.logits(torch.tensor([ids]), policy)[0, -1].argmax()))
        text = tiny.tokenizer.decode(ids)
        if tiny.tokenizer.encode(text) == ids and text[len(context) :].strip():
            return context, text[len(context) :]
    raise AssertionError("no context found: choose another seed for the tiny model")


def test_cloze_measures_are_plain_arithmetic(tiny: Checkpoint, tmp_path: Path) -> None:
    policy = ExpertPolicy.top_k(3)
    contexts = ["the cat sat", "the dog ran under", "tree", "then the log and the mat"]
    lines = [{"context": context, "target": "on the mat"} for context in contexts]
    context, target = likeliest_text(tiny, policy)
    lines.append({"context": context, "target": target, "delimiter": ""})
    task = read_task(write(tmp_path / "a.jsonl", *lines))
    result = EncodedTask(task, tiny.tokenizer, 64).run(tiny.model, policy)
    losses = [-loglikelihood(tiny, policy, c, " on the mat") for c in contexts]
    losses.append(-loglikelihood(tiny, policy, context, target))
    assert values(result)["acc"] == pytest.approx(0.2)
    assert values(result)["perplexity"] == pytest.approx(
        math.exp(statistics.mean(losses)), rel=1e-3
    )


def test_one_example_has_no_standard_error(tiny: Checkpoint, tmp_path: Path) -> None:
    task = read_task(write(tmp_path / "a.jsonl", CHOICE))
    result = EncodedTask(task, tiny.tokenizer, 64).run(tiny.model, ExpertPolicy.dense())
    assert [measure.stderr for measure in result.measures] == [None, None]


def test_long_contexts_lose_their_start_and_are_counted(tiny: Checkpoint, tmp_path: Path) -> None:
    tail = "the dog ran under the tree and sat on"
    long = {**CHOICE, "question": "the cat sat " * 60 + tail}
    task = read_task(write(tmp_path / "a.jsonl", CHOICE, long, CHOICE))
    encoded = EncodedTask(task, tiny.tokenizer, 12)
    assert encoded.truncated == 1
    assert EncodedTask(task, tiny.tokenizer, 64).truncated == 1
    assert EncodedTask(task, tiny.tokenizer, 10_000).truncated == 0
    # Only the last tokens count: another start makes no difference.
    other = read_task(
        write(tmp_path / "b.jsonl", CHOICE, {**long, "question": "x " + tail}, CHOICE)
    )
    policy = ExpertPolicy.top_k(3)
    first = encoded.run(tiny.model, policy)
    second = EncodedTask(other, tiny.tokenizer, 12).run(tiny.model, policy)
    assert first == second


def test_a_target_that_cannot_fit_is_named(tiny: Checkpoint, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", CHOICE, {**CHOICE, "choices": ["on", "the cat " * 40]})
    with pytest.raises(DataError, match=r"a\.jsonl:2: .* from 1 to 64 tokens, got \d+"):
        EncodedTask(read_task(path), tiny.tokenizer, 64)
