"""The decoder's forward pass on CUDA: the weights of a plain model, kernels, and fewer launches.

`KernelDecoder.forward` takes any batch: rotation goes with the writes to the cache (`HeadsAttend`),
and each residual sum with the norm that follows it. `KernelDecoder.next_token` takes the next token
of one sequence: norms and sums go into the products, so a layer is five launches, six if sparse,
each of which fetches its weights while the one before runs.

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
from engine.gpu.ffn.layer import KernelFFN
from engine.gpu.thin_linear import thin_linear
from engine.model.attention import Attend
from engine.model.decoder import Attention, Decoder, Layer
from engine.model.norms import RMSNorm
from engine.model.policy_batch import PolicyBatch
from engine.model.trace import Trace


def is_plain(model: Decoder) -> bool:
    """Whether the model is built like those trained here, whose norms and sums are fused."""
    config = model.config
    scales = config.embedding_multiplier, config.residual_multiplier, config.logits_scaling
    return (
        config.norm == "rmsnorm"
        and config.do_layer_norm_before
        and config.is_rotary
        and not config.attention_bias
        and model.head is None
        and model.project_in is None
        and scales == (1.0, 1.0, 1.0)
        and all(ffn.is_plain for ffn in model.ffns())
    )


class KernelDecoder:
    """A model computed by the GPU's kernels; its parameters stay where they are.

    Attributes:
        model: the weights.
        is_plain: whether norms and sums are fused; other models take torch's operators for them.
    """

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.is_plain = is_plain(model)
        self._layers = [layer for layer in model.layers if isinstance(layer, Layer)]
        # Each layer has its own counters: in a captured graph two layers' kernels may overlap.
        self._ffns = [KernelFFN(ffn, Arrivals(ffn.up.device)) for ffn in model.ffns()]

    def forward(
        self,
        ids_T: Tensor,
        attend: HeadsAttend,
        policy: PolicyBatch,
        trace: Trace | None = None,
        rows: Tensor | None = None,
        positions_T: Tensor | None = None,
    ) -> Tensor:
        """Logits [T, V] in float32, or [len(rows), V] of the given rows of the batch alone.

        Models with learned positions need `positions_T`.
        """
        if self.is_plain:
            return self._fused(ids_T, attend, policy, trace, rows)
        x_TD = self.model.embed(ids_T, positions_T)
        for layer, ffn in zip(self._layers, self._ffns, strict=True):
            attention = partial(_attention, layer.attention, attend=attend)
            x_TD = layer.around(x_TD, attention, partial(ffn, policy=policy, trace=trace))
        return self._logits(x_TD, rows)

    def forward_rotated(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        attend: Attend,
        policy: PolicyBatch,
        trace: Trace | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """`forward` with an `attend` that no kernel serves: it gets heads already rotated."""
        x_TD = self.model.embed(ids_T, positions_T)
        turns = self.model.turns(positions_T)
        for layer, ffn in zip(self._layers, self._ffns, strict=True):
            attention = partial(_rotated_attention, layer.attention, turns=turns, attend=attend)
            x_TD = layer.around(x_TD, attention, partial(ffn, policy=policy, trace=trace))
        return self._logits(x_TD, rows)

    def next_token(
        self,
        ids_1: Tensor,
        attend: HeadsAttend,
        policy: PolicyBatch,
        arrivals: Arrivals,
        chosen_L1E: Tensor | None,
    ) -> Tensor:
        """Logits [1, V] in float32 of one token, by a plain model.

        Args:
            ids_1: the token.
            attend: attention for the next token of a sequence.
            policy: which experts the token uses.
            arrivals: counters that no kernel of another stream uses at the same time.
            chosen_L1E: bool, where each layer's choice is written; None for a dense token.
        """
        model = self.model
        assert isinstance(model.norm, RMSNorm)
        x_1D: Tensor = model.embedding(ids_1)
        for index, (layer, ffn) in enumerate(zip(self._layers, self._ffns, strict=True)):
            assert isinstance(layer.attention_norm, RMSNorm)
            assert isinstance(layer.ffn_norm, RMSNorm)
            attention, norm = layer.attention, weights_of(layer.attention_norm)
            heads_1N = thin_linear(x_1D, attention.qkv.weight, norm=norm)
            attended_1Hd = attend(attention.layer, heads_1N.view(1, -1, attention.head_dim))
            x_1D = thin_linear(attended_1Hd.flatten(1), attention.out.weight, add_to=x_1D)
            chosen_1E = None if chosen_L1E is None else chosen_L1E[index]
            x_1D = ffn.add_to_token(x_1D, weights_of(layer.ffn_norm), policy, arrivals, chosen_1E)
        weight_VD = model.embedding.weight
        return thin_linear(x_1D, weight_VD, norm=weights_of(model.norm), dtype=torch.float32)

    def _fused(
        self,
        ids_T: Tensor,
        attend: HeadsAttend,
        policy: PolicyBatch,
        trace: Trace | None,
        rows: Tensor | None,
    ) -> Tensor:
        """`forward` of a plain model: the kernel of the next norm adds what a layer computed."""
        model = self.model
        x_TD: Tensor = model.embedding(ids_T)
        delta_TD: Tensor | None = None
        for layer, ffn in zip(self._layers, self._ffns, strict=True):
            assert isinstance(layer.attention_norm, RMSNorm)
            assert isinstance(layer.ffn_norm, RMSNorm)
            x_TD, normed_TD = _norm(layer.attention_norm, x_TD, delta_TD)
            delta_TD = _attention(layer.attention, normed_TD, attend)
            x_TD, normed_TD = _norm(layer.ffn_norm, x_TD, delta_TD)
            delta_TD = ffn(normed_TD, policy, trace)
        assert delta_TD is not None
        assert isinstance(model.norm, RMSNorm)
        if rows is not None:
            x_TD, delta_TD = x_TD[rows], delta_TD[rows]
        _, normed_TD = _norm(model.norm, x_TD, delta_TD)
        return F.linear(normed_TD, model.embedding.weight).float()

    def _logits(self, x_TD: Tensor, rows: Tensor | None) -> Tensor:
        model = self.model
        return model.logits_of(model.last_norm(x_TD if rows is None else x_TD[rows]))


def weights_of(norm: RMSNorm) -> Norm:
    """The numbers of a norm that the kernels need."""
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


def _rotated_attention(
    attention: Attention, x_TD: Tensor, turns: tuple[Tensor, Tensor], attend: Attend
) -> Tensor:
    out_TD: Tensor = attention(x_TD, *turns, attend)
    return out_TD
