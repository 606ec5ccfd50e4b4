"""Counters by which the programs of a kernel find out which of them is the last.

Work that many programs share ends in a sum or a choice that needs all of it. A second launch would
cost more than the sum, so each program counts itself when its part is written, and the one that
counts last does the rest and sets the counter back to zero.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Arrivals:
    """Zeroed counters of one device. Kernels that may run at the same time must not share them.

    Kernels of one stream may share them, chained ones included: each touches its counters only
    after the kernel before it has ended.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: dict[str, Tensor] = {}
        self._outgrown: list[Tensor] = []  # captured graphs still use the smaller ones

    def of(self, name: str, count: int) -> Tensor:
        """int32 [>= count], all zero between kernels. Counters once handed out are never freed."""
        found = self._held.get(name)
        if found is None or found.numel() < count:
            if found is not None:
                self._outgrown.append(found)
            size = 1 << max(10, (count - 1).bit_length())
            with torch.inference_mode(False):
                found = torch.zeros(size, dtype=torch.int32, device=self.device)
            self._held[name] = found
        return found
