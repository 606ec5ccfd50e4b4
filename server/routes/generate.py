"""`POST /generate`, `POST /generate_stream`, `POST /`: the TGI interface."""

from __future__ import annotations

import logging
import time
from base64 import b64encode
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, Final

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from engine.errors import AmbidexError, InvalidRequest, require
from engine.serving.request import TokenEvent, TokenLogprob, Usage
from server.errors import describe
from server.events import Output, checked_events, collect
from server.generation import Frontend, Generation
from server.routes.dependencies import Front
from server.schemas.tgi import ErrorResponse, GenerateRequest, GenerateResponse, RootRequest
from server.streaming import EventResponse, sse_event, while_connected

logger = logging.getLogger("ambidex.server")
router = APIRouter(tags=["generation"])

CLIENT_LEFT: Final = 499  # nginx's code; nobody reads it but the access log

ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    408: {"model": ErrorResponse, "description": "The body did not arrive in time."},
    413: {"model": ErrorResponse, "description": "The body is too large."},
    422: {"model": ErrorResponse, "description": "The request can never be served as asked."},
    424: {"model": ErrorResponse, "description": "The model failed while it generated."},
    429: {"model": ErrorResponse, "description": "Too many requests: see Retry-After."},
    500: {"model": ErrorResponse, "description": "The generation was cut short."},
    503: {"model": ErrorResponse, "description": "The server is stopping or its engine failed."},
    504: {"model": ErrorResponse, "description": "Past its deadline."},
}
# FastAPI derives a schema from JSON responses alone; server.app adds StreamEvent to the document.
STREAM: Final[dict[str, Any]] = {
    "description": "Server-sent events: each `data:` line holds a StreamEvent, or an "
    "ErrorResponse that ends the stream.",
    "content": {"text/event-stream": {"schema": {"$ref": "#/components/schemas/StreamEvent"}}},
}


@router.post(
    "/generate",
    response_model=GenerateResponse,
    responses=ERRORS,
    summary="Generate, and answer when it is finished",
)
async def generate(body: GenerateRequest, request: Request, front: Front) -> Response:
    """The whole text at once. A client that disconnects aborts its request."""
    return await _respond(front, body, request, as_list=False)


@router.post(
    "/generate_stream",
    response_class=Response,
    responses={**ERRORS, 200: STREAM},
    summary="Generate, one event a token",
)
async def generate_stream(body: GenerateRequest, request: Request, front: Front) -> Response:
    """Server-sent events, the last of which has the text and the details.

    What is refused is refused with a status before the stream begins; what fails later is an event
    `{"error", "error_type"}`. A client that disconnects aborts its request.
    """
    return await _stream(front, body, request)


@router.post(
    "/",
    response_model=list[GenerateResponse],
    responses={**ERRORS, 200: STREAM | {"description": "A list of one, or a stream of events."}},
    summary="Generate, streaming or not",
)
async def generate_root(body: RootRequest, request: Request, front: Front) -> Response:
    """As `/generate_stream` if `stream` is true; otherwise as `/generate`, in a list of one."""
    if body.stream:
        return await _stream(front, body, request)
    return await _respond(front, body, request, as_list=True)


async def _start(front: Frontend, body: GenerateRequest, request: Request) -> Generation | None:
    """The generation; None if the client left while its grammar was compiled, say."""
    parameters = body.parameters
    starting = front.start(
        body.inputs,
        parameters.sampling,
        parameters.policy,
        parameters.truncate,
        parameters.grammar,
    )
    return await while_connected(request.receive, starting)


async def _respond(
    front: Frontend, body: GenerateRequest, request: Request, *, as_list: bool
) -> Response:
    generation = await _start(front, body, request)
    if generation is None:
        return Response(status_code=CLIENT_LEFT)
    try:
        output = await while_connected(request.receive, collect(generation))
    finally:
        await generation.close()
    if output is None:
        return Response(status_code=CLIENT_LEFT)
    answer = _answer(body, generation, output)
    headers = {**_kind_headers(front, body), **_headers(generation, output)}
    return JSONResponse([answer] if as_list else answer, headers=headers)


async def _stream(front: Frontend, body: GenerateRequest, request: Request) -> Response:
    require(
        not body.parameters.decoder_input_details,
        "parameters.decoder_input_details must be false for a stream",
        InvalidRequest,
    )
    generation = await _start(front, body, request)
    if generation is None:
        return Response(status_code=CLIENT_LEFT)
    headers = {
        **_kind_headers(front, body),
        "x-prompt-tokens": str(generation.request.prompt_len),
        "x-validation-time": _milliseconds(generation.validation_seconds),
    }
    return EventResponse(_frames(body, generation), generation.close, headers)


async def _frames(body: GenerateRequest, generation: Generation) -> AsyncGenerator[bytes, None]:
    """The stream's events; an error becomes the last of them."""
    text = body.inputs if body.parameters.return_full_text else ""
    try:
        async with aclosing(checked_events(generation)) as events:
            async for taken in events:
                frames = []
                for event in taken:
                    text += event.text
                    frames.append(sse_event(_stream_event(event, generation, text)))
                yield b"".join(frames)
    except AmbidexError as error:
        yield sse_event(describe(error))
    except Exception as error:
        logger.exception("request %s failed", generation.request.request_id)
        yield sse_event(describe(error))


def _stream_event(event: TokenEvent, generation: Generation, text: str) -> dict[str, Any]:
    """One event: its token, and in the last one the text and the details as well."""
    out: dict[str, Any] = {"index": event.index + 1, "token": _token(event)}
    if event.top_tokens:
        out["top_tokens"] = [_plain(t) for t in event.top_tokens]
    out |= {"generated_text": None, "details": None}
    if event.finish_reason is not None and event.usage is not None:
        out["generated_text"] = text
        out["details"] = {
            "finish_reason": event.finish_reason,
            "generated_tokens": event.usage.generated_tokens,
            "input_length": event.usage.prompt_tokens,
            "seed": event.usage.seed,
            "experts": _experts(generation, event.usage),
        }
    return out


def _answer(body: GenerateRequest, generation: Generation, output: Output) -> dict[str, Any]:
    prompt = body.inputs if body.parameters.return_full_text else ""
    answer: dict[str, Any] = {"generated_text": prompt + output.text}
    if body.parameters.wants_details:
        answer["details"] = _details(body, generation, output)
    return answer


def _details(body: GenerateRequest, generation: Generation, output: Output) -> dict[str, Any]:
    tokens = [e for e in output.events if e.token is not None]
    prefill = [t for e in output.events for t in e.prompt]
    details: dict[str, Any] = {
        "finish_reason": output.finish_reason,
        "generated_tokens": output.usage.generated_tokens,
        "seed": output.usage.seed,
        "prefill": [{"id": t.token_id, "text": t.text, "logprob": t.logprob} for t in prefill],
        "tokens": [_token(e) for e in tokens],
    }
    if body.parameters.top_n_tokens:
        details["top_tokens"] = [[_plain(t) for t in e.top_tokens] for e in tokens]
    details["experts"] = _experts(generation, output.usage)
    return details


def _token(event: TokenEvent) -> dict[str, Any] | None:
    """A token with the text that it completed, so that the texts add up to the output.

    A special token shows its own text, which readers skip, unless it set free what had been held
    back as the possible beginning of a stop string.
    """
    token = event.token
    if token is None:
        return None
    out = _plain(token)
    if event.text or not token.special:
        out |= {"text": event.text, "special": False}
    if event.experts:
        chosen = b64encode(event.experts).decode("ascii")
        out["experts"] = {"activated_ratio": event.activated_ratio, "chosen": chosen}
    return out


def _plain(token: TokenLogprob) -> dict[str, Any]:
    return {
        "id": token.token_id,
        "text": token.text,
        "logprob": token.logprob,
        "special": token.special,
    }


def _experts(generation: Generation, usage: Usage) -> dict[str, Any]:
    return {
        "policy": str(generation.request.policy),
        "activated_ratio": usage.activated_ratio,
        "activated": usage.experts_activated,
        "available": usage.experts_available,
    }


def _kind_headers(front: Frontend, body: GenerateRequest) -> Mapping[str, str]:
    """TGI's response headers that are known before the output: the device, characters read."""
    return {
        "x-compute-type": front.engine.config.device,
        "x-compute-characters": str(len(body.inputs)),
    }


def _headers(generation: Generation, output: Output) -> Mapping[str, str]:
    """TGI's response headers (times in milliseconds, x-compute-time in seconds), and ours."""
    usage, total = output.usage, time.perf_counter() - generation.started
    return {
        "x-compute-time": f"{total:.6f}",
        "x-total-time": _milliseconds(total),
        "x-validation-time": _milliseconds(generation.validation_seconds),
        "x-queue-time": _milliseconds(usage.queue_seconds),
        "x-inference-time": _milliseconds(usage.inference_seconds),
        "x-time-per-token": _milliseconds(usage.inference_seconds / max(1, usage.generated_tokens)),
        "x-prompt-tokens": str(usage.prompt_tokens),
        "x-generated-tokens": str(usage.generated_tokens),
        "x-activated-expert-ratio": f"{usage.activated_ratio:.6f}",
    }


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}"
