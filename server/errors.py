"""From what went wrong to what the client reads: one table, one shape.

Every error of this server is `{"error": sentence, "error_type": kind}`, as in Hugging Face's
text-generation-inference (TGI), under the status that its clients expect: in particular a request
that fails validation is 422, never 400, which huggingface_hub takes for "not TGI".
"""

from __future__ import annotations

import http
import math
from collections.abc import Mapping
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from engine.errors import AmbidexError, CheckpointError, EngineStopped, InvalidRequest, Overloaded
from server.schemas import sentences
from server.security import Forbidden, Unauthorized

MAX_ERROR_CHARS: Final = 1000
RETRY_STOPPED_SECONDS: Final = 5


class GenerationFailed(AmbidexError):
    """The model failed while it generated; the request may work when sent again."""


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


# Most specific first: the first class that fits decides.
TABLE: Final[tuple[tuple[type[Exception], int, str], ...]] = (
    (InvalidRequest, 422, "validation"),
    (BodyTooLarge, 413, "validation"),
    (BodyTooSlow, 408, "validation"),
    (UrlTooLong, 414, "validation"),
    (HeadersTooLarge, 431, "validation"),
    (Unauthorized, 401, "authentication"),
    (Forbidden, 403, "permission"),
    (Overloaded, 429, "overloaded"),
    (EngineStopped, 503, "healthcheck"),
    (IncompleteGeneration, 500, "incomplete_generation"),
    (CheckpointError, 409, "checkpoint"),
    (GenerationFailed, 424, "generation"),
    (DeadlineExceeded, 504, "timeout"),
)
INTERNAL: Final = (500, "internal")
HTTP_TYPES: Final = {404: "not_found", 405: "method_not_allowed"}


def classify(error: Exception) -> tuple[int, str]:
    """(HTTP status, error_type) of `error`."""
    for kind, status, error_type in TABLE:
        if isinstance(error, kind):
            return status, error_type
    return INTERNAL


def error_body(message: str, error_type: str) -> dict[str, str]:
    """The JSON object of an error; the text is capped and always encodable."""
    text = message.encode("utf-8", "backslashreplace").decode("utf-8")
    if len(text) > MAX_ERROR_CHARS:
        text = text[: MAX_ERROR_CHARS - 3] + "..."
    return {"error": text, "error_type": error_type}


def describe(error: Exception) -> dict[str, str]:
    """The JSON object of `error`. What we did not raise on purpose stays in the log."""
    status, error_type = classify(error)
    if (status, error_type) == INTERNAL:
        return error_body("internal error; the server's log has more", error_type)
    return error_body(str(error), error_type)


def retry_headers(error: Exception) -> dict[str, str]:
    """What the client should do next: `Retry-After` in whole seconds (RFC 9110, section 10.2.3)
    where trying again makes sense, `WWW-Authenticate` where a key is missing."""
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, Overloaded):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    if isinstance(error, EngineStopped):
        return {"Retry-After": str(RETRY_STOPPED_SECONDS)}
    return {}


def error_response(error: Exception) -> JSONResponse:
    """The response to a request that failed with `error`."""
    return JSONResponse(describe(error), classify(error)[0], retry_headers(error))


def http_error_response(
    status: int, detail: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The response to an error of the framework's own, such as an unknown path."""
    if status == 400:  # FastAPI's answer to a body that is not JSON at all
        return JSONResponse(error_body(f"body: {detail}", "validation"), 422, headers)
    error_type = HTTP_TYPES.get(status, "validation")
    return JSONResponse(error_body(detail, error_type), status, headers)


async def _on_engine_error(_request: Request, error: Exception) -> JSONResponse:
    return error_response(error)


async def _on_invalid_body(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    request.app.state.frontend.count_invalid()
    first: Mapping[str, Any] = error.errors()[0]
    return JSONResponse(error_body(sentences.sentence(first), "validation"), 422)


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    detail = error.detail
    if error.status_code == 400:
        request.app.state.frontend.count_invalid()
    if error.status_code in HTTP_TYPES and detail == http.HTTPStatus(error.status_code).phrase:
        # the path as it came, percent-encoded: no control characters reach a client's terminal
        path = request.scope.get("raw_path", b"").decode("ascii", "replace")[:100]
        detail = f"{detail}: {request.method} {path}; GET /docs lists the routes"
    return http_error_response(error.status_code, detail, error.headers)


def install_handlers(app: FastAPI) -> None:
    """Give every error of `app` the one shape."""
    app.add_exception_handler(AmbidexError, _on_engine_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(HTTPException, _on_http_error)
