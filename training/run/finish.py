"""The end of a run: weights are rounded to the saved dtype, calibrated, scored and written."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from engine import checkpoint
from engine.model.decoder import Decoder
from training.config import TrainConfig
from training.data.run_data import RunData
from training.errors import writing
from training.experts.activation import observe
from training.experts.conversion import calibrate_routers
from training.quality.evaluation import quality_curve
from training.run.model_card import model_card


@torch.no_grad()
def round_parameters(model: Decoder, dtype: torch.dtype) -> None:
    """Round parameters to values that `dtype` can hold: what is scored is what is saved."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype).to(parameter.dtype))


def write_checkpoint(
    path: Path,
    model: Decoder,
    config: TrainConfig,
    data: RunData,
    history: Mapping[str, Any],
    report: Callable[[str], None],
    *,
    texts: Mapping[str, str],
) -> None:
    """Evaluate `model` dense and by share of experts, and write it with its report and card.

    Args:
        path: the checkpoint's directory.
        model: changed: its weights are rounded and its routers calibrated.
        config: the run's configuration.
        data: the run's tokens.
        history: what the run itself adds to `training_report.json`.
        report: hears which policy is being evaluated.
        texts: files to keep beside the weights, by name.

    Raises:
        StorageError: if it cannot be written.
    """
    # The weights are rounded first, so that exactly what is saved is what is scored.
    round_parameters(model, getattr(torch, config.dtype))
    calibrate_routers(model, data.probe_BL)
    curve = quality_curve(model, data.valid, lambda policy: report(f"evaluate {policy}"))
    # What was measured becomes part of the configuration: `auto` is what it recommends.
    num_experts = config.model.num_experts
    experts = dataclasses.replace(
        model.config.experts,
        default_policy=curve.recommended(num_experts),
        quality=curve.points(num_experts),
    )
    model.config = dataclasses.replace(model.config, experts=experts)
    content = {
        "config": dataclasses.asdict(config),
        "corpus": {
            "description": data.tokens.description,
            "fingerprint": data.tokens.fingerprint,
            "train_tokens": data.tokens.train.size,
            "held_out_tokens": sum(targets.numel() for _, targets in data.valid),
        },
        "tokens_seen": config.steps * config.batch_tokens,
        "active_neurons": observe(model, data.probe_BL).active_shares,
        "evaluation": curve.to_dict(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        **history,
    }
    extra = {**texts, "README.md": model_card(model.config, content)}
    with writing(path, "the training state is intact: free space and run the same command again"):
        checkpoint.save(path, model, data.tokens.tokenizer, content, extra)
