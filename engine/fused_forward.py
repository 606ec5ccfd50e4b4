"""The decoder's forward pass in fewer launches, over a paged cache; for CUDA.

The same function as `Decoder.forward`. `fused_forward` takes any batch: rotation goes with the
writes to the cache (`HeadsAttend`), and each residual sum with the norm that follows it.
`thin_forward` takes the next tokens of a few sequences: norms and sums go into the products, so a
layer is five launches, six if sparse, each of which fetches its weights while the one before runs.

Shapes: T tokens, D model, V vocabulary, N heads of all kinds, d head dimension, L layers,
E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.experts import PolicyBatch, Trace
from engine.kernels.add_norm import add_norm
from engine.kernels.arrivals import Arrivals
from engine.kernels.thin_linear import MOST_TOKENS, Norm, thin_linear
from engine.model import Attention, Decoder, Layer
from engine.paged_attention import HeadsAttend


def fused_forward(
    model: Decoder,
    ids_T: Tensor,
    attend: HeadsAttend,
    policy: PolicyBatch,
    trace: Trace | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Logits [T, V] in float32, or [len(rows), V] of the given rows of the batch alone."""
    x_TD = model.embedding(ids_T)
    delta_TD: Tensor | None = None
    for layer in model.layers:
        assert isinstance(layer, Layer)
        x_TD, normed_TD = _norm(layer.attention_norm, x_TD, delta_TD)
        delta_TD = _attention(layer.attention, normed_TD, attend)
        x_TD, normed_TD = _norm(layer.ffn_norm, x_TD, delta_TD)
        delta_TD = layer.ffn(normed_TD, policy, trace)
    assert delta_TD is not None
    if rows is not None:
        x_TD, delta_TD = x_TD[rows], delta_TD[rows]
    _, normed_TD = _norm(model.norm, x_TD, delta_TD)
    return F.linear(normed_TD, model.embedding.weight).float()


def runs_thin(tokens: int, max_k: int, num_experts: int) -> bool:
    """Whether `thin_forward` serves a batch: few tokens, and no more pairs than there are experts.

    Beyond that, reading each token's experts by itself costs more than reading all of them once.
    """
    return tokens <= MOST_TOKENS and tokens * max_k <= num_experts


def thin_forward(
    model: Decoder,
    ids_T: Tensor,
    attend: HeadsAttend,
    policy: PolicyBatch,
    arrivals: Arrivals,
    chosen_LTE: Tensor | None,
) -> Tensor:
    """Logits [T, V] in float32; writes each layer's choice, unless all of the batch is dense.

    Args:
        model: prepared for CUDA.
        ids_T: as many as `runs_thin` allows.
        attend: for a batch of next tokens.
        policy: dense for all rows, or sparse for all.
        arrivals: counters that no kernel of another stream uses at the same time.
        chosen_LTE: bool, where the choices go; None for a dense batch.
    """
    x_TD = model.embedding(ids_T)
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        attention, norm = layer.attention, weights_of(layer.attention_norm)
        heads_TN = thin_linear(x_TD, attention.qkv.weight, norm=norm)
        attended_THd = attend(attention.layer, heads_TN.view(x_TD.shape[0], -1, attention.head_dim))
        x_TD = thin_linear(attended_THd.flatten(1), attention.out.weight, add_to=x_TD)
        chosen_TE = None if chosen_LTE is None else chosen_LTE[index]
        x_TD = layer.ffn.add_thin(x_TD, weights_of(layer.ffn_norm), policy, arrivals, chosen_TE)
    weight_VD = model.embedding.weight
    return thin_linear(x_TD, weight_VD, norm=weights_of(model.norm), dtype=torch.float32)


def weights_of(norm: nn.RMSNorm) -> Norm:
    """What the kernels need of a norm."""
    assert norm.weight is not None
    assert norm.eps is not None
    return Norm(norm.weight, norm.eps)


def _norm(norm: nn.RMSNorm, x_TD: Tensor, delta_TD: Tensor | None) -> tuple[Tensor, Tensor]:
    """(x + delta, its norm)."""
    if delta_TD is None:
        return x_TD, norm(x_TD)
    return add_norm(x_TD, delta_TD, *weights_of(norm))


def _attention(attention: Attention, x_TD: Tensor, attend: HeadsAttend) -> Tensor:
    heads_TNd = attention.qkv(x_TD).view(x_TD.shape[0], -1, attention.head_dim)
    attended_THd = attend(attention.layer, heads_TNd)
    out_TD: Tensor = attention.out(attended_THd.reshape(x_TD.shape))
    return out_TD
