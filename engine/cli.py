"""The engine's commands, and how the commands of all packages find a model."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.console import stderr

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint

app = typer.Typer()

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
    from engine.policy import ExpertPolicy
    from engine.serving.engine import Engine
    from engine.serving.request import SamplingParams

    if temperature is None:
        temperature = 1.0 if top_k or top_p < 1.0 or seed is not None else 0.0
    sampling = SamplingParams(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    policy = ExpertPolicy.parse(experts)
    engine = Engine.load(model_path(model), EngineConfig(device=device, dtype=dtype))
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
            stderr().print(
                f"{usage.generated_tokens} tokens, {speed:,.0f} tokens/s, {request.policy}, "
                f"{usage.activated_ratio:.1%} of the experts activated, ended by "
                f"{event.finish_reason}"
            )


def model_path(model: Path | None) -> Path:
    """The checkpoint that --model names, or the environment, or the packaged one."""
    from engine.checkpoint import STARTER

    return model or Path(os.environ.get("AMBIDEX_MODEL", STARTER))


def load_model(model: Path | None) -> Checkpoint:
    """The checkpoint of `model_path` in float32, the type in which models are evaluated."""
    from engine.checkpoint import load

    return load(model_path(model), dtype="float32")
