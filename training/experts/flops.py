"""Training FLOPs, counted from the shape: what a step costs, dense or sparse.

A multiply-add counts 2; a backward pass costs twice its forward pass; elementwise work, norms,
softmax and the optimiser are left out, as usual (Kaplan et al. 2020). docs/ssd.md has the formula.

Shapes: D model, F neurons, E experts, K chosen, L length.
"""

from __future__ import annotations

from typing import Final

from engine.config import ModelConfig
from training.config import SwitchConfig

_TRAINING: Final = 3  # forward, and backward by inputs and by weights


class FlopCounter:
    """Training FLOPs per token of one model under one switch configuration."""

    def __init__(self, config: ModelConfig, switch: SwitchConfig, length: int) -> None:
        d, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
        q, layers = config.num_attention_heads * config.head_dim, config.num_hidden_layers
        projections = 2 * (2 * d * q + 2 * d * kv)
        attention = 2 * q * length  # scores and values over half of the positions on average
        self._base = layers * (projections + attention) + 2 * d * config.vocab_size
        firsts = 2 if config.gated_mlp else 1  # matrices before the activation
        self._ffn = layers * 2 * ((firsts + 1) * d * config.intermediate_size)
        self._first = self._ffn * firsts / (firsts + 1)
        self._router = layers * 2 * d * config.experts.num_experts
        self._num_experts = config.experts.num_experts
        self._switch = switch

    def token(self, top_k: int | None) -> float:
        """FLOPs per token of a step with `top_k` experts, penalty and router included.

        None is a dense step, which has the true mass of every expert at hand: its penalty costs the
        router's product alone. A sparse step computes the first product of all experts on the share
        of tokens that the penalty is measured on, forward and backward.
        """
        switch = self._switch
        if top_k is None:
            step, router = self.plain_token, 0.0
            sampled = self._router if switch.dense_weight else 0.0
        else:
            step = _TRAINING * (self._base + self._ffn * top_k / self._num_experts)
            router = self._router
            sampled = _TRAINING * self._first if switch.penalty else 0.0
        return step + router + sampled / switch.penalty_every

    @property
    def plain_token(self) -> float:
        """FLOPs per token of dense training, without experts."""
        return float(_TRAINING * (self._base + self._ffn))
