"""Sparse training steps on CUDA: the experts' products with gradients, by the GPU's kernels.

Shapes: T tokens, D model, E experts, K chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.gpu.ffn import training
from engine.model.decoder import Decoder
from engine.model.ffn import ExpertFFN


def use_kernels(model: Decoder) -> None:
    """Let sparse training steps of the model's plain FFNs run on kernels, where these can."""
    for ffn in model.ffns():
        if ffn.is_plain:
            ffn.training_kernels = top_k_ffn


def top_k_ffn(
    ffn: ExpertFFN, x_TD: Tensor, scores_TE: Tensor, k: int
) -> tuple[Tensor, Tensor] | None:
    """Computes the k best experts of every token by kernels; implements `SparseTraining`."""
    trains = x_TD.requires_grad or ffn.up.requires_grad or ffn.down.requires_grad
    supported = training.supports(x_TD, ffn.num_experts)
    if not (torch.is_grad_enabled() and trains and supported):
        return None
    routed = training.choose_top_k(scores_TE, k)
    y_TD = training.ffn(x_TD, ffn.up, ffn.down, routed, ffn.activation)
    return y_TD, routed.chosen_TE
