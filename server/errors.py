"""What can go wrong with a request in the server, beside the engine's own errors.

`server.http.error_responses` says what the client reads of each.
"""

from __future__ import annotations

from engine.errors import AmbidexError, InvalidRequest


class GenerationFailed(AmbidexError):
    """The model failed while it generated; the request may work when sent again."""


class GrammarFailed(InvalidRequest):
    """The output cannot follow the request's grammar any further; trying again would not help."""


class IncompleteGeneration(AmbidexError):
    """The server ended the request before it was finished, as when it shuts down."""


class BodyTooLarge(AmbidexError):
    """The request's body is longer than the server takes."""


class BodyTooSlow(AmbidexError):
    """The request's body did not arrive in time."""


class UrlTooLong(AmbidexError):
    """The request's URL is longer than the server takes."""


class HeadersTooLarge(AmbidexError):
    """The request's headers are larger than the server takes."""


class DeadlineExceeded(AmbidexError):
    """The request was not finished by its deadline."""


class ContextTooLong(InvalidRequest):
    """Prompt and output do not fit into the model's context together."""


class UnknownModel(AmbidexError):
    """The request names a model that is not served here."""
