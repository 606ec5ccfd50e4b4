"""What can go wrong while training, besides the engine's own errors."""

from __future__ import annotations

from engine.errors import AmbidexError


class TrainingError(AmbidexError):
    """Training cannot start or go on; the message says why and what is still intact."""


class DataError(TrainingError):
    """The corpus is empty, unreadable or too short; names the path."""


class NonFiniteLoss(TrainingError):
    """Loss or gradient became NaN or infinite; raised before the optimiser step."""
