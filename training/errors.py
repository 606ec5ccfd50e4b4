"""What can go wrong while training, besides the engine's own errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from engine.errors import AmbidexError


class TrainingError(AmbidexError):
    """Training cannot start or go on; the message says why and what is still intact."""


class DataError(TrainingError):
    """The corpus is empty, unreadable or too short; names the path."""


class NonFiniteLoss(TrainingError):
    """Loss or gradient became NaN or infinite; raised before the optimiser step."""


class Interrupted(TrainingError):
    """A signal asked training to stop; the state is saved and the same command goes on from it."""


class StorageError(TrainingError):
    """Something could not be written, on a full disk for example; says what is still intact."""


@contextmanager
def writing(path: Path, intact: str) -> Iterator[None]:
    """Turn a failure to write `path` into one sentence that ends with what is `intact`.

    Raises:
        StorageError: instead of the OSError or safetensors' own error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).rpartition("I/O error: ")[2]
        raise StorageError(f"{path}: cannot be written ({reason}); {intact}") from error
