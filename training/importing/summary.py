"""What an import leaves for people and tools: training_report.json, README.md, report.html.

Nothing in them depends on how long the import took or where it was interrupted, so that it ends in
the same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from engine.config import ModelConfig
from training.experts.study import LayerStudy
from training.importing.curve import Quality
from training.importing.job import ImportJob
from training.importing.layer import LayerResult, judged_k
from training.importing.plan import Plan, Stream
from training.report import charts
from training.report.chart import OTHER, ROUTED, Chart, Series, format_percent
from training.report.page import Table, Tile, flat, render_page


def import_report(
    job: ImportJob,
    results: Sequence[LayerResult],
    quality: Quality,
    command: str,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """The content of `training_report.json`."""
    plan, text = job.plan, job.text
    return {
        "imported": {
            "family": plan.family,
            "source": job.path.resolve().name,
            "source_dtype": plan.source_dtype,
            "experts": plan.why,
            "settings": dataclasses.asdict(plan.options),
        },
        "command": command,
        "corpus": {
            "description": text.description,
            "fingerprint": text.fingerprint,
            "calibration_tokens": text.calibration_tokens,
            "held_out_tokens": text.held_out_tokens,
            "sequence_length": text.length,
        },
        "active_neurons": [result.study.active for result in results],
        "evaluation": quality.curve.to_dict(),
        "standard_errors": quality.errors,
        "recommended": quality.recommended,
        "layers": [_layer(result, plan) for result in results],
        "versions": dict(versions),
    }


def _layer(result: LayerResult, plan: Plan) -> dict[str, Any]:
    coverage = {s.name: result.uses[s.name].coverage for s in plan.streams[1:]}
    return {"router": result.router, "study": result.study.to_dict(), "coverage": coverage}


def _rows(config: ModelConfig, report: Mapping[str, Any]) -> list[list[str]]:
    """The quality curve as cells, dense first."""
    evaluation, errors = report["evaluation"], report["standard_errors"]
    dense = evaluation["dense"]["perplexity"]

    def relative(kind: str, k: int) -> str:
        return f"{evaluation[kind][str(k)]['perplexity'] / dense - 1:+.2%}"

    rows = [["dense", "100%", f"{dense:.3f}", *[""] * 5]]
    for point in config.experts.quality:
        k = point.top_k
        error = errors[Stream("routed", k).name]
        inside = evaluation["routed"][str(k)]["coverage"]
        rows.append(
            [
                f"{k} of {config.experts.num_experts}",
                format_percent(point.share),
                f"{point.perplexity:.3f}",
                f"{point.relative:+.2%}",
                "" if error is None else f"{error:.2%}",
                relative("oracle", k),
                relative("random", k),
                f"{inside:.1%}",
            ]
        )
    return rows


_HEAD = ["experts", "share", "perplexity", "to dense", "±", "oracle", "by chance", "mass inside"]


def import_card(config: ModelConfig, report: Mapping[str, Any]) -> str:
    """The README.md of the checkpoint."""
    experts, corpus = config.experts, report["corpus"]
    imported = report["imported"]
    lines = [f"| {' | '.join(row)} |" for row in _rows(config, report)]
    return f"""# {imported["source"]}, with experts

A model of the family {imported["family"]} whose neurons were grouped into experts, so that one set
of weights runs dense (the function that was imported) or as a mixture of experts.

| | |
|---|---|
| parameters | {config.num_parameters:,} ({config.torch_dtype}, from {imported["source_dtype"]}) |
| shape | {config.num_hidden_layers} layers, width {config.hidden_size}, \
{config.intermediate_size} FFN neurons in {experts.num_experts} experts of {experts.expert_size} |
| command | `{report["command"]}` |
| calibrated on | {corpus["description"]}; {corpus["calibration_tokens"]:,} tokens |
| versions | torch {report["versions"]["torch"]}, Python {report["versions"]["python"]} |

Perplexity on {corpus["held_out_tokens"]:,} held-out tokens. ± is the standard error of the mean
loss over the dense one's, from the sequences' means; oracle chooses by
the true activation mass, by chance draws.

| {" | ".join(_HEAD)} |
|{"---|" * len(_HEAD)}
{chr(10).join(lines)}

{recommendation(config, report)}
"""


def recommendation(config: ModelConfig, report: Mapping[str, Any]) -> str:
    """What `auto` means and why, in a sentence."""
    budget = report["imported"]["settings"]["max_loss"]
    if report["recommended"] != "dense":
        return (
            f"`auto` stands for `{report['recommended']}`: the fewest experts measured that lose "
            f"at most {format_percent(budget)} of perplexity."
        )
    best = min((p.relative for p in config.experts.quality), default=float("inf"))
    return (
        f"`auto` stands for `dense`: no measured number of experts stays within "
        f"{format_percent(budget)} of the dense perplexity (the best is {best:+.2%}). "
        f"`ambidex train --from` trains it on, to need fewer."
    )


def import_page(name: str, config: ModelConfig, report: Mapping[str, Any]) -> str:
    """The report as one HTML page."""
    layers = [LayerStudy.from_dict(layer["study"]) for layer in report["layers"]]
    return render_page(
        "import.html",
        kind="import",
        name=name,
        status=f"Ambidex import report. {recommendation(config, report).replace('`', '')}",
        tiles=_tiles(config, report),
        quality=[charts.quality(report["evaluation"])],
        quality_table=Table(_HEAD, _rows(config, report)),
        sparsity=[_activity(layers), _concentration(layers)],
        coverage=[_coverage(config, report)],
        layers=_layer_table(report),
        facts=flat("", {key: report[key] for key in _FACTS}),
    )


_FACTS = ("imported", "command", "corpus", "versions")


def _tiles(config: ModelConfig, report: Mapping[str, Any]) -> list[Tile]:
    active = report["active_neurons"]
    experts = config.experts
    return [
        (
            "perplexity, dense mode",
            f"{report['evaluation']['dense']['perplexity']:.2f}",
            f"{report['corpus']['held_out_tokens']:,} held-out tokens",
        ),
        ("auto means", report["recommended"], f"of {experts.num_experts} experts"),
        ("active neurons", f"{sum(active) / len(active):.1%}", "mean of layers"),
        ("experts", str(experts.num_experts), f"of {experts.expert_size} neurons, in each layer"),
        ("parameters", f"{config.num_parameters:,}", config.torch_dtype),
    ]


def _over_layers(title: str, series: Sequence[Series]) -> Chart:
    return Chart(
        title, "layer", series, x_format=charts.whole, y_zero=True, y_format=format_percent
    )


def _activity(layers: Sequence[LayerStudy]) -> Chart:
    fires = [(i, layer.active) for i, layer in enumerate(layers)]
    never = [(i, layer.never) for i, layer in enumerate(layers)]
    series = [
        Series("fire, mean over tokens", fires, ROUTED, dots=True),
        Series("fire on no token", never, OTHER, dots=True, dashed=True),
    ]
    return _over_layers("Neurons that fire", series)


def _concentration(layers: Sequence[LayerStudy]) -> Chart:
    series = [
        Series(
            f"best {share} of the experts",
            [(i, layer.concentration[n]) for i, layer in enumerate(layers)],
            charts.ramp(n, 3),
            dots=True,
        )
        for n, share in enumerate(("1/16", "1/8", "1/4"))
    ]
    return _over_layers("Activation mass in the best experts", series)


def _coverage(config: ModelConfig, report: Mapping[str, Any]) -> Chart:
    ks = [point.top_k for point in config.experts.quality]
    series = []
    for n, k in enumerate(ks):
        for kind in ("routed", "oracle"):
            points = [(i, x["coverage"][f"{kind}:{k}"]) for i, x in enumerate(report["layers"])]
            name = f"{k} experts, {kind}"
            dashed = kind == "oracle"
            series.append(Series(name, points, charts.ramp(n, len(ks)), dots=True, dashed=dashed))
    return _over_layers("True activation mass inside the chosen experts", series)


def _layer_table(report: Mapping[str, Any]) -> Table:
    """The layers' routers and activations, on calibration tokens that fitted nothing."""
    rows = []
    for i, layer in enumerate(report["layers"]):
        study = LayerStudy.from_dict(layer["study"])
        rows.append(
            [
                str(i),
                layer["router"],
                f"{study.active:.1%}",
                f"{study.never:.1%}",
                "" if study.coverage is None else f"{study.coverage:.1%}",
                f"{study.oracle:.1%}",
                str(study.dead_experts),
                f"{study.cohesion:.2f}",
            ]
        )
    k = judged_k(len(LayerStudy.from_dict(report["layers"][0]["study"]).load))
    head = ["layer", "router", "active", "never", f"router's {k}", f"best {k}", "dead", "cohesion"]
    return Table(head, rows)
