"""The decoder's forward pass in fewer launches, over a paged cache; for CUDA.

The same function as `Decoder.forward`. `fused_forward` takes any batch: rotation goes with the
writes to the cache (`HeadsAttend`), and each residual sum with the norm that follows it.
`thin_forward` takes the next token of one sequence: norms and sums go into the products, so a layer
is five launches, six if sparse, each of which fetches its weights while the one before runs.

Shapes: T tokens, D model, V vocabulary, N heads of all kinds, d head dimension, L layers,
E experts.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.gpu.add_norm import Norm, add_norm
from engine.gpu.arrivals import Arrivals
from engine.gpu.attention.batches import HeadsAttend
from engine.gpu.thin_linear import thin_linear
from engine.model.decoder import Attention, Decoder, Layer
from engine.model.norms import RMSNorm
from engine.model.policy_batch import PolicyBatch
from engine.model.trace import Trace


def fused_forward(
    model: Decoder,
    ids_T: Tensor,
    attend: HeadsAttend,
    policy: PolicyBatch,
    trace: Trace | None = None,
    rows: Tensor | None = None,
    positions_T: Tensor | None = None,
) -> Tensor:
    """Logits [T, V] in float32, or [len(rows), V] of the given rows of the batch alone.

    Models with learned positions need `positions_T`. Only of a plain model (`Decoder.is_plain`) are
    norms and sums one launch.
    """
    if not model.is_plain:
        return _any_forward(model, ids_T, attend, policy, trace, rows, positions_T)
    x_TD = model.embedding(ids_T)
    delta_TD: Tensor | None = None
    for layer in model.layers:
        assert isinstance(layer, Layer)
        assert isinstance(layer.attention_norm, RMSNorm)
        assert isinstance(layer.ffn_norm, RMSNorm)
        x_TD, normed_TD = _norm(layer.attention_norm, x_TD, delta_TD)
        delta_TD = _attention(layer.attention, normed_TD, attend)
        x_TD, normed_TD = _norm(layer.ffn_norm, x_TD, delta_TD)
        delta_TD = layer.ffn(normed_TD, policy, trace)
    assert delta_TD is not None
    assert isinstance(model.norm, RMSNorm)
    if rows is not None:
        x_TD, delta_TD = x_TD[rows], delta_TD[rows]
    _, normed_TD = _norm(model.norm, x_TD, delta_TD)
    return F.linear(normed_TD, model.embedding.weight).float()


def _any_forward(
    model: Decoder,
    ids_T: Tensor,
    attend: HeadsAttend,
    policy: PolicyBatch,
    trace: Trace | None,
    rows: Tensor | None,
    positions_T: Tensor | None,
) -> Tensor:
    """`fused_forward` of any model, norms and sums by torch's operators."""
    x_TD = model.embed(ids_T, positions_T)
    for layer in model.layers:
        assert isinstance(layer, Layer)
        attention = partial(_attention, layer.attention, attend=attend)
        x_TD = layer.around(x_TD, attention, policy, trace)
    return model.logits_of(model.last_norm(x_TD if rows is None else x_TD[rows]))


def thin_forward(
    model: Decoder,
    ids_1: Tensor,
    attend: HeadsAttend,
    policy: PolicyBatch,
    arrivals: Arrivals,
    chosen_L1E: Tensor | None,
) -> Tensor:
    """Logits [1, V] in float32 of one token; writes each layer's choice, unless it is dense.

    Args:
        model: prepared for CUDA; a plain one (`Decoder.is_plain`).
        ids_1: the token.
        attend: for the next token of a sequence.
        policy: of the token.
        arrivals: counters that no kernel of another stream uses at the same time.
        chosen_L1E: bool, where the choices go; None for a dense token.
    """
    assert isinstance(model.norm, RMSNorm)
    x_1D = model.embedding(ids_1)
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        assert isinstance(layer.attention_norm, RMSNorm)
        assert isinstance(layer.ffn_norm, RMSNorm)
        attention, norm = layer.attention, weights_of(layer.attention_norm)
        heads_1N = thin_linear(x_1D, attention.qkv.weight, norm=norm)
        attended_1Hd = attend(attention.layer, heads_1N.view(1, -1, attention.head_dim))
        x_1D = thin_linear(attended_1Hd.flatten(1), attention.out.weight, add_to=x_1D)
        chosen_1E = None if chosen_L1E is None else chosen_L1E[index]
        x_1D = layer.ffn.add_thin(x_1D, weights_of(layer.ffn_norm), policy, arrivals, chosen_1E)
    weight_VD = model.embedding.weight
    return thin_linear(x_1D, weight_VD, norm=weights_of(model.norm), dtype=torch.float32)


def weights_of(norm: RMSNorm) -> Norm:
    """What the kernels need of a norm."""
    assert norm.weight is not None
    assert norm.eps is not None
    return Norm(norm.weight, norm.eps)


def _norm(norm: RMSNorm, x_TD: Tensor, delta_TD: Tensor | None) -> tuple[Tensor, Tensor]:
    """(x + delta, its norm)."""
    if delta_TD is None:
        return x_TD, norm(x_TD)
    return add_norm(x_TD, delta_TD, *weights_of(norm))


def _attention(attention: Attention, x_TD: Tensor, attend: HeadsAttend) -> Tensor:
    heads_TNd = attention.qkv(x_TD).view(x_TD.shape[0], -1, attention.head_dim)
    attended_THd = attend(attention.layer, heads_TNd)
    out_TD: Tensor = attention.out(attended_THd.flatten(1))
    return out_TD
