"""What computes a step's batch: torch's operators, the CPU's kernels or the GPU's, chosen once.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from engine.config import EngineConfig
from engine.cpu.backend import CpuBackend
from engine.gpu.backend import GpuBackend
from engine.model.attention import KVCache, PagedAttend, SequenceSpan
from engine.model.decoder import Decoder
from engine.model.policy_batch import PolicyBatch
from engine.model.trace import Trace


class Backend(Protocol):
    """A model and its cache of keys and values, over which it computes flat batches."""

    def forward(
        self,
        spans: Sequence[SequenceSpan],
        ids_T: Tensor,
        positions_T: Tensor,
        policy: PolicyBatch,
        trace: Trace,
        rows: Tensor,
    ) -> Tensor:
        """Logits [len(rows), V] in float32 of these rows of the batch.

        Args:
            spans: which tokens belong together, and which cache blocks are theirs.
            ids_T, positions_T: the tokens.
            policy: which experts they use.
            trace: records which experts they used.
            rows: int64, indices of tokens.
        """
        ...


class PlainBackend:
    """A model on torch's operators, on any device."""

    def __init__(self, model: Decoder, cache: KVCache) -> None:
        self.cache = cache
        self._model = model

    def forward(
        self,
        spans: Sequence[SequenceSpan],
        ids_T: Tensor,
        positions_T: Tensor,
        policy: PolicyBatch,
        trace: Trace,
        rows: Tensor,
    ) -> Tensor:
        """As `Backend.forward`."""
        attend = PagedAttend(self.cache, spans)
        logits: Tensor = self._model(ids_T, positions_T, attend, policy, trace, rows)
        return logits


def make_backend(
    model: Decoder, config: EngineConfig, num_blocks: int
) -> PlainBackend | CpuBackend | GpuBackend:
    """The fastest way to run the model where its weights are."""
    weight, shape = model.embedding.weight, model.config
    if CpuBackend.supports(model, config.block_size):
        return CpuBackend(model, num_blocks, config.block_size)
    layers, heads, dim = shape.num_hidden_layers, shape.num_key_value_heads, shape.head_dim
    cache = KVCache(
        layers, num_blocks, config.block_size, heads, dim, weight.dtype, weight.device, shape.window
    )
    if not weight.is_cuda:
        return PlainBackend(model, cache)
    backend = GpuBackend(model, cache)
    if config.cuda_graphs:
        longest = config.max_model_len or shape.max_position_embeddings
        longest = min(longest, num_blocks * config.block_size)
        backend.capture_steps(config.max_num_seqs, config.max_num_batched_tokens, longest)
    return backend
