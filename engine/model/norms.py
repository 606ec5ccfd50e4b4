"""The norms of a decoder."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import ModelConfig


def add_scaled(x_TD: Tensor, delta_TD: Tensor, multiplier: float) -> Tensor:
    """x + multiplier * delta in torch's operators, which round the product as well."""
    return x_TD + (delta_TD if multiplier == 1.0 else delta_TD * multiplier)


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang and Sennrich, 2019)."""

    bias = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_size, config.rms_norm_eps)

    def add(self, x_TD: Tensor, delta_TD: Tensor, multiplier: float = 1.0) -> tuple[Tensor, Tensor]:
        """x + multiplier * delta, and its norm."""
        x_TD = add_scaled(x_TD, delta_TD, multiplier)
        return x_TD, self(x_TD)


class LayerNorm(nn.LayerNorm):
    """LayerNorm (Ba et al. 2016); "layernorm1p" stores its weight less 1."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_size, config.rms_norm_eps)
        self.less_one = config.norm == "layernorm1p"

    @property
    def full_weight(self) -> Tensor:
        """What the normed input is multiplied by, [D]."""
        return self.weight + 1.0 if self.less_one else self.weight

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.layer_norm(x_TD, self.normalized_shape, self.full_weight, self.bias, self.eps)

    def add(self, x_TD: Tensor, delta_TD: Tensor, multiplier: float = 1.0) -> tuple[Tensor, Tensor]:
        """x + multiplier * delta, and its norm."""
        x_TD = add_scaled(x_TD, delta_TD, multiplier)
        return x_TD, self(x_TD)


Norm = RMSNorm | LayerNorm


def norm_of(config: ModelConfig) -> Norm:
    return RMSNorm(config) if config.norm == "rmsnorm" else LayerNorm(config)
