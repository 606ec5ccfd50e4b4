"""The shares of the experts at which models are measured."""

from __future__ import annotations

from fractions import Fraction
from typing import Final

SHARES: Final = (Fraction(1, 16), Fraction(1, 8), Fraction(1, 4), Fraction(1, 2))


def top_k_of(share: Fraction, num_experts: int) -> int:
    """The number of experts that a share stands for, at least one."""
    return max(1, round(share * num_experts))
