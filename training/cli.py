"""The commands that train, import, evaluate and study models; each imports its work on demand."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engine.cli import Model, load_model, model_path
from engine.console import JsonFile, check_writable, stderr, write_result

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint
    from training.config import TrainConfig
    from training.experts.correspondence import LayerComparison
    from training.experts.study import ActivationStudy
    from training.importing.start import Start

app = typer.Typer()

Valid = Annotated[
    list[Path] | None,
    typer.Option(
        "--valid",
        help="Files or folders of text to hold out, instead of a share of --data. Repeatable.",
    ),
]


@app.command()
def train(
    preset: Annotated[
        str | None,
        typer.Option(
            help="Complete configuration to start from: starter (the packaged model), smoke (a "
            "minute; shows the whole path, makes no model), gpt-5m, gpt-50m or gpt-124m [starter]."
        ),
    ] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="TOML file with the configuration instead.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Change one setting, such as optimizer.schedule=wsd. Repeatable."
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Go on from this checkpoint, imported or trained, instead of new weights; "
            "--preset then gives the schedule alone.",
        ),
    ] = None,
    relufy: Annotated[
        bool,
        typer.Option(
            "--relufy",
            help="--from is a Hugging Face directory of a GELU or SiLU model: train it with ReLU.",
        ),
    ] = False,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Files or folders of text (.txt, .md, .py, .jsonl; also .xz, .gz, .zst), or a "
            "directory that `ambidex prepare` made. Repeatable. "
            "Default: the source of Python's standard library."
        ),
    ] = None,
    valid: Valid = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's directory; default: runs/PRESET.")
    ] = None,
    publish_to: Annotated[
        Path | None,
        typer.Option(
            "--publish",
            help="In the end also put the checkpoint there, whole or not at all: a directory "
            "inside the one that servers watch.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="The same as --set steps=N.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same as --set seed=N.")] = None,
    device: Annotated[
        str, typer.Option(help="cpu or cuda; exact resume holds on the CPU.")
    ] = "cpu",
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Discard what an earlier run left in the directory.")
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write TensorBoard events there.")
    ] = False,
) -> None:
    """Train an SSD model: dense and sparse phases in turn, then evaluate and write a checkpoint.

    Run the same command again after an interruption and it goes on exactly where the last saved
    state was; the result is the same, bit for bit. SIGTERM or Ctrl-C finishes the running step and
    saves first. The checkpoint is DIRECTORY/checkpoint, with a model card; look at the run with
    `ambidex report DIRECTORY`, serve it with `ambidex serve --model DIRECTORY/checkpoint`.
    """
    from engine.errors import require
    from training.importing.start import read_start
    from training.parallel.distributed import Team
    from training.presets import with_settings
    from training.report.progress import ProgressMonitor
    from training.run.interrupt import stop_on_signals
    from training.run.publish import check_target, publish
    from training.trainer import Trainer

    require(preset is None or config_file is None, "give --preset or --config, not both")
    require(start is not None or not relufy, "--relufy needs --from DIR, the model to change")
    model = None if start is None else read_start(start, relufy=relufy)
    base = _base_config(preset, config_file, model)
    shortcuts = [f"{k}={v}" for k, v in (("steps", steps), ("seed", seed)) if v is not None]
    config = with_settings(base, [*(settings or []), *shortcuts])
    command = shlex.join(["ambidex", *sys.argv[1:]])
    if publish_to is not None:
        check_target(publish_to)
    with Team.from_environment(device) as team:
        with (
            stop_on_signals() as stop,
            ProgressMonitor(config.steps, Console(quiet=not team.is_main)) as monitor,
        ):
            path = Trainer(
                config,
                out or Path("runs") / config.preset,
                data or [],
                monitor,
                command,
                device=device,
                fresh=fresh,
                valid_paths=valid or [],
                tensorboard=tensorboard,
                team=team,
                start=model,
            ).train(stop)
        if team.is_main:
            if publish_to is not None:
                publish(path, publish_to)
            _print_quality(path)
            typer.echo(f"checkpoint: {publish_to or path}")
        team.end_process()


@app.command()
def prepare(
    out: Annotated[Path, typer.Option(help="The new directory to write.")],
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Files or folders of text, as for train. Repeatable. "
            "Default: the source of Python's standard library."
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(help="Tokens of the tokenizer to learn: the model's vocabulary."),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Use this tokenizer.json, or the one of this checkpoint, and learn none."
        ),
    ] = None,
    valid: Valid = None,
    valid_share: Annotated[
        float, typer.Option(help="Share of the text to hold out, where --valid names none.")
    ] = 0.03,
    seed: Annotated[int, typer.Option(help="Decides which documents are held out.")] = 1,
) -> None:
    """Tokenise text once, into a directory of token shards that `ambidex train --data` maps.

    Text is read as a stream, so the corpus may be larger than memory. The directory is there whole
    or not at all.
    """
    from engine.errors import require
    from training.data.tokens import prepare_tokens
    from training.data.vocabulary import read_tokenizer

    require(
        (vocab_size is None) != (tokenizer is None),
        "give either --vocab-size, to learn a tokenizer, or --tokenizer, to use one",
    )
    known = read_tokenizer(tokenizer) if tokenizer is not None else None
    index = prepare_tokens(
        data or [],
        valid or [],
        out,
        vocab_size=vocab_size or (known.vocab_size if known is not None else 0),
        valid_share=valid_share,
        seed=seed,
        report=lambda text: stderr().print(text, markup=False, highlight=False),
        tokenizer=known,
    ).index
    typer.echo(
        f"{out}: {index.train_tokens:,} tokens to train on in {len(index.train)} shards, "
        f"{index.valid_tokens:,} held out, vocabulary of {index.vocab_size:,}"
    )


@app.command(name="import")
def import_model(
    source: Annotated[Path, typer.Argument(help="Directory of the model: safetensors and JSON.")],
    out: Annotated[Path, typer.Option(help="The new checkpoint directory to write.")],
    calibrate: Annotated[
        list[Path],
        typer.Option(
            help="Files or folders of text, as for train, of the kind that the model is meant for. "
            "Repeatable."
        ),
    ],
    valid: Annotated[
        list[Path] | None,
        typer.Option(
            "--valid",
            help="Text to measure quality on, instead of a fifth of --calibrate. Repeatable.",
        ),
    ] = None,
    experts: Annotated[
        int, typer.Option(help="Experts of each layer; 0: chosen from the number of neurons.")
    ] = 0,
    expert_size: Annotated[
        int, typer.Option(help="Or the neurons of each expert; 0: follows from their number.")
    ] = 0,
    cluster: Annotated[
        str, typer.Option(help="What makes neurons alike: their weights.")
    ] = "weights",
    router: Annotated[
        str,
        typer.Option(
            help="fitted to the true activation mass, where that helps, or centroid of the "
            "experts' weights."
        ),
    ] = "fitted",
    max_loss: Annotated[
        str,
        typer.Option(help="Perplexity that the recommended policy may lose, such as 1% or 0.01."),
    ] = "1%",
    calibration_tokens: Annotated[
        int, typer.Option(help="Tokens to calibrate on at most; 0: by the model's size.")
    ] = 0,
    quality_tokens: Annotated[
        int, typer.Option(help="Held-out tokens to measure quality on; 0: by the model's size.")
    ] = 0,
    dtype: Annotated[
        str,
        typer.Option(
            help="Of the weights written: float32, bfloat16, or auto: the source's, but bfloat16 "
            "for float16."
        ),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of the sample of text and the clustering.")] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and what it needs, write nothing.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Discard a half-done import of this name.")
    ] = False,
) -> None:
    """Turn a ReLU model of Hugging Face's format into a checkpoint with experts.

    The dense function stays what it was. Neurons are grouped into experts layer by layer, so that
    little more than one layer is in memory; a killed import goes on with the same command. Then
    quality is measured by share of the experts, and a policy recommended: what auto means.
    """
    from training.importing import pipeline
    from training.importing.job import prepare_import
    from training.importing.options import ImportOptions, parse_loss
    from training.importing.speed import estimate_seconds
    from training.report.page import duration
    from training.report.progress import ImportProgress

    options = ImportOptions(
        num_experts=experts,
        expert_size=expert_size,
        cluster=cluster,
        router=router,
        calibration_tokens=calibration_tokens,
        quality_tokens=quality_tokens,
        dtype=dtype,
        max_loss=parse_loss(max_loss),
        seed=seed,
    )
    prepared = prepare_import(source, out, calibrate, valid or [], options)
    table = Table(show_header=False, title=escape(str(source)), title_justify="left")
    for name, value in prepared.describe():
        table.add_row(name, escape(value))
    table.add_row("time", f"about {duration(estimate_seconds(prepared.plan))} here")
    stderr().print(table)
    if dry_run:
        return
    command = shlex.join(["ambidex", *sys.argv[1:]])
    with ImportProgress(prepared.work, stderr()) as progress:
        pipeline.run(prepared, out, progress, command, fresh=fresh)
    _print_quality(out)
    typer.echo(f"checkpoint: {out}")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="The checkpoint directory to read.")],
    out: Annotated[Path, typer.Option(help="The new directory to write.")],
    to: Annotated[str, typer.Option(help="The format: hf, Hugging Face's.")] = "hf",
) -> None:
    """Write a checkpoint's dense model for transformers, in its own family's format.

    A model that was trained here goes to the first family that can express it exactly.
    """
    from engine.config import check_choice
    from training.importing.formats.export import export as export_model

    check_choice("--to", to, ("hf",))
    family = export_model(checkpoint, out)
    typer.echo(f"{family.architecture}: {out}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run's directory, finished or not.")],
    against: Annotated[
        Path | None,
        typer.Option(help="Another run's directory to draw beside it, such as a dense one."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The page to write; default: RUN/report.html.")
    ] = None,
) -> None:
    """Draw a training run as one HTML page: loss, perplexity, sparsity, switches, experts, cost.

    The page holds everything it needs and runs no scripts. It can be made while the run goes on.
    """
    from training.report.training_page import write_report

    typer.echo(f"report: {write_report(run, out, against)}")


@app.command(name="eval")
def evaluate(
    model: Model = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Files or folders of text for perplexity, as for train. Repeatable. Default: the "
            "held-out part of Python's standard library, or no text if there is a --task."
        ),
    ] = None,
    task: Annotated[
        list[Path] | None,
        typer.Option(
            help='Task file, JSON lines. Repeatable. Cloze: {"text"}, of which the last word is '
            'the target, or {"context", "target"}. Multiple choice: {"question", "choices", '
            '"answer"}, the answer an index from 0.'
        ),
    ] = None,
    experts: Annotated[
        list[str] | None,
        typer.Option(
            help="Policy to evaluate: dense, auto, top_k:N, mass:SHARE or oracle:N (the N experts "
            "with the most true activation mass). Repeatable. Default: dense, and 1/16, 1/8, 1/4 "
            "and 1/2 of the experts, routed and, for perplexity, by oracle."
        ),
    ] = None,
    max_tokens: Annotated[
        int,
        typer.Option(
            min=1, max=1 << 30, help="Tokens of text at most; whole sequences are evaluated."
        ),
    ] = 1 << 16,
    max_examples: Annotated[
        int | None,
        typer.Option(min=1, max=1 << 30, help="Evaluate only the first so many of each task."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Perplexity and task accuracy of one checkpoint, dense and with fewer experts."""
    from engine.version import VERSION
    from training.quality.suite import prepare
    from training.report.progress import EvaluationProgress

    check_writable(json_file)
    checkpoint = load_model(model)
    suite = prepare(checkpoint, data or [], task or [], experts or [], max_tokens, max_examples)
    with EvaluationProgress(suite.work, stderr()) as progress:
        result = suite.run(progress.advance)
    table = Table(*map(escape, result.header()), title=escape(str(model or "")))
    for cells in result.cells():
        table.add_row(*cells)
    console = Console()
    # A pipe or file has no width that would justify breaking the table.
    console = console if console.is_terminal else Console(width=240)
    console.print(table)
    for note in result.notes():
        console.print(note, highlight=False, markup=False)
    if json_file is not None:
        write_result(json_file, result.to_dict(VERSION))


@app.command()
def inspect(
    model: Model = None,
    activations: Annotated[
        bool,
        typer.Option(
            "--activations",
            help="Study which neurons fire on a text, layer by layer, and how experts share them.",
        ),
    ] = False,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="With --activations: files or folders of text, as for train. Repeatable. "
            "Default: Python's standard library."
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            help="With --activations: experts per token. Default: what auto means for the "
            "checkpoint, or a quarter of the experts."
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="With --activations: a checkpoint to compare with, such as the same model "
            "trained for longer."
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="With --activations: also write it here.")
    ] = None,
) -> None:
    """Verify a checkpoint and show its shape, its experts, and its quality by share of experts."""
    from engine.errors import require

    given = {"--data": data, "--top-k": top_k, "--against": against, "--json": json_file}
    for option, setting in given.items():
        require(activations or setting in (None, []), f"{option} needs --activations")
    check_writable(json_file)
    path = model_path(model)
    checkpoint = load_model(model)
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
    if activations:
        _inspect_activations(checkpoint, data or [], top_k, against, json_file)


def _inspect_activations(
    checkpoint: Checkpoint,
    data: list[Path],
    top_k: int | None,
    against: Path | None,
    json_file: Path | None,
) -> None:
    """Study a checkpoint's activations, and compare them with another's."""
    from engine.errors import require
    from engine.policy import ExpertPolicy
    from training.experts.correspondence import compare
    from training.experts.study import study, text_probe

    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    policy = ExpertPolicy.parse(config.experts.default_policy)
    automatic = (
        int(policy.value) if policy.kind == "top_k" else max(1, config.experts.num_experts // 4)
    )
    other = load_model(against) if against is not None else None
    length = min(c.config.max_position_embeddings for c in (checkpoint, other) if c is not None)
    probe_BL = text_probe(tokenizer, data, min(length, 512))
    result = study(checkpoint.model, probe_BL, automatic if top_k is None else top_k)
    _print_study(result, config.experts.num_experts)
    record: dict[str, Any] = {"study": result.to_dict()}
    if other is not None:
        same = tokenizer.backend.to_str() == other.tokenizer.backend.to_str()
        require(same, f"--against {against}: has another tokenizer, so no token corresponds")
        layers = compare(checkpoint.model, other.model, probe_BL)
        _print_comparison(layers, against)
        record["against"] = [layer.to_dict() for layer in layers]
    if json_file is not None:
        json_file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _print_study(study: ActivationStudy, num_experts: int) -> None:
    k = study.top_k
    firing = Table(
        *("layer", "active", "never fire", "in 1/16", "in 1/8", "in 1/4", "cohesion"),
        title=f"activations on {study.tokens:,} tokens; mass in the best share of the experts",
    )
    routing = Table(
        *("layer", f"best {k}", f"router's {k}", "least load", "most", "entropy", "dead"),
        title=f"routing to {k} of {num_experts}; mass inside, load over the uniform load",
    )
    for i, layer in enumerate(study.layers):
        shares = [f"{s:.1%}" for s in (layer.active, layer.never, *layer.concentration)]
        firing.add_row(str(i), *shares, f"{layer.cohesion:.2f}")
        if layer.coverage is None or layer.load_entropy is None:
            routing.add_row(str(i), f"{layer.oracle:.1%}", "no router")
            continue
        load = (f"{min(layer.load):.2f}", f"{max(layer.load):.2f}", f"{layer.load_entropy:.3f}")
        inside = (f"{layer.oracle:.1%}", f"{layer.coverage:.1%}")
        routing.add_row(str(i), *inside, *load, str(layer.dead_experts))
    Console().print(firing)
    Console().print(routing)


def _print_comparison(layers: tuple[LayerComparison, ...], against: Path | None) -> None:
    table = Table(
        *("layer", "partners", "similarity", "ARI", "active", "there", "correlation"),
        title=f"against {against}",
    )

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    for i, layer in enumerate(layers):
        alike = (number(layer.similarity), number(layer.adjusted_rand))
        active = (f"{share:.1%}" for share in layer.active)
        table.add_row(str(i), f"{layer.matched:.1%}", *alike, *active, number(layer.correlation))
    Console().print(table)
    if any(layer.similarity is None for layer in layers):
        stderr().print(
            "Where fewer than half of the neurons have a partner in the other checkpoint, the two "
            "do not share their neurons: similarity and ARI (agreement of the clusterings) have no "
            "meaning there, and only the shares of active neurons are compared.",
            highlight=False,
        )


def _base_config(preset: str | None, file: Path | None, model: Start | None) -> TrainConfig:
    """The configuration that --set changes: as named, in the shape of `model` if there is one."""
    from training.presets import preset as preset_named
    from training.presets import read_config

    if model is not None and preset is None and file is None:
        return model.base()
    named = preset_named(preset or "starter") if file is None else read_config(file)
    return named if model is None else model.fitted(named)


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
