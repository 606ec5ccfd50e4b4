"""The command `ambidex`: train, serve, generate, eval, inspect, bench.

Thin: each subcommand parses its options and calls the package that does the work, which is imported
only then, so `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint
    from engine.request import ExpertPolicy

app = typer.Typer(
    name="ambidex",
    help="Language models whose one set of weights runs dense or as a sparse mixture of experts.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    add_completion=False,
)
bench_app = typer.Typer(
    help="Measure speed on this machine, sparse against dense.", no_args_is_help=True
)
app.add_typer(bench_app, name="bench")

err = Console(stderr=True)

MODEL_HELP = "Checkpoint directory; default: the packaged starter model."
Model = Annotated[Path | None, typer.Option("--model", help=MODEL_HELP)]
Experts = Annotated[
    str,
    typer.Option(
        "--experts",
        help="How many experts a token may use: dense, auto (what the checkpoint recommends), "
        "top_k:N (the N best), or mass:SHARE (as few as hold that share of the predicted "
        "activation mass).",
    ),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the results here.")]


def main() -> None:
    """Entry point: our own errors become one sentence and exit status 1."""
    from engine.errors import AmbidexError

    try:
        app()
    except AmbidexError as error:
        err.print(f"error: {error}", style="red", markup=False, highlight=False)
        sys.exit(1)
    except OSError as error:
        err.print(f"error: {error}", style="red", markup=False, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def train(
    preset: Annotated[
        str,
        typer.Option(
            help="Complete configuration to start from: starter (the packaged model), "
            "or smoke (a minute; shows the whole path, makes no model)."
        ),
    ] = "starter",
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Files or folders of text (.txt, .md, .py, .jsonl; also .xz, .gz, .zst). "
            "Repeatable. Default: the source of Python's standard library."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's directory; default: runs/PRESET.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps, instead of the preset's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed, instead of the preset's.")] = None,
    device: Annotated[
        str, typer.Option(help="cpu or cuda; exact resume holds on the CPU.")
    ] = "cpu",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Discard what an earlier run left in the directory.")
    ] = False,
) -> None:
    """Train an SSD model: dense and sparse phases in turn, then evaluate and write a checkpoint.

    Run the same command again after an interruption and it goes on exactly where the last saved
    state was; the result is the same, bit for bit. The checkpoint is DIRECTORY/checkpoint, with a
    model card; serve it with `ambidex serve --model DIRECTORY/checkpoint`.
    """
    from training.progress import ProgressMonitor
    from training.trainer import Trainer

    config = _train_config(preset, steps, seed)
    run = out or Path("runs") / preset
    command = shlex.join(["ambidex", *sys.argv[1:]])
    with ProgressMonitor(config.steps) as monitor:
        path = Trainer(
            config, run, data or [], monitor, command, device=device, fresh=fresh
        ).train()
    _print_quality(path)
    typer.echo(f"checkpoint: {path}")


def _train_config(preset: str, steps: int | None, seed: int | None) -> Any:
    """The preset's configuration with the command line's changes."""
    import dataclasses

    from engine.errors import require
    from training.config import PRESETS

    require(preset in PRESETS, f"--preset must be one of {', '.join(PRESETS)}; got {preset!r}")
    config = PRESETS[preset]
    return dataclasses.replace(
        config,
        steps=config.steps if steps is None else steps,
        seed=config.seed if seed is None else seed,
    )


@app.command()
def serve(
    model: Model = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on [127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on [8000].")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda [cpu].")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16 [auto].")
    ] = None,
) -> None:
    """Serve a checkpoint over HTTP: POST /generate, /generate_stream, GET /info, /metrics, /docs.

    Every setting is also an environment variable: AMBIDEX_PORT, AMBIDEX_MODEL,
    AMBIDEX_KV_CACHE_BYTES, AMBIDEX_MAX_CONCURRENT_REQUESTS, AMBIDEX_DRAIN_TIMEOUT and so on (see
    docs/serving.md); options given here win. SIGTERM finishes what runs, then exits.
    """
    from pydantic import ValidationError

    from engine.errors import ConfigError
    from server.serve import serve as run_server
    from server.settings import Settings

    options = {"model": model, "host": host, "port": port, "device": device, "dtype": dtype}
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    try:
        settings = Settings(**given)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"]) or "settings"
        raise ConfigError(f"{name}: {problem['msg']}") from error
    run_server(settings)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
    model: Model = None,
    experts: Experts = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 is greedy. Default: 0, or 1 if top-k, top-p or seed is given."),
    ] = None,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1: all.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling reproducible.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Continue a text, token by token; says afterwards which share of the experts it used."""
    from engine.config import EngineConfig
    from engine.engine import Engine
    from engine.request import SamplingParams

    if temperature is None:
        temperature = 1.0 if top_k or top_p < 1.0 or seed is not None else 0.0
    sampling = SamplingParams(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    policy = _policy(experts)
    engine = Engine.load(_model_path(model), EngineConfig(device=device, dtype=dtype))
    text = sys.stdin.read() if prompt == "-" else prompt
    request = engine.make_request(text, sampling, policy)
    sys.stdout.write(text)
    for event in engine.run([request]):
        sys.stdout.write(event.text)
        sys.stdout.flush()
        if event.usage is not None:
            usage = event.usage
            speed = usage.generated_tokens / max(usage.inference_seconds, 1e-9)
            sys.stdout.write("\n")
            err.print(
                f"{usage.generated_tokens} tokens, {speed:,.0f} tokens/s, {request.policy}, "
                f"{usage.activated_ratio:.1%} of the experts activated, ended by "
                f"{event.finish_reason}"
            )


@app.command(name="eval")
def evaluate(
    model: Model = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Files or folders of text, as for train. Repeatable. "
            "Default: the held-out part of Python's standard library."
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, max=1 << 30, help="Evaluate at most about this many tokens.")
    ] = 1 << 16,
    json_file: JsonFile = None,
) -> None:
    """Perplexity, dense and at 1/16, 1/8, 1/4 and 1/2 of the experts, routed and by oracle."""
    from training.evaluation import evaluate_paths

    _check_writable(json_file)
    checkpoint = _load(model)
    curve = evaluate_paths(checkpoint, data or [], max_tokens, lambda policy: err.print(policy))
    table = Table(
        "policy", "perplexity", "against dense", "experts", "coverage", title=str(model or "")
    )
    for result in [curve.dense, *curve.routed.values(), *curve.oracle.values()]:
        table.add_row(
            result.policy,
            f"{result.perplexity:.3f}",
            f"{result.perplexity / curve.dense.perplexity - 1:+.2%}",
            f"{result.activated_ratio:.1%}",
            f"{result.coverage:.1%}",
        )
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(curve.to_dict(), indent=2) + "\n", encoding="utf-8")


@app.command()
def inspect(model: Model = None) -> None:
    """Verify a checkpoint and show its shape, its experts, and its quality by share of experts."""
    path = _model_path(model)
    checkpoint = _load(model)
    config = checkpoint.config
    table = Table(show_header=False, title=str(path), title_justify="left")
    rows = {
        "parameters": f"{config.num_parameters:,} in {config.torch_dtype}",
        "layers": f"{config.num_hidden_layers} of width {config.hidden_size}",
        "attention": f"{config.num_attention_heads} heads, {config.num_key_value_heads} for keys "
        f"and values, context {config.max_position_embeddings}",
        "experts": f"{config.experts.num_experts} of {config.experts.expert_size} neurons a layer "
        f"({config.hidden_act})",
        "auto means": config.experts.default_policy,
        "vocabulary": f"{config.vocab_size:,}",
        "weights": f"SHA-256 {checkpoint.fingerprint}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
    _print_quality(path)


@bench_app.command()
def ffn(json_file: JsonFile = None) -> None:
    """Time one feed-forward layer, sparse against dense, side by side on this CPU.

    Widths 768 and 2048 with 6 of 32 experts, 1 to 256 tokens, float32 and bfloat16, weights
    prepacked for both; every token with the same experts, and every token with its own.
    """
    from benchmarks.ffn import main as run_bench

    _check_writable(json_file)
    run_bench(["--json", str(json_file)] if json_file is not None else [])


@bench_app.command(name="train")
def train_steps(json_file: JsonFile = None) -> None:
    """Time whole training steps, sparse against dense, in turn on this CPU.

    Widths 256, 768 and 1024, three layers, 8 of 64 experts, 2048 and 4096 tokens a step, float32:
    forward and backward pass, penalty, clipping and optimiser. About two minutes on two cores.
    """
    from benchmarks.sparse_step import main as run_bench

    _check_writable(json_file)
    run_bench(["--json", str(json_file)] if json_file is not None else [])


def _model_path(model: Path | None) -> Path:
    from engine.checkpoint import STARTER

    return model or Path(os.environ.get("AMBIDEX_MODEL", STARTER))


def _check_writable(json_file: Path | None) -> None:
    """Refuse a results file that could not be written, before the work is done."""
    from engine.errors import require

    if json_file is not None:
        folder = json_file.parent
        require(folder.is_dir(), f"--json must name a file in an existing directory, not {folder}")


def _load(model: Path | None) -> Checkpoint:
    from engine.checkpoint import load

    return load(_model_path(model), dtype="float32")


def _policy(text: str) -> ExpertPolicy:
    from engine.request import ExpertPolicy

    return ExpertPolicy.parse(text)


def _print_quality(path: Path) -> None:
    """The quality curve of a checkpoint, as it was measured at the end of its training."""
    from engine.checkpoint import read_json
    from engine.config import ModelConfig

    report = read_json(path / "training_report.json")
    dense = report.get("evaluation", {}).get("dense", {}).get("perplexity", float("nan"))
    experts = ModelConfig.from_dict(read_json(path / "config.json")).experts
    table = Table("experts per token", "share", "perplexity", "against dense", title="quality")
    table.add_row("dense", "100%", f"{dense:.3f}", "")
    for point in experts.quality:
        table.add_row(
            f"{point.top_k} of {experts.num_experts}",
            f"{point.share:.2%}",
            f"{point.perplexity:.3f}",
            f"{point.relative:+.2%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
