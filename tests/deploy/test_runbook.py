"""What docs/operations.md computes is what the engine computes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import torch

from benchmarks.models import SHAPES, Shape, model_config
from engine.checkpoint import STARTER
from engine.config import EngineConfig, ModelConfig
from engine.serving.runner import plan_cache
from tests.deploy.prometheus import ROOT

OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
MODELS = {
    "the starter": ModelConfig.from_dict(json.loads((STARTER / "config.json").read_text())),
    "OPT-125M's shape": model_config(SHAPES["opt-125m"], 32, torch.bfloat16),
    "OPT-1.3B's shape": model_config(SHAPES["opt-1.3b"], 32, torch.bfloat16),
    "OPT-6.7B's shape": model_config(Shape(4096, 32, 16384, 32, 50272), 32, torch.bfloat16),
}


def sizing_rows() -> Iterator[list[str]]:
    table = re.search(r"\| model \| weights \|.*?\n\n", OPERATIONS, re.DOTALL)
    assert table
    for line in table[0].strip().splitlines()[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_of_sizes_is_the_engine_s_own_budget() -> None:
    """Weights, KV bytes a token, and what one GiB holds, from the plan that serving makes."""
    rows = {row[0]: row[1:] for row in sizing_rows()}
    assert set(rows) == set(MODELS)
    config = EngineConfig(kv_cache_bytes=1 << 30, max_num_seqs=4096, max_num_batched_tokens=4096)
    for name, model in MODELS.items():
        blocks, _ = plan_cache(model, config, torch.bfloat16)
        tokens = blocks * config.block_size
        per_token = (1 << 30) // tokens
        weights = model.num_parameters * 2
        context = model.max_position_embeddings
        expected = [f"{weights / 1e9:.2g} GB", f"{per_token / 1024:.0f} KiB", f"{tokens:,}"]
        expected += [f"{tokens // context} of {context:,}"]
        assert rows[name] == expected, name
