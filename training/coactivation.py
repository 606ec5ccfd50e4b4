"""Neurons by the tokens they fire on: rows to cluster, as an alternative to the rows of `up`.

Two neurons whose weights point apart may still fire on the same tokens. A neuron's row here is the
square root of its activation on each probe token, so that a few strong tokens do not decide alone.
The choice of the root is ours; docs/ssd.md has the comparison.

Shapes: T probe tokens, D model, F neurons, R columns.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from engine.kernels.expert_ffn import activate_reference

COLUMNS: Final = 512
_CHUNK: Final = 4096  # tokens whose activations are in memory at once


@torch.no_grad()
def coactivation_rows(
    x_TD: Tensor,
    up_FD: Tensor,
    activation: str,
    generator: torch.Generator,
    columns: int = COLUMNS,
) -> Tensor:
    """Each neuron's firing on the probe tokens, float32 [F, min(T, R)].

    More tokens than `columns` are projected at random (Johnson and Lindenstrauss), which keeps the
    angles between rows to about 1/sqrt(R); the activations of all tokens are never in memory.

    Args:
        x_TD: the FFN's inputs on probe tokens; several thousand show who fires with whom.
        up_FD: first weights of the FFN.
        activation: as in ModelConfig.
        generator: on the CPU; draws the projection.
        columns: most columns of the result.
    """
    tokens = x_TD.shape[0]
    if tokens <= columns:
        return _firing(x_TD, up_FD, activation)
    rows_FR = torch.zeros(up_FD.shape[0], columns, device=up_FD.device)
    for chunk_CD in torch.split(x_TD, _CHUNK):
        mix_CR = torch.randn(chunk_CD.shape[0], columns, generator=generator).to(up_FD.device)
        rows_FR += _firing(chunk_CD, up_FD, activation) @ mix_CR
    return rows_FR


def _firing(x_TD: Tensor, up_FD: Tensor, activation: str) -> Tensor:
    return activate_reference(x_TD.to(up_FD.dtype) @ up_FD.T, activation).float().sqrt().T
