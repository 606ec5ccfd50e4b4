"""Runs a packed model over the CPU's paged cache: all layers in one call where that is possible.

Shapes: T tokens, D model, E experts, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.cpu import pack
from engine.cpu.attention import NativeAttend
from engine.cpu.cache import KV_BLOCK, PagedCache
from engine.cpu.layers import Limits, PackedLayers
from engine.model.attention import SequenceSpan
from engine.model.decoder import Decoder
from engine.model.policy_batch import PolicyBatch
from engine.model.trace import Trace


class CpuBackend:
    """A packed decoder and its cache.

    Attributes:
        cache: keys and values of all layers.
    """

    def __init__(self, model: Decoder, num_blocks: int, block_size: int) -> None:
        """Pack `model`, whose parameters are released."""
        shape, slots = model.config, num_blocks * block_size
        layers, heads, dim = shape.num_hidden_layers, shape.num_key_value_heads, shape.head_dim
        dtype = model.embedding.weight.dtype
        self.cache = PagedCache(layers, slots, heads, dim, dtype, shape.window)
        self._model, self._block_size = model, block_size
        pack.pack(model)
        self._layers = PackedLayers(model)

    @staticmethod
    def supports(model: Decoder, block_size: int) -> bool:
        """Whether the kernels take this model here, and blocks of this size."""
        return pack.supports(model) and block_size % KV_BLOCK == 0

    def forward(
        self,
        spans: Sequence[SequenceSpan],
        ids_T: Tensor,
        positions_T: Tensor,
        policy: PolicyBatch,
        trace: Trace,
        rows: Tensor,
    ) -> Tensor:
        """Logits [len(rows), V] in float32 of these rows of the batch; see `Decoder.forward`."""
        attend = NativeAttend(self.cache, self._block_size, spans)
        # the trace wants more than the one call for all layers records
        if policy.oracle or trace.keep_inputs or trace.mass_every:
            logits: Tensor = self._model(ids_T, positions_T, attend, policy, trace, rows)
            return logits
        return self._all_layers(ids_T, positions_T, attend, policy, trace, rows)

    def _all_layers(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        attend: NativeAttend,
        policy: PolicyBatch,
        trace: Trace,
        rows: Tensor,
    ) -> Tensor:
        model, num_experts = self._model, self._model.config.experts.num_experts
        limits = None
        if not policy.all_dense:
            most = policy.max_k if policy.dense is None else num_experts
            limits = Limits(policy.k_T, policy.mass_T, most)
        x_TD = model.embed(ids_T, positions_T).contiguous()
        turns = model.turns(positions_T) if model.config.is_rotary else None
        delta_TD, chosen_LTE = self._layers(x_TD, turns, attend.sequences, limits)
        for layer in range(model.config.num_hidden_layers):
            trace.add(x_TD, None if chosen_LTE is None else chosen_LTE[layer], num_experts)
        x_TD, delta_TD = x_TD[rows], delta_TD[rows]
        if model.norm is not None:
            x_TD = model.norm.add(x_TD, delta_TD, model.config.residual_multiplier)[1]
        return model.logits_of(x_TD)
