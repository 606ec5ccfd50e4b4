"""What the FFNs did in one forward pass, for metrics, evaluation and training's penalty.

Shapes: L layers, T tokens, D model, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Trace:
    """What the FFNs did in one forward pass, layer by layer.

    Attributes:
        keep_inputs: each layer's input is kept as well (training's penalty, evaluation).
        mass_every: the true activation mass of every n-th token is kept as well; 0: of none. This
            costs nothing where all neurons are computed anyhow.
        count_fired: with `mass_every`, the neurons of those tokens that fired are counted as well.
        chosen: per layer, the choice [T, E]; None where every token used every expert.
        inputs: per layer, the FFN's input [T, D], if kept.
        masses: per layer, the true mass [T / n, E] of tokens 0, n, 2n and so on, if kept.
        fired: per layer, those counts [T / n], of batches that are not all dense.
    """

    # This is no dataclass: FSDP hands copies of dataclasses to the layers, and what a copy records
    # would be lost.
    def __init__(
        self, keep_inputs: bool = False, mass_every: int = 0, count_fired: bool = False
    ) -> None:
        self.keep_inputs = keep_inputs
        self.mass_every = mass_every
        self.count_fired = count_fired
        self.fired: list[Tensor] = []
        self.chosen: list[Tensor | None] = []
        self.inputs: list[Tensor] = []
        self.masses: list[Tensor] = []
        self._num_experts = 0
        self._num_tokens = 0

    def add(self, x_TD: Tensor, chosen_TE: Tensor | None, num_experts: int) -> None:
        """Record one layer; `chosen_TE` None means that every token used every expert."""
        self._num_experts, self._num_tokens = num_experts, x_TD.shape[0]
        self.chosen.append(chosen_TE)
        if self.keep_inputs:
            self.inputs.append(x_TD)

    def counts(self) -> tuple[Tensor, Tensor]:
        """Experts of each token, [L, T], and distinct experts of all tokens, [L], by layer."""
        chosen = self.choices()
        if not chosen:
            everything = torch.full((len(self.chosen), self._num_tokens + 1), self._num_experts)
            return everything[:, 1:], everything[:, 0]
        chosen_LTE = torch.stack(chosen)
        return chosen_LTE.sum(2), chosen_LTE.any(1).sum(1)

    def choices(self) -> list[Tensor]:
        """The choice of every layer, [T, E] each; none if the batch was dense."""
        chosen = [c for c in self.chosen if c is not None]
        assert len(chosen) in (0, len(self.chosen)), "a batch is dense in all layers or in none"
        return chosen
