"""Everything that can go wrong, once.

    AmbidexError
    ├── ConfigError          a configuration value is out of range or unknown
    ├── CheckpointError      a checkpoint directory is damaged, incomplete or foreign
    ├── InvalidRequest       this request can never be served as asked
    ├── Overloaded           not now: the queue is full; try again later
    └── EngineStopped        the engine is draining, stopped or has failed

Messages are sentences for the person who sent the value: they name the field and the allowed range.
"""

from __future__ import annotations


class AmbidexError(Exception):
    """Base of every error that Ambidex raises on purpose."""


class ConfigError(AmbidexError, ValueError):
    """A configuration value is out of its range, inconsistent with another, or unknown."""


class CheckpointError(AmbidexError):
    """A checkpoint directory is damaged, incomplete or not one of ours; names the file."""


class InvalidRequest(AmbidexError, ValueError):
    """The request can never be served as asked; names the field and the allowed range."""


class Overloaded(AmbidexError):
    """The queue is full.

    Attributes:
        retry_after: seconds after which another try is reasonable.
    """

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineStopped(AmbidexError):
    """The engine takes no requests: it is draining, was stopped, or a step failed."""


def require(condition: bool, message: str, error: type[AmbidexError] = ConfigError) -> None:
    """Raise `error(message)` unless `condition` holds."""
    if not condition:
        raise error(message)
