"""Rotary positions (RoFormer, Su et al. 2021): frequencies, their scaling, and the tables.

Shapes: P positions, d head dimension, r rotated dimensions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.config import ModelConfig, RopeScaling


def rope_table(max_positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each [max_positions, d/2], of unscaled frequencies."""
    return _tables(max_positions, _frequencies(head_dim, theta))


def rotary_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position of a model, each [P, d/2].

    Dimensions that are not rotated have the angle 0; so have all in models without rotary
    positions.
    """
    half, positions = config.head_dim // 2, config.max_position_embeddings
    if not config.is_rotary:
        return torch.ones(positions, half), torch.zeros(positions, half)
    inverse, factor = _frequencies(config.rotary_dim, config.rope_theta), 1.0
    if config.rope_scaling is not None:
        inverse, factor = _scaled(inverse, config.rope_theta, config.rope_scaling)
    cos, sin = _tables(positions, inverse)
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    rest = half - inverse.numel()
    if rest:
        cos = torch.cat([cos, torch.ones(positions, rest)], dim=1)
        sin = torch.cat([sin, torch.zeros(positions, rest)], dim=1)
    return cos, sin


def _frequencies(dim: int, theta: float) -> Tensor:
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def _tables(positions: int, inverse: Tensor) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), inverse)
    return angles.cos().float(), angles.sin().float()


def _scaled(inverse: Tensor, theta: float, scaling: RopeScaling) -> tuple[Tensor, float]:
    """(frequencies, factor of cosines and sines)."""
    if scaling.rope_type == "linear":
        return inverse / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(inverse, scaling), 1.0
    if scaling.rope_type == "yarn":
        return _yarn(inverse, theta, scaling), _yarn_factor(scaling)
    # "dynamic" scales only positions beyond the model's limit, which no request reaches
    return inverse, 1.0


def _llama3(inverse: Tensor, scaling: RopeScaling) -> Tensor:
    """Divide low frequencies, keep high ones, and interpolate between them (Llama 3.1)."""
    turns = (scaling.original_max_position_embeddings or 0) * inverse / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return inverse * kept + inverse / scaling.factor * (1 - kept)


def _yarn(inverse: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    """Interpolate the frequencies by dimension (YaRN, Peng et al. 2023, "NTK-by-parts")."""
    half = inverse.numel()
    context = scaling.original_max_position_embeddings or 0

    def dimension(rotations: float) -> float:
        return half * math.log(context / (rotations * 2 * math.pi)) / math.log(theta)

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    if low == high:
        high += 0.001
    divided = ((torch.arange(half, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return inverse * (1 - divided) + inverse / scaling.factor * divided


def _yarn_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)
