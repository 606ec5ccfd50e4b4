"""A ReLU model that no sparse training has seen, imported: what do its experts keep?

    python -m benchmarks.import_quality --data PATH ... [--minutes 8] [--json FILE]

Trains a small OPT (transformers' own class, ReLU, 4.3 M parameters) on text in the plain, dense
way, saves it as transformers does, imports that directory, and prints perplexity against the share
of the experts: routed, by oracle, and by chance. The model is small and briefly trained: this shows
what conversion alone keeps of such a model, not what it would keep of a large one.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from engine.config import check_range
from engine.tokenizer import Tokenizer
from training.corpus import Part, Survey, find_sources
from training.importing.calibration import VALID_SHARE, sample_tokens
from training.vocabulary import train_tokenizer

VOCABULARY: Final = 4096
WIDTH: Final = 256
LAYERS: Final = 4
CONTEXT: Final = 256
BATCH: Final = 16
TOKENS: Final = 4_000_000
SEED: Final = 1
PIECE: Final = 1 << 14
_LEARN_CHARS: Final = 1 << 23


def train_opt(paths: Sequence[Path], out: Path, minutes: float) -> dict[str, Any]:
    """Train a small OPT for some minutes and save it; returns steps, tokens and the last loss."""
    import transformers

    survey = Survey(find_sources(paths), VALID_SHARE, SEED)
    tokenizer = train_tokenizer(survey.training_text(_LEARN_CHARS), VOCABULARY)
    tokens = sample_tokens(survey, tokenizer, {Part.TRAIN: TOKENS}, SEED, PIECE)[Part.TRAIN]
    rows = torch.from_numpy(tokens.astype("int64"))[: tokens.size // CONTEXT * CONTEXT]
    rows = rows.view(-1, CONTEXT)
    torch.manual_seed(SEED)
    model = transformers.OPTForCausalLM(_config(transformers, tokenizer))
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


def _config(transformers: Any, tokenizer: Tokenizer) -> Any:
    return transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        activation_function="relu",
        dropout=0.0,
        bos_token_id=tokenizer.eos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=1,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="text to train on")
    parser.add_argument("--minutes", type=float, default=8.0, help="of training")
    parser.add_argument("--work", type=Path, required=True)
    given = parser.parse_args(arguments)
    check_range("minutes", given.minutes, 0.01, 600.0)
    print(train_opt(given.data, given.work, given.minutes))


if __name__ == "__main__":
    main()
