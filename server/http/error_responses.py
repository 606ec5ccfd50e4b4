"""Turns an error into a response: a table of statuses, and a JSON shape for each interface.

An error is `{"error": sentence, "error_type": kind}`, as in Hugging Face's
text-generation-inference (TGI), under the status that its clients expect: in particular a request
that fails validation is 422, never 400, which huggingface_hub takes for "not TGI".

Below /v1 it is `{"error": {"message", "type", "param", "code"}}`, as in OpenAI's API, and what
fails validation is 400: the `openai` client chooses its exception, and whether to try again, by
status. There `code` is TGI's kind of error, or a name that OpenAI's clients know.
"""

from __future__ import annotations

import http
import math
import re
from collections.abc import Mapping
from typing import Any, Final, get_args

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from engine.errors import AmbidexError, CheckpointError, EngineStopped, InvalidRequest, Overloaded
from server.errors import (
    BodyTooLarge,
    BodyTooSlow,
    ContextTooLong,
    DeadlineExceeded,
    GenerationFailed,
    GrammarFailed,
    HeadersTooLarge,
    IncompleteGeneration,
    UnknownModel,
    UrlTooLong,
)
from server.http import calls
from server.http.security import Forbidden, Unauthorized
from server.schemas import sentences

MAX_ERROR_CHARS: Final = 1000
RETRY_STOPPED_SECONDS: Final = 5
OPENAI_PATHS: Final = "/v1/"

# The first class that fits decides, so the most specific ones come first.
TABLE: Final[tuple[tuple[type[Exception], int, str], ...]] = (
    (InvalidRequest, 422, "validation"),
    (UnknownModel, 404, "model_not_found"),
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

# Below /v1: other statuses, the `type` of a status, and the `code` of an error_type.
OPENAI_STATUS: Final = {422: 400, 424: 500}
OPENAI_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
OPENAI_CODES: Final = {
    "authentication": "invalid_api_key",
    "overloaded": "rate_limit_exceeded",
    "healthcheck": "service_unavailable",
}
_FIELD: Final = re.compile(r"[a-z_]+(?:\[\d+\]|\.[a-z_]+)*(?= (?:must|is|has|cannot|takes|needs))")


def classify(error: Exception) -> tuple[int, str]:
    """(HTTP status, error_type) of `error`."""
    for kind, status, error_type in TABLE:
        if isinstance(error, kind):
            return status, error_type
    return INTERNAL


def cap(message: str) -> str:
    """`message`, cut to `MAX_ERROR_CHARS` and without what UTF-8 cannot encode."""
    text = message.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= MAX_ERROR_CHARS else text[: MAX_ERROR_CHARS - 3] + "..."


def error_body(message: str, error_type: str) -> dict[str, str]:
    """The JSON object of an error in TGI's shape."""
    return {"error": cap(message), "error_type": error_type}


def openai_body(message: str, status: int, code: str) -> dict[str, dict[str, str | None]]:
    """The JSON object of an error in OpenAI's shape; `param` is the field that it begins with."""
    kind = OPENAI_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    field = _FIELD.match(message) if kind == "invalid_request_error" else None
    param = field.group() if field and field.group() != "body" else None
    return {"error": {"message": cap(message), "type": kind, "param": param, "code": code}}


def openai_call() -> bool:
    """Whether the request under way belongs to OpenAI's interface."""
    return calls.current().path.startswith(OPENAI_PATHS)


def shape(message: str, status: int, error_type: str) -> tuple[int, dict[str, Any]]:
    """(status, JSON object) of an error in the shape of the request's interface."""
    if not openai_call():
        return status, error_body(message, error_type)
    status = OPENAI_STATUS.get(status, status)
    return status, openai_body(message, status, OPENAI_CODES.get(error_type, error_type))


def describe(error: Exception) -> dict[str, Any]:
    """The JSON object of `error`. An error that we did not raise on purpose is not described."""
    return _answer(error)[1]


def _answer(error: Exception) -> tuple[int, dict[str, Any]]:
    status, error_type = classify(error)
    if (status, error_type) == INTERNAL:
        return shape("internal error; the server's log has more", status, error_type)
    if isinstance(error, ContextTooLong) and openai_call():
        error_type = "context_length_exceeded"
    return shape(str(error), status, error_type)


def retry_headers(error: Exception) -> dict[str, str]:
    """Headers that tell the client what to do next.

    `Retry-After`, in whole seconds (RFC 9110, section 10.2.3), stands where trying again makes
    sense, and `WWW-Authenticate` where a key is missing. The `openai` client sends a request again
    unless it is told not to, which does not help one that missed its deadline or met the end of
    its grammar.
    """
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, Overloaded):
        return {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    if isinstance(error, EngineStopped):
        return {"Retry-After": str(RETRY_STOPPED_SECONDS)}
    if isinstance(error, DeadlineExceeded | GrammarFailed) and openai_call():
        return {"x-should-retry": "false"}
    return {}


def error_response(error: Exception) -> JSONResponse:
    """The response to a request that failed with `error`."""
    status, body = _answer(error)
    return JSONResponse(body, status, retry_headers(error))


def http_error_response(
    status: int, detail: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The response to an error that the framework raised, such as an unknown path."""
    error_type = HTTP_TYPES.get(status, "validation")
    if status == 400:  # FastAPI's answer to a body that is not JSON at all
        status, detail = 422, f"body: {detail}"
    status, body = shape(detail, status, error_type)
    return JSONResponse(body, status, headers)


def _body_of(request: Request) -> type[BaseModel] | None:
    """The model of the body that the route of `request` takes; None if it takes none."""
    field = getattr(request.scope.get("route"), "body_field", None)
    annotation = field.field_info.annotation if field is not None else None
    kinds = (annotation, *get_args(annotation))
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


async def _on_engine_error(_request: Request, error: Exception) -> JSONResponse:
    return error_response(error)


async def _on_invalid_body(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    request.app.state.frontend.count_invalid()
    first: Mapping[str, Any] = error.errors()[0]
    status, body = shape(sentences.sentence(first, _body_of(request)), 422, "validation")
    return JSONResponse(body, status)


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
    """Have `app` answer every error in the shape of the request's interface."""
    app.add_exception_handler(AmbidexError, _on_engine_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_body)
    app.add_exception_handler(HTTPException, _on_http_error)
