"""What `/v1/completions` and `/v1/chat/completions` share: starting, answering, streaming.

How an answer looks is left to a `Writer`; what runs, what is counted and how it ends is here.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Final, Protocol

from fastapi import Request
from starlette.responses import JSONResponse, Response

from engine.errors import AmbidexError, InvalidRequest, require
from engine.serving.request import Request as EngineRequest
from engine.serving.request import TokenEvent, Usage
from server import calls
from server.errors import describe
from server.events import Output, collect_all, merged_events
from server.generation import Frontend, Generation, Prompt, SamplingFor, close_all
from server.routes.generate import CLIENT_LEFT
from server.schemas.openai import GenerationBody, OpenAIErrorResponse
from server.streaming import EventResponse, sse_event, while_connected

logger = logging.getLogger("ambidex.server")

DONE: Final = b"data: [DONE]\n\n"
FINISH_REASONS: Final = {"length": "length", "eos_token": "stop", "stop_sequence": "stop"}
# Entries that are put into one answer, or a stream's first event, at once, beside other streams.
MAX_LOGPROBS: Final = 1 << 17

ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"model": OpenAIErrorResponse, "description": "It can never be served as asked."},
    404: {"model": OpenAIErrorResponse, "description": "The model is not served here."},
    408: {"model": OpenAIErrorResponse, "description": "The body did not arrive in time."},
    413: {"model": OpenAIErrorResponse, "description": "The body is too large."},
    429: {"model": OpenAIErrorResponse, "description": "Too many requests: see Retry-After."},
    500: {"model": OpenAIErrorResponse, "description": "The generation failed or was cut short."},
    503: {
        "model": OpenAIErrorResponse,
        "description": "The server is stopping or repaired.",
    },
    504: {"model": OpenAIErrorResponse, "description": "Past its deadline."},
}


class Writer(Protocol):
    """Writes one request's answer in the shape of its route."""

    prefix: str  # of the answer's id
    kind: str  # the field `object` of the answer
    chunk_kind: str  # and of a stream's chunks

    @property
    def body(self) -> GenerationBody:
        """The request."""

    def choice(self, index: int, output: Output) -> dict[str, Any]:
        """A whole choice."""

    def piece(self, index: int, event: TokenEvent) -> dict[str, Any] | None:
        """A choice of a stream's chunk; None if the event has nothing to show."""


def check_logprobs(requests: Sequence[EngineRequest], *, stream: bool) -> None:
    """Raise InvalidRequest if an answer with these requests' log-probabilities is too large.

    Of a stream only the prompts' count, which come at once: its output goes out token by token.
    """
    entries = sum(
        (1 + request.sampling.top_n_tokens)
        * (
            request.sampling.max_new_tokens * (not stream)
            + request.prompt_len * request.sampling.prompt_logprobs
        )
        for request in requests
    )
    require(
        entries <= MAX_LOGPROBS,
        f"logprobs must be for at most {MAX_LOGPROBS} entries, got {entries}: tokens times "
        "alternatives, over all completions; lower max_tokens, n or the alternatives",
        InvalidRequest,
    )


async def respond(
    front: Frontend,
    request: Request,
    writer: Writer,
    prompts: Mapping[str, Prompt],
    sampling: SamplingFor,
    *,
    logprobs: bool,
) -> Response:
    """The answer to a request, at once or as a stream.

    Args:
        front: the server.
        request: as it came.
        writer: of its answer.
        prompts: by the names that complaints use.
        sampling: parameters of each.
        logprobs: whether the answer has log-probabilities.
    """
    body = writer.body
    front.check_model(body.model)
    calls.current().user = body.user
    stream = bool(body.stream)
    check = partial(check_logprobs, stream=stream) if logprobs else lambda _requests: None
    starting = front.start_all(
        prompts, sampling, body.policy, body.completions, check, body.grammar
    )
    generations = await while_connected(request.receive, starting)
    if generations is None:  # the client left while its grammar was compiled, say
        return Response(status_code=CLIENT_LEFT)
    answer = _Answer(front, writer, generations)
    if stream:
        return EventResponse(answer.frames(), lambda: close_all(generations), answer.prompt_header)
    try:
        outputs = await while_connected(request.receive, collect_all(generations))
    finally:
        await close_all(generations)
    if outputs is None:
        return Response(status_code=CLIENT_LEFT)
    return answer.whole(outputs)


class _Answer:
    """One answer: what its chunks have in common, and its sums."""

    def __init__(self, front: Frontend, writer: Writer, generations: Sequence[Generation]) -> None:
        self.writer = writer
        self.generations = generations
        self.usages: dict[int, Usage] = {}  # by generation, as they finish
        self.common = {
            "id": f"{writer.prefix}-{uuid.uuid4().hex}",
            "created": int(calls.current().started),
            "model": front.model_name,
            "system_fingerprint": f"fp_{generations[0].engine.checkpoint.fingerprint[:12]}",
        }

    @property
    def prompt_header(self) -> dict[str, str]:
        return {"x-prompt-tokens": str(self._prompt_tokens)}

    @property
    def _prompt_tokens(self) -> int:
        """Of each prompt once, however many completions it has."""
        each = self.writer.body.completions
        return sum(generation.request.prompt_len for generation in self.generations[::each])

    def whole(self, outputs: Sequence[Output]) -> Response:
        """The answer at once."""
        self.usages = {i: output.usage for i, output in enumerate(outputs)}
        choices = [self.writer.choice(i, output) for i, output in enumerate(outputs)]
        usage, experts = self._usage(), self._experts()
        content = {
            **self.common,
            "object": self.writer.kind,
            "choices": choices,
            "usage": usage,
            "experts": experts,
        }
        headers = {
            **self.prompt_header,
            "x-generated-tokens": str(usage["completion_tokens"]),
            "x-activated-expert-ratio": f"{experts['activated_ratio']:.6f}",
        }
        return JSONResponse(content, headers=headers)

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """The answer as events; an error becomes the last of them but for the end."""
        try:
            async with aclosing(merged_events(self.generations)) as events:
                async for which, taken in events:
                    chunks = (self._chunk(which, event) for event in taken)
                    if frames := [sse_event(chunk) for chunk in chunks if chunk is not None]:
                        yield b"".join(frames)
            if self.writer.body.includes_usage:
                last = {"choices": [], "usage": self._usage(), "experts": self._experts()}
                yield sse_event({**self.common, "object": self.writer.chunk_kind, **last})
        except AmbidexError as error:
            yield sse_event(describe(error))
        except Exception as error:
            logger.exception("request %s failed", calls.current().request_id)
            yield sse_event(describe(error))
        yield DONE

    def _chunk(self, which: int, event: TokenEvent) -> dict[str, Any] | None:
        """The chunk that an event makes, if any."""
        if event.usage is not None:
            self.usages[which] = event.usage
        choice = self.writer.piece(which, event)
        if choice is None:
            return None
        chunk = {**self.common, "object": self.writer.chunk_kind, "choices": [choice]}
        if self.writer.body.includes_usage:
            chunk["usage"] = None
        elif len(self.usages) == len(self.generations):
            chunk["experts"] = self._experts()
        return chunk

    def _usage(self) -> dict[str, Any]:
        body, usages = self.writer.body, self.usages
        generated = sum(usage.generated_tokens for usage in usages.values())
        generated = 0 if body.hides_output else generated
        firsts = range(0, len(self.generations), body.completions)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self._prompt_tokens + generated,
            "prompt_tokens_details": {
                "cached_tokens": sum(usages[i].cached_prompt_tokens for i in firsts)
            },
        }

    def _experts(self) -> dict[str, Any]:
        """What all completions used together."""
        activated = sum(usage.experts_activated for usage in self.usages.values())
        available = sum(usage.experts_available for usage in self.usages.values())
        return {
            "policy": str(self.generations[0].request.policy),
            "activated_ratio": activated / available if available else 0.0,
            "activated": activated,
            "available": available,
        }


def visible_text(event: TokenEvent, stops: Sequence[str]) -> str:
    """An event's text without the stop string that ends it: the engine leaves it in, as TGI does.

    Of several that end there the longest counts; what might begin one is always held back, so the
    last event has all of it.
    """
    if event.finish_reason != "stop_sequence":
        return event.text
    cut = max((len(stop) for stop in stops if event.text.endswith(stop)), default=0)
    return event.text[: len(event.text) - cut]
