"""The whole evaluation: which policies run on what, the table, the JSON, and the packaged model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import STARTER, Checkpoint, load
from engine.errors import ConfigError, InvalidRequest
from training.errors import DataError, TrainingError
from training.quality.suite import Suite, prepare

CLOZE = [{"text": "the cat sat on"}, {"context": "the dog", "target": "ran"}]
CHOICE = [{"question": "the cat sat on", "choices": ["the mat", "tree"], "answer": 0}] * 3


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def cloze(tmp_path: Path) -> Path:
    return write(tmp_path / "cloze.jsonl", CLOZE)


@pytest.fixture
def choice(tmp_path: Path) -> Path:
    return write(tmp_path / "choice.jsonl", CHOICE)


def policies(suite: Suite) -> list[str]:
    return [str(policy) for policy in suite.policies]


def test_by_default_dense_and_each_share_run_and_oracles_on_text_alone(
    tiny: Checkpoint, corpus: Path, cloze: Path
) -> None:
    suite = prepare(tiny, [corpus], [cloze], [], 128, None)
    routed = ["dense", "top_k:1", "top_k:2", "top_k:4"]
    assert policies(suite) == [*routed, "oracle:1", "oracle:2", "oracle:4"]
    for row in suite.run().rows:
        assert row.text is not None
        assert (row.tasks[0] is None) == (row.policy.kind == "oracle")
    assert policies(prepare(tiny, [], [cloze], [], 128, None)) == routed


def test_policies_asked_for_run_on_everything_once_each(
    tiny: Checkpoint, corpus: Path, cloze: Path
) -> None:
    config = dataclasses.replace(
        tiny.config, experts=dataclasses.replace(tiny.config.experts, default_policy="top_k:4")
    )
    checkpoint = dataclasses.replace(tiny, config=config)
    asked = ["auto", "oracle:2", "mass:0.9", "top_k:4"]
    suite = prepare(checkpoint, [corpus], [cloze], asked, 128, None)
    assert policies(suite) == ["top_k:4", "oracle:2", "mass:0.9"]
    result = suite.run()
    assert all(row.tasks[0] is not None for row in result.rows)
    assert [cells[2] for cells in result.cells()] == ["-"] * 3  # nothing to compare with
    assert result.to_dict("1")["results"][0]["text"]["relative_to_dense"] is None


def test_the_table_is_the_results(
    tiny: Checkpoint, corpus: Path, cloze: Path, choice: Path
) -> None:
    result = prepare(tiny, [corpus], [cloze, choice], ["dense", "top_k:2"], 100, None).run()
    assert result.header() == [
        *["policy", "perplexity", "against dense", "experts", "coverage"],
        *["cloze\nacc", "cloze\nperplexity", "choice\nacc", "choice\nacc_norm"],
    ]
    report = result.to_dict("1.2.3")
    for cells, entry in zip(result.cells(), report["results"], strict=True):
        text, quiz = entry["text"], entry["tasks"]["choice"]
        assert cells[0] == entry["policy"]
        assert cells[1] == f"{text['perplexity']:.3f}"
        assert cells[2] == f"{text['relative_to_dense']:+.2%}"
        assert cells[3] == f"{text['activated_ratio']:.1%}"
        assert cells[4] == f"{text['coverage']:.1%}"
        assert cells[6] == f"{entry['tasks']['cloze']['perplexity']:,.2f}"
        assert cells[7] == f"{quiz['acc']:.1%} ±{100 * quiz['acc_stderr']:.1f}"
        assert cells[8] == f"{quiz['acc_norm']:.1%} ±{100 * quiz['acc_norm_stderr']:.1f}"
    assert result.cells()[1][3] == "25.0%"


def test_without_text_the_table_shows_the_experts_that_tasks_used(
    tiny: Checkpoint, cloze: Path
) -> None:
    result = prepare(tiny, [], [cloze], ["top_k:2"], 100, None).run()
    assert result.header() == ["policy", "experts", "coverage", "cloze\nacc", "cloze\nperplexity"]
    assert result.cells()[0][1] == "25.0%"
    assert result.to_dict("1")["text"] is None


def test_json_says_what_was_evaluated(
    tiny: Checkpoint, corpus: Path, cloze: Path, choice: Path
) -> None:
    suite = prepare(tiny, [corpus / "001.txt"], [cloze, choice], ["dense"], 100, 2)
    report = suite.run().to_dict("1.2.3")
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["model"]["fingerprint"] == tiny.fingerprint
    assert report["versions"]["ambidex"] == "1.2.3"
    text = report["text"]
    assert (text["tokens"], text["sequences"], text["sequence_length"]) == (64, 1, 64)
    digest = hashlib.sha256((corpus / "001.txt").read_bytes()).hexdigest()
    assert text["sources"] == [{"path": str(corpus / "001.txt"), "sha256": digest}]
    first, second = report["tasks"]
    assert first["sha256"] == hashlib.sha256(cloze.read_bytes()).hexdigest()
    assert (first["kind"], first["examples"], first["available_examples"]) == ("cloze", 2, 2)
    assert (second["kind"], second["examples"], second["available_examples"]) == ("choice", 2, 3)
    assert (first["chance"], second["chance"]) == (None, 0.5)


def test_notes_say_how_much_ran(tiny: Checkpoint, corpus: Path, tmp_path: Path) -> None:
    long = write(tmp_path / "long.jsonl", [{**CHOICE[0], "question": "the cat " * 90}, *CHOICE])
    result = prepare(tiny, [corpus], [long], ["dense"], 200, 3).run()
    text, task = result.notes()
    assert text.startswith("text: 192 tokens evaluated of ")
    assert text.endswith(", 3 x 64")
    assert task == (
        "long: 3 examples of 4, chance 50.0%, 1 with the start of the context cut off to fit"
    )


def test_progress_adds_up_to_the_work(
    tiny: Checkpoint, corpus: Path, cloze: Path, choice: Path
) -> None:
    suite = prepare(tiny, [corpus], [cloze, choice], [], 600, None)
    done: dict[str, int] = {}

    def advance(policy: str, tokens: int) -> None:
        done[policy] = done.get(policy, 0) + tokens

    suite.run(advance)
    assert list(done) == policies(suite)
    assert sum(done.values()) == suite.work
    assert done["oracle:1"] == 576 < done["dense"]


def test_tasks_of_one_name_go_by_their_paths(tiny: Checkpoint, tmp_path: Path) -> None:
    paths = [write(tmp_path / folder / "quiz.jsonl", CHOICE) for folder in ("a", "b")]
    result = prepare(tiny, [], paths, ["dense"], 100, None).run()
    assert list(result.to_dict("1")["results"][0]["tasks"]) == [str(path) for path in paths]
    with pytest.raises(DataError, match=r"quiz\.jsonl: was given twice"):
        prepare(tiny, [], [paths[0], tmp_path / "b" / ".." / "a" / "quiz.jsonl"], [], 100, None)


def test_policies_that_do_not_fit_are_refused(tiny: Checkpoint, cloze: Path) -> None:
    with pytest.raises(ConfigError, match="mass:SHARE or oracle:N; got 'half'"):
        prepare(tiny, [], [cloze], ["half"], 100, None)
    with pytest.raises(InvalidRequest, match=r"top_k must be between 1 and 8, got 9"):
        prepare(tiny, [], [cloze], ["top_k:9"], 100, None)


def test_broken_weights_give_no_perplexity(tiny: Checkpoint, corpus: Path) -> None:
    suite = prepare(tiny, [corpus], [], ["dense"], 100, None)
    tiny.model.norm.weight[0] = float("nan")
    with pytest.raises(TrainingError, match="under dense are not finite"):
        suite.run()


def test_the_packaged_model_is_the_same_dense_and_with_all_experts_and_can_repeat(
    tmp_path: Path,
) -> None:
    words = ["self", "name", "value", "path", "data", "args", "result", "index"]
    repeated = [
        {"context": f"    return {word}\n" * 6 + "    return", "target": word} for word in words
    ]
    picked = [
        {"question": f"{word}, " * 6, "choices": words, "answer": i} for i, word in enumerate(words)
    ]
    tasks = [write(tmp_path / "repeat.jsonl", repeated), write(tmp_path / "pick.jsonl", picked)]
    code = tmp_path / "code.py"
    code.write_text("def f(x):\n    return [y for y in x if y]\n" * 100)
    starter = load(STARTER, dtype="float32")
    suite = prepare(starter, [code], tasks, ["dense", "top_k:64"], 600, None)
    result = suite.run()
    dense, everything = result.cells()
    assert [dense[0], everything[0]] == ["dense", "top_k:64"]
    assert dense[1:] == everything[1:]
    assert dense[2:5] == ["+0.00%", "100.0%", "100.0%"]
    scores = result.to_dict("1")["results"][0]["tasks"]
    # Seven or eight of eight when this was written; guessing a token would get none.
    assert scores["repeat"]["acc"] >= 0.5
    assert scores["pick"]["acc"] >= 0.75
