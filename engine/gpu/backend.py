"""Runs a model on CUDA over a paged cache, and keeps the graphs from which steps are replayed.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.gpu.attention.batches import attend_spans, supports
from engine.gpu.decode_graphs import DecodeGraphs
from engine.gpu.decoder import KernelDecoder
from engine.gpu.prompt_graphs import PromptGraphs
from engine.model.attention import KVCache, PagedAttend, SequenceSpan
from engine.model.decoder import Decoder
from engine.model.policy_batch import PolicyBatch
from engine.model.trace import Trace


class GpuBackend:
    """A model on CUDA and its cache.

    Attributes:
        cache: keys and values of all layers.
        graphs, prompt_graphs: captured steps; None if the kernels do not take the cache.
    """

    def __init__(self, model: Decoder, cache: KVCache) -> None:
        self.cache = cache
        self._decoder = KernelDecoder(model)
        self._has_kernels = supports(cache)
        self.graphs: DecodeGraphs | None = None
        self.prompt_graphs: PromptGraphs | None = None

    def capture_steps(self, most_requests: int, most_tokens: int, longest: int) -> None:
        """Replay steps from CUDA graphs from now on, where the kernels take the cache.

        Args:
            most_requests: how many requests may run at the same time.
            most_tokens: the most tokens of one step.
            longest: tokens of the longest request.
        """
        if self._has_kernels:
            self.graphs = DecodeGraphs(self._decoder, self.cache, most_requests, longest)
            self.prompt_graphs = PromptGraphs(
                self._decoder, self.cache, most_requests, most_tokens, longest
            )

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
        if self._has_kernels:
            model = self._decoder.model
            group = model.config.num_attention_heads // model.config.num_key_value_heads
            attend = attend_spans(self.cache, spans, (model.cos, model.sin), group)
            return self._decoder.forward(ids_T, attend, policy, trace, rows, positions_T)
        paged = PagedAttend(self.cache, spans)
        return self._decoder.forward_rotated(ids_T, positions_T, paged, policy, trace, rows)
