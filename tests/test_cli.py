"""The command: each subcommand explains itself, works on the starter, refuses in a sentence."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

import ambidex as command_line
from engine import console


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


BENCHMARKS = ("ffn", "train", "decode", "prefill", "serve", "start")


@pytest.mark.parametrize(
    "command",
    [[], *([name] for name in command_line.COMMANDS), *(["bench", name] for name in BENCHMARKS)],
    ids=lambda command: " ".join(command) or "ambidex",
)
def test_help_explains(command: list[str], ambidex: Command) -> None:
    result = ambidex(*command, "--help")
    assert result.returncode == 0
    assert "Usage" in result.stdout
    assert len(result.stdout) > 300


def test_help_lists_every_command(ambidex: Command) -> None:
    text = ambidex("--help").stdout
    listed = [words[1] for line in text.splitlines() if len(words := line.split(" ")) > 2]
    assert [name for name in listed if name in command_line.COMMANDS] == [*command_line.COMMANDS]
    text = ambidex("bench", "--help").stdout
    assert all(f"│ {name} " in text for name in BENCHMARKS)
    assert "No such command 'nonsense'" in ambidex("nonsense").stderr


# Runs the command as a process of its own does, and ends with the modules that it has imported.
MODULES = """
import sys
import ambidex
try:
    ambidex.main()
except SystemExit as end:
    assert end.code == 0, end.code
print(" ".join(sys.modules))
"""
HEAVY = {"torch", "numpy", "safetensors", "tokenizers", "fastapi", "uvicorn", "jinja2"}


@pytest.mark.parametrize(
    ("command", "absent"),
    [
        ("", HEAVY),
        ("train", HEAVY | {"server", "benchmarks"}),
        ("generate", HEAVY | {"server", "training", "benchmarks"}),
        ("serve", {"training", "benchmarks"}),
        ("bench decode", HEAVY | {"server", "training"}),
    ],
)
def test_a_command_imports_its_own_package_alone(command: str, absent: set[str]) -> None:
    arguments = [sys.executable, "-c", MODULES, *command.split(), "--help"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    imported = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert "engine" in imported
    assert not imported & absent


def test_every_setting_of_the_server_is_an_option_in_one_group(ambidex: Command) -> None:
    from server.process.options import ENVIRONMENT_ONLY
    from server.settings import GROUPS, Settings

    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(Settings.model_fields)
    text = ambidex("serve", "--help").stdout
    for group in GROUPS:
        assert group in text
    for name in grouped:
        assert (f"--{name.replace('_', '-')} " in text) == (name not in ENVIRONMENT_ONLY), name


def test_options_of_serve_become_settings(
    ambidex: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server.settings import Settings

    served: list[Settings] = []
    monkeypatch.setattr("server.process.serve.serve", served.append)
    monkeypatch.setenv("AMBIDEX_PORT", "9000")
    monkeypatch.setenv("AMBIDEX_MAX_WAITING", "7")
    options = ["--port", "9001", "--no-prefix-caching", "--watch", "runs", "--request-timeout", "5"]
    assert ambidex("serve", *options).returncode == 0
    (settings,) = served
    assert (settings.port, settings.max_waiting) == (9001, 7)
    assert settings.prefix_caching is False
    assert settings.watch == Path("runs")
    assert settings.request_timeout == 5.0


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


def test_inspect_studies_activations_and_compares_checkpoints(
    tmp_path: Path, ambidex: Command
) -> None:
    text, results = tmp_path / "a.py", tmp_path / "study.json"
    text.write_text("".join(f"def f{i}(x):\n    return [x * {i}]\n" for i in range(300)))
    against = str(Path(command_line.__file__).parent / "engine" / "starter")
    options = ["--data", str(text), "--top-k", "8", "--against", against, "--json", str(results)]
    result = ambidex("inspect", "--activations", *options)
    assert result.returncode == 0, result.stderr
    assert "routing to 8 of 64" in result.stdout
    assert "cohesion" in result.stdout
    record = json.loads(results.read_text())
    layers = record["study"]["layers"]
    assert (record["study"]["top_k"], len(layers)) == (8, 4)
    assert all(0.5 < layer["coverage"] <= layer["oracle"] for layer in layers)
    assert all(layer["within"] > layer["between"] for layer in layers)
    assert all(layer["similarity"] == layer["adjusted_rand"] == 1 for layer in record["against"])


def test_report_draws_a_run(tmp_path: Path, ambidex: Command) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 0, "phase": "dense", "loss": 5.5}\n')
    result = ambidex("report", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "Training loss" in (tmp_path / "report.html").read_text()


def test_eval_measures_text_and_tasks(tmp_path: Path, ambidex: Command) -> None:
    text, task, results = tmp_path / "a.py", tmp_path / "quiz.jsonl", tmp_path / "results.json"
    text.write_text("def f(x):\n    return [y for y in x if y]\n" * 200)
    line = {"question": "import os\nimport", "choices": ["sys", "yes and no"], "answer": 0}
    task.write_text(f"{json.dumps(line)}\n" * 3)
    options = ["--data", text, "--task", task, "--json", results]
    result = ambidex("eval", *map(str, options), "--max-tokens", "600", "--max-examples", "2")
    assert result.returncode == 0, result.stderr
    assert "oracle:16" in result.stdout
    assert "acc_norm" in result.stdout
    assert "text: 512 tokens evaluated of " in result.stdout
    assert "quiz: 2 examples of 3, chance 50.0%" in result.stdout
    assert result.stderr.split()[:2] == ["dense", "top_k:4"]
    scores = json.loads(results.read_text())
    by_policy = {entry["policy"]: entry for entry in scores["results"]}
    assert list(by_policy)[:5] == ["dense", "top_k:4", "top_k:8", "top_k:16", "top_k:32"]
    assert 1 < by_policy["dense"]["text"]["perplexity"] < 4096
    assert by_policy["top_k:16"]["text"]["activated_ratio"] == 0.25
    assert by_policy["oracle:16"]["tasks"]["quiz"] is None
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_eval_writes_through_a_link_and_over_a_file(tmp_path: Path, ambidex: Command) -> None:
    task, target, link = tmp_path / "t[b].jsonl", tmp_path / "target.json", tmp_path / "link.json"
    task.write_text('{"text": "import sys"}\n')
    target.write_text("old")
    link.symlink_to(target)
    for path in (link, target):
        result = ambidex("eval", "--task", str(task), "--experts", "top_k:8", "--json", str(path))
        assert result.returncode == 0, result.stderr
        assert "t[b]" in result.stdout  # not taken for markup
        assert json.loads(target.read_text())["results"][0]["policy"] == "top_k:8"
        target.write_text("old")
    assert link.is_symlink()


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


def written(path: Path, documents: int = 200) -> Path:
    path.write_text("<|endoftext|>".join(f"{n} {n * 7919 % 1009}\n" * 40 for n in range(documents)))
    return path


def test_training_is_configured_by_a_file_and_by_settings(tmp_path: Path, ambidex: Command) -> None:
    text, file = written(tmp_path / "a.txt"), tmp_path / "run.toml"
    file.write_text(
        'preset = "smoke"\nsteps = 9\nvalidate_share = 0\n'
        '[switch]\nmode = "static"\n[optimizer]\nmin_lr_share = 0.5\n'
    )
    out = ["--data", str(text), "--out", str(tmp_path / "run")]
    settings = [
        "--set",
        "optimizer.schedule=wsd",
        "--set",
        "switch.top_k=[6, 3]",
        "--set",
        "seed=4",
    ]
    command = ["train", "--config", str(file), *settings, "--steps", "3", "--seed", "5", *out]
    result = ambidex(*command)
    assert result.returncode == 0, result.stderr
    assert "checkpoint: " in result.stdout
    report = json.loads((tmp_path / "run/checkpoint/training_report.json").read_text())
    found = report["config"]
    assert (found["preset"], found["steps"], found["seed"]) == ("smoke", 3, 5)
    assert (found["switch"]["mode"], found["switch"]["top_k"]) == ("static", [6, 3])
    assert (found["optimizer"]["schedule"], found["optimizer"]["min_lr_share"]) == ("wsd", 0.5)
    assert found["model"]["num_experts"] == 16, "the rest is the preset's"
    assert report["command"] == shlex.join(["ambidex", *command])
    file.write_text(file.read_text().replace("0.5", "0.4"))
    assert "holds a run with another configuration" in flat(ambidex(*command).stderr)


def test_a_model_is_imported_and_trained_on(tmp_path: Path, ambidex: Command) -> None:
    text, out = written(tmp_path / "a.txt"), tmp_path / "out"
    tokens = ["--calibration-tokens", "1024", "--quality-tokens", "512"]
    command = ["import", STARTER, "--out", str(out), "--calibrate", str(text), *tokens]
    command += ["--experts", "32", "--max-loss", "5%"]
    planned = ambidex(*command, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    told = flat(planned.stderr)
    for part in ("32 of 32 neurons (as asked for)", "memory about", "time about", "family ambidex"):
        assert part in told
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    result = ambidex(*command)
    assert result.returncode == 0, result.stderr
    assert "of 32" in result.stdout
    assert f"checkpoint: {out}" in result.stdout.replace("\n", "")
    assert "layer 4/4: " in flat(result.stderr)
    report = json.loads((out / "training_report.json").read_text())
    assert report["command"] == shlex.join(["ambidex", *command])
    assert report["imported"]["settings"]["max_loss"] == 0.05
    assert "32 of 32 neurons" in flat(ambidex("inspect", "--model", str(out)).stdout)
    small = ["--set", "batch_size=1", "--set", "sequence_length=32", "--set", "evaluate_tokens=64"]
    again = ["train", "--from", str(out), "--steps", "2", "--data", str(text), *small]
    result = ambidex(*again, "--out", str(tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert "going on from out: held-out perplexity" in flat(result.stdout)


STARTER = str(Path(command_line.__file__).parent / "engine" / "starter")
IMPORT = ("--out", "{tmp}/o", "--calibrate", "{tmp}/f")
REFUSED = [
    (
        ["train", "--preset", "smoke", "--config", "{tmp}/f", "--out", "{tmp}/r"],
        "give --preset or --config, not both",
    ),
    (["train", "--config", "{tmp}/f", "--out", "{tmp}/r"], "f: cannot be read as TOML (Expected"),
    (["train", "--config", "{tmp}/none", "--out", "{tmp}/r"], "none: cannot be read as TOML ("),
    (["train", "--set", "steps", "--out", "{tmp}/r"], "--set wants KEY=VALUE, got 'steps'"),
    (["train", "--set", "k=3", "--out", "{tmp}/r"], "--set has unknown keys: k"),
    (["train", "--set", "steps=0.5", "--out", "{tmp}/r"], "steps must be of type int, got 0.5"),
    (["train", "--set", "preset=smoke", "--out", "{tmp}/r"], "cannot change preset; give --preset"),
    (
        ["train", "--set", "switch.mode=sparse", "--out", "{tmp}/r"],
        "switch.mode must be one of ssd, dense, static; got 'sparse'",
    ),
    (
        ["train", "--set", "model.num_experts=7", "--out", "{tmp}/r"],
        "model.num_experts 7 must divide model.intermediate_size 1024",
    ),
    (
        ["train", "--preset", "huge"],
        "preset must be one of starter, smoke, gpt-5m, gpt-50m, gpt-124m; got 'huge'",
    ),
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
    (["serve", "--priority-age-seconds", "5"], "priority_age_seconds was removed: requests have"),
    (["serve", "--model", "{tmp}"], "manifest.json: missing"),
    (["eval", "--data", "{tmp}"], "no text found"),
    (["eval", "--json", "{tmp}/no/where.json"], "--json"),
    (["eval", "--json", "{tmp}"], "is a directory"),
    (["eval", "--task", "{tmp}/f"], ":1: is not JSON"),
    (["eval", "--task", "{tmp}/none"], "no such task file"),
    (["eval", "--experts", "half"], "mass:SHARE or oracle:N; got 'half'"),
    (["eval", "--experts", "shared:8"], "--experts: the expert policy shared was removed"),
    (["eval", "--experts", "top_k:65"], "experts.top_k must be between 1 and 64, got 65"),
    (["eval", "--max-tokens", "0"], "--max-tokens"),
    (["eval", "--max-examples", "0"], "--max-examples"),
    (["inspect", "--top-k", "8"], "--top-k needs --activations"),
    (["inspect", "--data", "{tmp}/f"], "--data needs --activations"),
    (["inspect", "--activations", "--top-k", "65"], "top_k must be between 1 and 64, got 65"),
    (["inspect", "--activations", "--data", "{tmp}/f"], "unknown kind of file"),
    (["inspect", "--activations", "--against", "{tmp}"], "manifest.json: missing"),
    (["train", "--relufy", "--out", "{tmp}/r"], "--relufy needs --from DIR"),
    (["train", "--from", "{tmp}/none", "--out", "{tmp}/r"], "none: no such directory"),
    (["train", "--from", "{tmp}", "--out", "{tmp}/r"], "config.json: missing"),
    (
        ["train", "--relufy", "--from", "{tmp}", "--out", "{tmp}/r"],
        "config.json: missing",
    ),
    (["import", "{tmp}/none", *IMPORT], "none: no such directory"),
    (["import", "{tmp}", *IMPORT], "config.json: missing"),
    (["import", STARTER, "--out", "{tmp}", "--calibrate", "{tmp}/f"], "is there already"),
    (["import", STARTER, *IMPORT], "unknown kind of file"),
    (["import", STARTER, *IMPORT, "--max-loss", "3"], "--max-loss must be a share between 0%"),
    (["import", STARTER, *IMPORT, "--experts", "60"], "1024 neurons; near it are 16, 32, 64"),
    (["import", STARTER, *IMPORT, "--expert-size", "3"], "--expert-size 3 must divide the model's"),
    (["import", STARTER, *IMPORT, "--cluster", "x"], "--cluster must be one of weights; got 'x'"),
    (["import", STARTER, *IMPORT, "--cluster", "coactivation"], "coactivation was removed"),
    (["import", STARTER, *IMPORT, "--router", "x"], "--router must be one of fitted, centroid"),
    (
        ["import", STARTER, *IMPORT, "--dtype", "int8"],
        "--dtype must be one of auto, float32, bfloat16",
    ),
    (["export", "{tmp}/none", "--out", "{tmp}/o"], "none: no such checkpoint directory"),
    (["export", "{tmp}", "--out", "{tmp}/o", "--to", "onnx"], "--to must be one of hf; got 'onnx'"),
    (["report", "{tmp}"], "holds no training run"),
    (["report", "{tmp}/none"], "holds no training run"),
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


def test_benchmarks_are_found_in_a_checkout_alone(
    tmp_path: Path, ambidex: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "before")
    assert ambidex("bench", "ffn", "--help").returncode == 0
    assert os.environ["PYTHONPATH"] == f"{command_line.CHECKOUT}{os.pathsep}before"
    monkeypatch.setattr(command_line, "CHECKOUT", tmp_path)
    assert "bench" not in ambidex("--help").stdout
    result = ambidex("bench", "ffn")
    assert result.returncode == 1
    assert "error: the benchmarks are not installed with ambidex" in flat(result.stderr)


def test_an_interrupted_command_ends_as_a_shell_expects() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        console.run(interrupted)
    assert ended.value.code == 130


def test_the_first_process_of_a_container_ends_on_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: dict[int, Callable[[int, None], None]] = {}
    monkeypatch.setattr("os.getpid", lambda: 1)
    monkeypatch.setattr("signal.signal", handlers.__setitem__)
    console.run(lambda: None)
    with pytest.raises(SystemExit) as ended:
        handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert ended.value.code == 128 + signal.SIGTERM
