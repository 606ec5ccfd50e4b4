"""The import, readable from top to bottom.

    read the source's shape, plan, tokenise
    embed all tokens once
    for every layer: run it, cluster and move its neurons, fit its router, pass the held-out tokens
        through it under every choice of experts, keep its weights and the states behind it
    score the held-out tokens, recommend a policy, write the checkpoint

One layer's weights are in memory at a time, besides the tokens' hidden states. A killed import goes
on behind its last finished layer, to the same bytes.

Shapes: B sequences, L length, T tokens, D model.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.checkpoint import atomic_directory, write_json
from engine.config import ModelConfig
from engine.text.tokenizer import Tokenizer
from training.errors import writing
from training.importing.curve import Quality, measure_quality
from training.importing.formats.source import dtype_of
from training.importing.job import ImportJob
from training.importing.layer import LayerResult, build_layer_experts, fit_layer_router, studied
from training.importing.plan import Plan, Stream
from training.importing.streams import Frame, embed, pack, pass_layer
from training.importing.summary import import_card, import_page, import_report
from training.importing.workspace import Workspace


class ImportMonitor(Protocol):
    """What an import calls to tell about its progress; a progress bar implements it."""

    def message(self, text: str) -> None: ...

    def advance(self, stage: str, tokens: int) -> None: ...


class SilentImport:
    """Ignores what it is told."""

    def message(self, text: str) -> None:
        pass

    def advance(self, stage: str, tokens: int) -> None:
        pass


def run(
    job: ImportJob, out: Path, monitor: ImportMonitor, command: str = "", *, fresh: bool = False
) -> Quality:
    """Import into the new directory `out`, or go on with what a kill left beside it.

    Raises:
        TrainingError: if another import is half done there.
        StorageError: if something cannot be written; says what is intact.
        CheckpointError: if the source or the half-done import is damaged.
    """
    workspace = Workspace(out)
    with workspace.opened(job.identity, fresh=fresh):
        config = job.plan.config
        dtype = dtype_of(config.torch_dtype)
        rest = {name: tensor.to(dtype) for name, tensor in job.source.rest().items()}
        frame = Frame(config, rest)
        states = _begin(workspace, frame, job, monitor)
        for index in range(workspace.layers_done, config.num_hidden_layers):
            _import_layer(index, frame, states, workspace, job, monitor)
        results = workspace.results()
        quality = measure_quality(frame, states, results, job.text, job.plan)
        _write(out, workspace, rest, results, quality, job, command)
        workspace.remove()
    return quality


def _begin(
    workspace: Workspace, frame: Frame, job: ImportJob, monitor: ImportMonitor
) -> dict[str, Tensor]:
    """The states in front of the next layer: of the half-done import, or of the embedding."""
    text, plan = job.text, job.plan
    if done := workspace.layers_done:
        monitor.message(f"going on behind layer {done} of {plan.config.num_hidden_layers}")
        monitor.advance("", job.work // plan.config.num_hidden_layers * done)
        return workspace.states()
    with frame.ends() as model:
        held_TD = embed(model, text.held_BL[:, :-1])
        states = {"fit": embed(model, text.fit_BL), "check": embed(model, text.check_BL)}
    return states | {stream.name: held_TD.clone() for stream in plan.streams}


def _import_layer(
    index: int,
    frame: Frame,
    states: dict[str, Tensor],
    workspace: Workspace,
    job: ImportJob,
    monitor: ImportMonitor,
) -> None:
    """Turn one layer's neurons into experts and carry all tokens through it."""
    plan, length, options = job.plan, job.text.length, job.plan.options
    dtype = dtype_of(plan.config.torch_dtype)
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + index)
    number = f"layer {index + 1}/{plan.config.num_hidden_layers}"
    tensors = {name: t.to(dtype) for name, t in job.source.layer(index).items()}
    with frame.layer(index, tensors) as layer:
        del tensors  # the layer owns the weights now; a second copy would double the memory

        def passed(name: str, stream: Stream, inputs: list[Tensor] | None = None) -> Any:
            # The states of this name move from before the layer to behind it.
            return pass_layer(
                frame.model,
                layer,
                states[name],
                length,
                stream,
                generator,
                lambda tokens: monitor.advance(f"{number} {name}", tokens),
                inputs,
            )

        # The calibration tokens pass first, dense: the router is fitted to what the FFN sees then.
        inputs: dict[str, list[Tensor]] = {"fit": [], "check": []}
        for name, kept in inputs.items():
            passed(name, Stream("dense"), kept)
        fit_TD, check_TD = torch.cat(inputs.pop("fit")), torch.cat(inputs.pop("check"))
        monitor.advance(f"{number} cluster", 0)
        build_layer_experts(layer.ffn, generator)
        monitor.advance(f"{number} router", 0)
        router = fit_layer_router(layer.ffn, fit_TD, check_TD, options.router)
        study = studied(layer.ffn, check_TD)
        del fit_TD, check_TD
        # The weights are taken before packing, which keeps them in the order of the CPU's kernels.
        weights = {f"layers.{index}.{name}": t for name, t in layer.state_dict().items()}
        pack(layer, plan.config)
        # The held-out tokens pass once for each choice of experts that the quality curve compares.
        uses = {stream.name: passed(stream.name, stream) for stream in plan.streams}
        result = LayerResult(study, router, uses)
        workspace.save(index, weights, result, states)
    monitor.message(f"{number}: {_summary(result, plan)}")


def _summary(result: LayerResult, plan: Plan) -> str:
    study = result.study
    coverage = "" if study.coverage is None else f"{study.coverage:.1%}"
    return (
        f"{study.active:.1%} of the neurons fire; an eighth of the experts holds {coverage} of "
        f"their mass by the {result.router} router, {study.oracle:.1%} by oracle"
    )


def _write(
    out: Path,
    workspace: Workspace,
    rest: Mapping[str, Tensor],
    results: Sequence[LayerResult],
    quality: Quality,
    job: ImportJob,
    command: str,
) -> None:
    """Write the checkpoint, whole or not at all."""
    config = dataclasses.replace(
        job.plan.config,
        experts=dataclasses.replace(
            job.plan.config.experts,
            default_policy=quality.recommended,
            quality=quality.curve.points(job.plan.config.experts.num_experts),
        ),
    )
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    content = import_report(job, results, quality, command, versions)
    intact = "all layers are done and intact: free space and run the same command again"
    with writing(out, intact), atomic_directory(out) as directory:
        for name, kept in job.kept.items():
            (directory / name).write_text(kept, encoding="utf-8")
        _write_files(directory, config, job.tokenizer, content)
        (directory / "README.md").write_text(import_card(config, content), encoding="utf-8")
        (directory / "report.html").write_text(
            import_page(out.name, config, content), encoding="utf-8"
        )
        workspace.gather(directory, rest)


def _write_files(
    directory: Path, config: ModelConfig, tokenizer: Tokenizer, content: Mapping[str, Any]
) -> None:
    write_json(directory / "config.json", config.to_dict())
    if not (directory / "generation_config.json").exists():  # the source's own is kept
        write_json(directory / "generation_config.json", {"eos_token_id": config.eos_token_id})
    write_json(directory / "training_report.json", dict(content))
    text = tokenizer.backend.to_str(pretty=True)
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
