"""How many experts an evaluation used, and how much of the activation mass they held.

Shapes: T tokens, D model, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.model.decoder import Decoder
from engine.model.trace import Trace
from training.experts.activation import hidden


@dataclass
class ExpertUse:
    """Running totals over batches, layers and tokens.

    Attributes:
        activated: token-expert pairs that ran.
        available: token-expert pairs there were.
        inside: true activation mass of the chosen experts.
        total: true activation mass of all experts, where there was a choice.
    """

    activated: int = 0
    available: int = 0
    inside: float = 0.0
    total: float = 0.0

    def add(self, model: Decoder, trace: Trace, real_T: Tensor | None = None) -> None:
        """Count what `trace` recorded; `real_T` (indices, int64) leaves padding out."""
        num_experts = model.config.experts.num_experts
        counts_LT, _ = trace.counts()
        real = counts_LT if real_T is None else counts_LT[:, real_T.to(counts_LT.device)]
        self.activated += int(real.sum())
        self.available += real.numel() * num_experts
        for ffn, x_TD, chosen_TE in zip(model.ffns(), trace.inputs, trace.chosen, strict=False):
            if chosen_TE is None:
                continue
            if real_T is not None:
                x_TD, chosen_TE = x_TD[real_T], chosen_TE[real_T]
            mass_TE = ffn.mass_of(hidden(ffn, x_TD))
            self.inside += float((mass_TE * chosen_TE).sum())
            self.total += float(mass_TE.sum())

    @property
    def activated_ratio(self) -> float:
        """Share of the experts that tokens used."""
        return self.activated / self.available if self.available else 0.0

    @property
    def coverage(self) -> float:
        """Share of the true activation mass inside the chosen experts; 1 if dense."""
        return self.inside / self.total if self.total else 1.0
