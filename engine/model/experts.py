"""Experts: which neurons belong together, and the router rows that stand for them.

An expert is a contiguous slice of neurons. With `up [F, D]` and `down [F, D]` stored neuron by
neuron, expert e owns rows e*S .. (e+1)*S of both (engine/model/ffn.py computes with them).

Shapes: T tokens, D model, F neurons, E experts, S neurons per expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from engine.errors import require
from engine.model.activations import activate_reference


@dataclass(frozen=True)
class ExpertLayout:
    """Which neuron goes where: row i of the new order is row `order_F[i]` of the old one.

    After `apply`, expert e owns rows e*S .. (e+1)*S. The same layout must be applied to every
    tensor that is indexed by neuron: `up`, `down`, and the optimiser's moments of both.
    """

    order_F: Tensor
    num_experts: int

    @classmethod
    def from_labels(cls, labels_F: Tensor, num_experts: int) -> Self:
        """Group neurons by their expert label, keeping the old order inside an expert.

        Raises:
            ConfigError: unless every one of the `num_experts` labels occurs equally often.
        """
        counts_E = torch.bincount(labels_F, minlength=num_experts)
        size = labels_F.numel() // num_experts
        require(
            counts_E.numel() == num_experts and bool((counts_E == size).all()),
            f"every expert must own exactly {size} neurons, got {counts_E.tolist()}",
        )
        return cls(torch.argsort(labels_F, stable=True), num_experts)

    @property
    def expert_size(self) -> int:
        return self.order_F.numel() // self.num_experts

    def apply(self, rows_F: Tensor) -> Tensor:
        """`rows_F` [F, ...] in the new order."""
        return rows_F[self.order_F.to(rows_F.device)]

    def inverse(self) -> ExpertLayout:
        """The layout that undoes this one."""
        return ExpertLayout(torch.argsort(self.order_F), self.num_experts)


def centroid_router(up_FD: Tensor, num_experts: int, norm: float = 1.0) -> Tensor:
    """Router rows from the experts' own neurons: [E, D].

    The mean of an expert's L2-normalised rows of `up`, renormalised, at one common norm for all
    experts (the released MoEfication/SSD clustering code; see docs/ssd.md). The common norm does
    not change any ranking; it sets how sharp the predicted shares softmax(scores) are.
    """
    unit_FD = nn.functional.normalize(up_FD.detach().float(), dim=1)
    mean_ED = unit_FD.view(num_experts, -1, up_FD.shape[1]).mean(1)
    return nn.functional.normalize(mean_ED, dim=1) * norm


def true_mass(x_TD: Tensor, up_FD: Tensor, num_experts: int, activation: str) -> Tensor:
    """Activation mass of each expert, [T, E]: the sum of its neurons' activations."""
    return mass_of(activate_reference(x_TD @ up_FD.T, activation), num_experts)


def mass_of(hidden_TF: Tensor, num_experts: int, *, gated: bool = False) -> Tensor:
    """The activation mass of each expert, [T, E]; gated neurons count by their absolute value."""
    hidden_TF = hidden_TF.abs() if gated else hidden_TF
    return hidden_TF.view(hidden_TF.shape[0], num_experts, -1).sum(-1)
