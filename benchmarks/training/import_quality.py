"""A ReLU model that no sparse training has seen, imported: what do its experts keep?

    python -m benchmarks.training.import_quality --data PATH [--valid PATH] [--minutes 8]
        [--json FILE]

Trains a small OPT (transformers' own class, ReLU, 4.3 M parameters) on text in the plain, dense
way, saves it as transformers does, imports that directory, and prints perplexity against the share
of the experts: routed, by oracle, and by chance. The model is small and briefly trained: this shows
what conversion alone keeps of such a model, not what it would keep of a large one.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.records import Record, write_records
from engine.checkpoint import read_json
from engine.config import check_range
from engine.text.tokenizer import Tokenizer
from training.data.corpus import Part, Survey, find_sources
from training.data.vocabulary import train_tokenizer
from training.importing import pipeline
from training.importing.calibration import VALID_SHARE, sample_tokens
from training.importing.job import prepare_import
from training.importing.options import ImportOptions

VOCABULARY: Final = 4096
WIDTH: Final = 256
LAYERS: Final = 4
CONTEXT: Final = 256
BATCH: Final = 16
TOKENS: Final = 4_000_000
SEED: Final = 1
PIECE: Final = 1 << 14
QUALITY_TOKENS: Final = 16384
_LEARN_CHARS: Final = 1 << 23


def train_opt(
    paths: Sequence[Path], out: Path, minutes: float, activation: str = "relu"
) -> dict[str, Any]:
    """Train a small OPT for some minutes and save it; returns steps, tokens and the last loss."""
    import transformers

    survey = Survey(find_sources(paths), VALID_SHARE, SEED)
    tokenizer = train_tokenizer(survey.training_text(_LEARN_CHARS), VOCABULARY)
    tokens = sample_tokens(survey, tokenizer, {Part.TRAIN: TOKENS}, SEED, PIECE)[Part.TRAIN]
    rows = torch.from_numpy(tokens.astype("int64"))[: tokens.size // CONTEXT * CONTEXT]
    rows = rows.view(-1, CONTEXT)
    torch.manual_seed(SEED)
    model = transformers.OPTForCausalLM(_config(transformers, tokenizer, activation))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95))
    order = torch.randperm(rows.shape[0])
    began, step, losses = time.monotonic(), 0, [math.nan]
    while (spent := (time.monotonic() - began) / (60 * minutes)) < 1:
        rate = 2e-3 * min(1.0, spent / 0.05) * max(0.05, 1 - spent)
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = order[torch.arange(step * BATCH, (step + 1) * BATCH) % order.numel()]
        loss = model(input_ids=rows[chosen], labels=rows[chosen]).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        step += 1
        if step % 20 == 0:
            print(f"{spent:6.1%} step {step} loss {losses[-1]:.3f}", flush=True)
    model.eval().save_pretrained(out)
    tokenizer.backend.save(str(out / "tokenizer.json"))
    recent = losses[-20:]
    return {"steps": step, "tokens": step * BATCH * CONTEXT, "loss": sum(recent) / len(recent)}


def _config(transformers: Any, tokenizer: Tokenizer, activation: str) -> Any:
    return transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        activation_function=activation,
        dropout=0.0,
        bos_token_id=tokenizer.eos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=1,
    )


def curve_records(out: Path, params: dict[str, Any]) -> list[Record]:
    """Perplexity and covered mass at every k, each beside the dense mode's perplexity."""
    report = read_json(out / "training_report.json")
    evaluation, errors = report["evaluation"], report["standard_errors"]
    dense = evaluation["dense"]["perplexity"]
    records = [Record("import_perplexity", {**params, "policy": "dense"}, dense, "perplexity")]
    for kind in ("routed", "oracle", "random"):
        for k, found in evaluation[kind].items():
            which = {
                **params,
                "policy": kind,
                "k": int(k),
                "share": found["activated_ratio"],
                "standard_error": errors[f"{kind}:{k}"],
            }
            value = found["perplexity"]
            records.append(
                Record("import_perplexity", which, value, "perplexity", dense, dense / value)
            )
            records.append(Record("import_coverage", which, found["coverage"], "share"))
    for layer, found in enumerate(report["layers"]):
        which = {**params, "layer": layer, "router": found["router"]}
        records.append(Record("import_active", which, found["study"]["active"], "share"))
    return records


def print_curve(out: Path) -> None:
    """Loss of perplexity and covered mass by share of the experts."""
    evaluation = read_json(out / "training_report.json")["evaluation"]
    dense = evaluation["dense"]["perplexity"]
    print(f"{'share':>7}{'routed':>10}{'oracle':>10}{'by chance':>10}   mass inside, in that order")
    for k, routed in evaluation["routed"].items():
        found = [evaluation[kind][k] for kind in ("routed", "oracle", "random")]
        losses = "".join(f"{x['perplexity'] / dense - 1:>+10.2%}" for x in found)
        inside = "".join(f"{x['coverage']:>8.1%}" for x in found)
        print(f"{routed['activated_ratio']:>7.2%}{losses}  {inside}")
    print(f"dense: {dense:.2f}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train unless that was done, import, print the curve; with --json, keep the records."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, action="append", required=True, help="to train on")
    parser.add_argument("--valid", type=Path, action="append", default=[], help="to measure on")
    parser.add_argument("--minutes", type=float, default=8.0, help="of training")
    parser.add_argument("--work", type=Path, default=Path("runs/import-quality"))
    parser.add_argument("--experts", type=int, default=0, help="0: what an import chooses")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    given = parser.parse_args(arguments)
    check_range("minutes", given.minutes, 0.01, 600.0)
    model, out = given.work / "model", given.work / "imported"
    kept = given.work / "trained.json"
    if not kept.is_file():
        trained = train_opt(given.data, model, given.minutes)
        kept.write_text(json.dumps({**trained, "minutes": given.minutes}) + "\n", encoding="utf-8")
    params = {**json.loads(kept.read_text(encoding="utf-8")), "seed": SEED}
    options = ImportOptions(num_experts=given.experts, quality_tokens=QUALITY_TOKENS)
    prepared = prepare_import(model, out, given.data, given.valid, options)
    params["experts"] = prepared.plan.config.experts.num_experts
    pipeline.run(
        prepared, out, pipeline.SilentImport(), "python -m benchmarks.training.import_quality"
    )
    print_curve(out)
    if given.json is not None:
        write_records(given.json, curve_records(out, params))


if __name__ == "__main__":
    main()
