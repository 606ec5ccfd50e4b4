"""`ambidex bench`: its commands parse their options; the benchmark itself is imported only then."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.console import JsonFile, check_writable

app = typer.Typer()
bench_app = typer.Typer(
    help="Measure speed on this machine, sparse against dense.", no_args_is_help=True
)
app.add_typer(bench_app, name="bench")


@bench_app.command()
def ffn(json_file: JsonFile = None) -> None:
    """Time one feed-forward layer, sparse against dense, side by side on this CPU.

    Widths 768 and 2048 with 6 of 32 experts, 1 to 256 tokens, float32 and bfloat16, weights
    prepacked for both; every token with the same experts, and every token with its own.
    """
    from benchmarks.engine.ffn import main as run_bench

    check_writable(json_file)
    run_bench(["--json", str(json_file)] if json_file is not None else [])


@bench_app.command(name="train")
def train_steps(json_file: JsonFile = None) -> None:
    """Time whole training steps, sparse against dense, in turn on this CPU.

    Widths 256, 768 and 1024, three layers, 8 of 64 experts, 2048 and 4096 tokens a step, float32:
    forward and backward pass, penalty, clipping and optimiser. About two minutes on two cores.
    """
    from benchmarks.training.sparse_step import main as run_bench

    check_writable(json_file)
    run_bench(["--json", str(json_file)] if json_file is not None else [])


Shape = Annotated[
    str,
    typer.Option("--shape", help="Of the random model: opt-125m, opt-1.3b, or tiny (for tests)."),
]
NumExperts = Annotated[
    int, typer.Option("--experts", help="Experts a layer: 32 (6 are used) or 64 (8 are).")
]
Threads = Annotated[int, typer.Option("--threads", help="CPU threads; 0: torch's choice.")]


@bench_app.command()
def decode(
    shape: Shape = "opt-125m",
    experts: NumExperts = 32,
    routing: Annotated[
        str,
        typer.Option(
            help="own: every request has its own prompt, so each token chooses its own experts; "
            "same: one prompt for the whole batch, so that all choose the same. Text lies between."
        ),
    ] = "own",
    seconds: Annotated[float, typer.Option(help="To spend on each batch size, about.")] = 20.0,
    threads: Threads = 0,
    json_file: JsonFile = None,
) -> None:
    """Time the engine's decoding steps at 1 to 64 requests, sparse against dense, in turn.

    A model of the given shape with random weights, bfloat16, context 64 to 200 tokens. Also says
    which share of the memory's limit each side reaches: the bytes that a step must read, at the
    speed at which the packed dense FFN reads in the same run, over the measured time.
    """
    _bench_engine(
        "decode",
        json_file,
        shape=shape,
        experts=experts,
        routing=routing,
        seconds=seconds,
        threads=threads,
    )


@bench_app.command()
def prefill(
    shape: Shape = "opt-125m",
    experts: NumExperts = 32,
    seconds: Annotated[float, typer.Option(help="To spend on each length, about.")] = 20.0,
    threads: Threads = 0,
    json_file: JsonFile = None,
) -> None:
    """Time lone prompts of 1 to 1024 tokens to their first token, sparse against dense, in turn."""
    _bench_engine(
        "prefill", json_file, shape=shape, experts=experts, seconds=seconds, threads=threads
    )


@bench_app.command(name="serve")
def serve_load(
    shape: Shape = "opt-125m",
    experts: NumExperts = 32,
    requests: Annotated[int, typer.Option(help="Requests of a load.")] = 64,
    rate: Annotated[
        float, typer.Option(help="Arrivals a second; 0: 0.7 of dense's greatest throughput.")
    ] = 0.0,
    seconds: Annotated[
        float, typer.Option(help="Begin no further load of a kind after so long (at most 3).")
    ] = 20.0,
    threads: Threads = 0,
    json_file: JsonFile = None,
) -> None:
    """Serve a load of requests in this process, sparse against dense, load by load.

    Prompts of 32 to 512 tokens, 128 output tokens each: first all requests at once, then Poisson
    arrivals. Output tokens a second, time to the first token and between tokens.
    """
    _bench_engine(
        "serve",
        json_file,
        shape=shape,
        experts=experts,
        requests=requests,
        rate=rate,
        seconds=seconds,
        threads=threads,
    )


@bench_app.command()
def start(
    shape: Shape = "opt-1.3b",
    rounds: Annotated[int, typer.Option(help="Starts to take the median of.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """Start an engine on the CPU: seconds to the first token, and resident memory.

    Writes a checkpoint of random weights first, into a temporary directory (2.6 GB for opt-1.3b).
    """
    from benchmarks.engine.start import main as run_bench

    check_writable(json_file)
    arguments = [f"--shape={shape}", f"--rounds={rounds}"]
    run_bench(arguments + (["--json", str(json_file)] if json_file is not None else []))


def _bench_engine(command: str, json_file: Path | None, **options: object) -> None:
    from benchmarks.engine.engine_speed import main as run_bench

    check_writable(json_file)
    arguments = [command, *(f"--{name}={value}" for name, value in options.items())]
    run_bench(arguments + (["--json", str(json_file)] if json_file is not None else []))
