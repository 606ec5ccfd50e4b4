"""The decoder's forward pass in fewer launches, over a paged cache; for CUDA.

The same function as `Decoder.forward`. Rotation goes with the writes to the cache
(`KernelAttend`), and each residual sum with the norm that follows it.

Shapes: T tokens, D model, V vocabulary, N heads of all kinds, d head dimension, c = d / 2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from engine.experts import PolicyBatch, Trace
from engine.kernels.add_norm import add_norm
from engine.model import Attention, Decoder, Layer
from engine.paged_attention import KernelAttend


def fused_forward(
    model: Decoder,
    ids_T: Tensor,
    positions_T: Tensor,
    attend: KernelAttend,
    policy: PolicyBatch,
    trace: Trace | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Logits [T, V] in float32, or [len(rows), V] of the given rows of the batch alone."""
    x_TD = model.embedding(ids_T)
    turns = model.cos[positions_T], model.sin[positions_T]
    delta_TD: Tensor | None = None
    for layer in model.layers:
        assert isinstance(layer, Layer)
        x_TD, normed_TD = _norm(layer.attention_norm, x_TD, delta_TD)
        delta_TD = _attention(layer.attention, normed_TD, *turns, attend)
        x_TD, normed_TD = _norm(layer.ffn_norm, x_TD, delta_TD)
        delta_TD = layer.ffn(normed_TD, policy, trace)
    assert delta_TD is not None
    if rows is not None:
        x_TD, delta_TD = x_TD[rows], delta_TD[rows]
    _, normed_TD = _norm(model.norm, x_TD, delta_TD)
    return F.linear(normed_TD, model.embedding.weight).float()


def _norm(norm: nn.RMSNorm, x_TD: Tensor, delta_TD: Tensor | None) -> tuple[Tensor, Tensor]:
    """(x + delta, its norm)."""
    if delta_TD is None:
        return x_TD, norm(x_TD)
    assert norm.weight is not None
    assert norm.eps is not None
    return add_norm(x_TD, delta_TD, norm.weight, norm.eps)


def _attention(
    attention: Attention, x_TD: Tensor, cos_Tc: Tensor, sin_Tc: Tensor, attend: KernelAttend
) -> Tensor:
    heads_TNd = attention.qkv(x_TD).view(x_TD.shape[0], -1, attention.head_dim)
    attended_THd = attend(attention.layer, heads_TNd, cos_Tc, sin_Tc)
    out_TD: Tensor = attention.out(attended_THd.reshape(x_TD.shape))
    return out_TD
