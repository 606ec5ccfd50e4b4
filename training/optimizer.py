"""AdamW and its schedule; the learning rate is a pure function of the step."""

from __future__ import annotations

import math

import torch

from engine.model import Decoder
from training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then cosine decay to `min_lr_share` of the peak at the last step."""
    optimizer = config.optimizer
    warmup = max(1, round(optimizer.warmup_share * config.steps))
    if step < warmup:
        return optimizer.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - 1 - warmup)
    floor = optimizer.min_lr_share
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return optimizer.learning_rate * (floor + (1 - floor) * cosine)


def build_optimizer(model: Decoder, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    settings = config.optimizer
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        fused=True,
    )
