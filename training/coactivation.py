"""Neurons by the tokens they fire on: rows to cluster, as an alternative to the rows of `up`.

Two neurons whose weights point apart may still fire on the same tokens. A neuron's row here is the
square root of its activation on each probe token, so that a few strong tokens do not decide alone.
The choice of the root is ours; docs/ssd.md has the comparison.

Shapes: T probe tokens, D model, F neurons, R columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

COLUMNS: Final = 512
_CHUNK: Final = 4096  # tokens whose activations are in memory at once


@torch.no_grad()
def coactivation_rows(
    x_TD: Tensor,
    hidden: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    columns: int = COLUMNS,
) -> Tensor:
    """Each neuron's firing on the probe tokens, float32 [F, min(T, R)].

    More tokens than `columns` are projected at random (Johnson and Lindenstrauss), which keeps the
    angles between rows to about 1/sqrt(R); the activations of all tokens are never in memory.

    Args:
        x_TD: the FFN's inputs on probe tokens; several thousand show who fires with whom.
        hidden: inputs [T, D] to the activations [T, F] of all neurons.
        generator: on the CPU; draws the projection.
        columns: most columns of the result.
    """
    if x_TD.shape[0] <= columns:
        return _firing(hidden(x_TD))
    rows_FR = None
    for chunk_CD in torch.split(x_TD, _CHUNK):
        firing_FC = _firing(hidden(chunk_CD))
        mix_CR = torch.randn(chunk_CD.shape[0], columns, generator=generator)
        mixed_FR = firing_FC @ mix_CR.to(firing_FC.device)
        rows_FR = mixed_FR if rows_FR is None else rows_FR + mixed_FR
    assert rows_FR is not None
    return rows_FR


def _firing(hidden_TF: Tensor) -> Tensor:
    return hidden_TF.float().abs().sqrt().T
