"""The norms of a decoder, which the CPU's kernels run once prepared."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.cpu import native


def add_scaled(x_TD: Tensor, delta_TD: Tensor, multiplier: float) -> Tensor:
    """x + multiplier * delta in torch's operators, which round the product as well."""
    return x_TD + (delta_TD if multiplier == 1.0 else delta_TD * multiplier)


class RMSNorm(nn.RMSNorm):
    """RMSNorm (Zhang and Sennrich, 2019)."""

    bias = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_size, config.rms_norm_eps)
        self._epsilon = config.rms_norm_eps
        self._prepared = False

    def prepare(self) -> None:
        self._prepared = True

    def forward(self, x_TD: Tensor) -> Tensor:
        if self._prepared:
            return native.rms_norm(x_TD, None, self.weight, self._epsilon)
        return super().forward(x_TD)

    def add(self, x_TD: Tensor, delta_TD: Tensor, multiplier: float = 1.0) -> tuple[Tensor, Tensor]:
        """x + multiplier * delta, and its norm. A prepared norm adds in place."""
        if self._prepared:
            out_TD = native.rms_norm(x_TD, delta_TD, self.weight, self._epsilon, multiplier)
            return x_TD, out_TD
        x_TD = add_scaled(x_TD, delta_TD, multiplier)
        return x_TD, self(x_TD)


class LayerNorm(nn.LayerNorm):
    """LayerNorm (Ba et al. 2016); "layernorm1p" stores its weight less 1."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden_size, config.rms_norm_eps)
        self.less_one = config.norm == "layernorm1p"
        self._prepared = False

    def prepare(self) -> None:
        if not self._prepared and self.less_one:
            self.weight = nn.Parameter(self.weight + 1.0, requires_grad=False)
            self.less_one = False
        self._prepared = True

    def forward(self, x_TD: Tensor) -> Tensor:
        if self._prepared:
            return native.layer_norm(x_TD, None, self.weight, self.bias, self.eps)
        weight = self.weight + 1.0 if self.less_one else self.weight
        return F.layer_norm(x_TD, self.normalized_shape, weight, self.bias, self.eps)

    def add(self, x_TD: Tensor, delta_TD: Tensor, multiplier: float = 1.0) -> tuple[Tensor, Tensor]:
        """As `RMSNorm.add`."""
        if self._prepared:
            weight_D, bias_D = self.weight, self.bias
            out_TD = native.layer_norm(x_TD, delta_TD, weight_D, bias_D, self.eps, multiplier)
            return x_TD, out_TD
        x_TD = add_scaled(x_TD, delta_TD, multiplier)
        return x_TD, self(x_TD)


Norm = RMSNorm | LayerNorm


def norm_of(config: ModelConfig) -> Norm:
    return RMSNorm(config) if config.norm == "rmsnorm" else LayerNorm(config)
