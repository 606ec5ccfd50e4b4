"""The command: each subcommand explains itself, works on the starter, refuses in a sentence."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest
import rich.console

import ambidex as command_line


@dataclass
class Result:
    """What a user would see."""

    returncode: int | str | None
    stdout: str
    stderr: str


class Command(Protocol):
    def __call__(self, *arguments: str, stdin: str = "") -> Result: ...


@pytest.fixture
def ambidex(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command in this process, which has torch imported already."""

    def run(*arguments: str, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "argv", ["ambidex", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setattr(command_line, "err", rich.console.Console(stderr=True))
        code: int | str | None = 0
        try:
            command_line.main()
        except SystemExit as exit_:
            code = exit_.code
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def flat(text: str) -> str:
    """Without the line breaks and frames that rich put in."""
    return " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["train"],
        ["prepare"],
        ["serve"],
        ["generate"],
        ["eval"],
        ["inspect"],
        ["bench"],
        ["bench", "ffn"],
    ],
    ids=lambda command: " ".join(command) or "ambidex",
)
def test_help_explains(command: list[str], ambidex: Command) -> None:
    result = ambidex(*command, "--help")
    assert result.returncode == 0
    assert "Usage" in result.stdout
    assert len(result.stdout) > 300


def test_generate_continues_a_text_and_says_what_it_activated(ambidex: Command) -> None:
    result = ambidex("generate", "-", "--experts", "top_k:8", stdin="import os\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("import os\n")
    assert len(result.stdout) > len("import os\n") + 20
    assert "12.5% of the experts activated" in flat(result.stderr)


def test_inspect_verifies_and_shows_the_quality_by_share(ambidex: Command) -> None:
    result = ambidex("inspect")
    assert result.returncode == 0, result.stderr
    assert "64 of 16 neurons" in result.stdout
    assert "25.00%" in result.stdout


def test_eval_measures_a_text(tmp_path: Path, ambidex: Command) -> None:
    text, results = tmp_path / "a.py", tmp_path / "results.json"
    text.write_text("def f(x):\n    return [y for y in x if y]\n" * 200)
    result = ambidex("eval", "--data", str(text), "--max-tokens", "600", "--json", str(results))
    assert result.returncode == 0, result.stderr
    assert "oracle:16" in result.stdout
    scores = json.loads(results.read_text())
    assert set(scores["routed"]) == {"4", "8", "16", "32"}
    assert 1 < scores["dense"]["perplexity"] < 4096


def test_text_is_prepared_once_and_trained_on(tmp_path: Path, ambidex: Command) -> None:
    text, tokens = tmp_path / "a.txt", tmp_path / "tokens"
    text.write_text("<|endoftext|>".join(f"{n} {n * 7919 % 1009}\n" * 40 for n in range(400)))
    result = ambidex("prepare", "--data", str(text), "--out", str(tokens), "--vocab-size", "512")
    assert result.returncode == 0, result.stderr
    assert "held out, vocabulary of 512" in flat(result.stdout)
    arguments = ["--preset", "smoke", "--steps", "2", "--out", str(tmp_path / "run")]
    result = ambidex("train", "--data", str(tokens), *arguments)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "run/checkpoint/training_report.json").read_text())
    assert report["corpus"]["description"] == str(text)
    again = ["--out", str(tmp_path / "again"), "--tokenizer", str(tmp_path / "run/checkpoint")]
    result = ambidex(
        "prepare", "--data", str(text), "--valid", str(text.with_name("v.txt")), *again
    )
    assert "v.txt: no such file or folder" in flat(result.stderr)
    text.with_name("v.txt").write_text("77 78 79")
    result = ambidex(
        "prepare", "--data", str(text), "--valid", str(text.with_name("v.txt")), *again
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "again/tokenizer.json").read_text() == (
        tokens / "tokenizer.json"
    ).read_text()


REFUSED = [
    (["train", "--preset", "huge"], "--preset must be one of starter, smoke; got 'huge'"),
    (["train", "--steps", "0", "--out", "{tmp}/r"], "steps must be between 1 and"),
    (["train", "--data", "{tmp}/none", "--out", "{tmp}/r"], "no such file or folder"),
    (["train", "--valid", "{tmp}/none", "--out", "{tmp}/r"], "none: no such file or folder"),
    (["prepare", "--out", "{tmp}/t"], "give either --vocab-size, to learn a tokenizer, or"),
    (
        ["prepare", "--out", "{tmp}/t", "--data", "{tmp}/none", "--vocab-size", "300"],
        "none: no such file or folder",
    ),
    (["prepare", "--out", "{tmp}/t", "--vocab-size", "9"], "must be at least 257"),
    (
        ["prepare", "--out", "{tmp}/t", "--vocab-size", "300", "--valid-share", "0.6"],
        "valid_share must be between 0.001 and 0.5",
    ),
    (["prepare", "--out", "{tmp}", "--vocab-size", "300"], "is there already"),
    (["prepare", "--out", "{tmp}/t", "--tokenizer", "{tmp}/f"], "f: not a readable tokenizer"),
    (["generate", "x", "--experts", "all"], "experts must be dense, auto, top_k:N or mass:SHARE"),
    (["generate", "x", "--experts", "top_k:65"], "experts.top_k must be between 1 and 64, got 65"),
    (["generate", "x", "--experts", "oracle:3"], "oracle is for evaluation only"),
    (["generate", "x", "--max-new-tokens", "0"], "max_new_tokens must be from 1 to"),
    (["generate", ""], "inputs must have at least 1 token"),
    (["generate", "x", "--device", "tpu"], "device must be one of cpu, cuda; got 'tpu'"),
    (["generate", "x", "--dtype", "float16"], "float16 needs device cuda"),
    (["generate", "x", "--experts", "top_k:" + "9" * 400], "experts.top_k must be between 1 and"),
    (["train", "--device", "tpu", "--out", "{tmp}/r"], "device must be one of cpu, cuda"),
    (["train", "--data", "{tmp}/f", "--out", "{tmp}/f"], "unknown kind of file"),
    (["generate", "x", "--model", "{tmp}"], "manifest.json: missing"),
    (["inspect", "--model", "{tmp}/none"], "no such checkpoint directory"),
    (["serve", "--port", "99999"], "port: Input should be less than or equal to 65535"),
    (["serve", "--model", "{tmp}"], "manifest.json: missing"),
    (["eval", "--data", "{tmp}"], "no text found"),
    (["eval", "--json", "{tmp}/no/where.json"], "--json"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED, ids=lambda value: str(value)[:40])
def test_bad_input_gets_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, ambidex: Command
) -> None:
    (tmp_path / "f").write_text("a file of no known kind")
    result = ambidex(*(a.replace("{tmp}", str(tmp_path)) for a in arguments))
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert sentence in flat(result.stderr)


def test_the_installed_command_needs_no_torch_to_explain_itself() -> None:
    code = "import sys, ambidex; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
