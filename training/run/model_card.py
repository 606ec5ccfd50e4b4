"""The README.md of a checkpoint: how it was made and what it scored, from its report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from engine.config import ModelConfig

_STARTER: Final = """ It shows what the software does; it is too small to be useful as a language
model."""
_LICENCE: Final = """
The text that it was trained on is the Python Software Foundation's, under the PSF licence; the
weights are released under Apache-2.0.
"""


def model_card(config: ModelConfig, report: Mapping[str, Any]) -> str:
    """Markdown for people; every figure comes from `training_report.json`."""
    experts, run, corpus = config.experts, report["config"], report["corpus"]
    dense = report["evaluation"]["dense"]["perplexity"]
    oracle = report["evaluation"]["oracle"]
    rows = [
        f"| {p.top_k} of {experts.num_experts} ({p.share:.2%}) | {p.perplexity:.3f} "
        f"| {p.relative:+.2%} | {oracle[str(p.top_k)]['perplexity'] / dense - 1:+.2%} |"
        for p in experts.quality
    ]
    switches = [f"- step {s['step']}: {s['phase']} ({s['reason']})" for s in report["switches"]]
    is_starter = run["preset"] == "starter" and "standard library" in corpus["description"]
    active = ", ".join(f"{share:.1%}" for share in report["active_neurons"])
    return f"""# {run["preset"]}: an SSD model

A decoder trained by switching between dense and sparse steps, so that one set of weights runs dense
or as a mixture of experts.{_STARTER if is_starter else ""}

| | |
|---|---|
| parameters | {config.num_parameters:,} ({config.torch_dtype}) |
| shape | {config.num_hidden_layers} layers, width {config.hidden_size}, \
{config.intermediate_size} FFN neurons in {experts.num_experts} experts of {experts.expert_size} |
| command | `{report["command"]}` |
| seed | {run["seed"]} |
| trained on | {corpus["description"]}; {report["tokens_seen"]:,} tokens seen of \
{corpus["train_tokens"]:,} |
| data fingerprint | SHA-256 `{corpus["fingerprint"]}` |
| time | {report["seconds"] / 60:.1f} minutes on {_machine(report)} |
| versions | torch {report["versions"]["torch"]}, Python {report["versions"]["python"]} |
| active neurons by layer | {active} |

Perplexity on {corpus["held_out_tokens"]:,} held-out tokens; dense mode: **{dense:.3f}**.

| experts per token | perplexity | against dense | oracle routing, against dense |
|---|---|---|---|
{chr(10).join(rows)}

`auto` stands for `{experts.default_policy}` with this checkpoint.
{_start(report)}
Phases (dense from step 0):

{chr(10).join(switches)}
{_LICENCE if is_starter else ""}"""


def _start(report: Mapping[str, Any]) -> str:
    """What a run that went on from a model began with; empty for others."""
    start, dense = report.get("start"), report["evaluation"]["dense"]["perplexity"]
    if not start:
        return ""
    if "swapped" not in start:
        return f"""
Trained on from {start["source"]}: dense perplexity {start["before"]:.3f} before, {dense:.3f} after.
"""
    return f"""
Made from {start["source"]} by putting ReLU in place of {start["activation"]}: dense perplexity
{start["before"]:.3f} before, {start["swapped"]:.3f} right after, {dense:.3f} when trained.
"""


def _machine(report: Mapping[str, Any]) -> str:
    cpu = f"{report['threads']} CPU threads"
    return cpu if report["device"] == "cpu" else f"one {report['device']}"
