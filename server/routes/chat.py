"""`POST /v1/chat/completions`: messages in, the next message out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.serving.engine import Engine
from engine.serving.request import MAX_STOPS, TokenEvent, TokenLogprob
from server import chat as chats
from server.events import Output
from server.routes.dependencies import Front
from server.routes.openai import ERRORS, FINISH_REASONS, respond, visible_text
from server.schemas.chat import ChatRequest, ChatResponse

router = APIRouter(tags=["openai"])

ANSWER: dict[str, Any] = {
    "description": "The answers, or a stream of ChatChunks, `data: [DONE]` at its end.",
    "content": {"text/event-stream": {"schema": {"$ref": "#/components/schemas/ChatChunk"}}},
}


@router.post(
    "/v1/chat/completions",
    response_model=ChatResponse,
    responses={**ERRORS, 200: ANSWER},
    summary="Answer a chat",
)
async def chat_completions(body: ChatRequest, request: Request, front: Front) -> Response:
    """The assistant's next message.

    The checkpoint's chat template makes the prompt. A checkpoint without one gets a plain one,
    `User: ...` and `Assistant:`, and its answer ends where it would begin a user's next turn. A
    client that disconnects aborts its request.
    """
    template = front.engine.checkpoint.chat_template
    messages = [message.for_template() for message in body.messages]
    room = MAX_STOPS - len(body.stop)
    end_of_turn = () if template is not None else chats.plain_stops(messages, room)

    def prompt(engine: Engine) -> list[int]:
        return chats.prompt_ids(engine.tokenizer, template, messages)

    return await respond(
        front,
        request,
        ChatWriter(body, (*body.stop, *end_of_turn)),
        {"messages": prompt},
        partial(body.sampling, stop=end_of_turn),
        logprobs=bool(body.logprobs),
    )


class ChatWriter:
    """Writes the answer to a chat.

    Args:
        body: the request.
        stops: strings that end the text.
    """

    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, body: ChatRequest, stops: Sequence[str]) -> None:
        self.body = body
        self._stops = stops

    def choice(self, index: int, output: Output) -> dict[str, Any]:
        """A whole choice."""
        text = "".join(visible_text(event, self._stops) for event in output.events)
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(output.events),
            "finish_reason": FINISH_REASONS[output.finish_reason],
        }

    def piece(self, index: int, event: TokenEvent) -> dict[str, Any] | None:
        """A choice of a stream's chunk; None if the event has nothing to show."""
        text, logprobs = visible_text(event, self._stops), self._logprobs([event])
        first, last = event.index == 0, event.finish_reason is not None
        if not (text or first or last or (logprobs and logprobs["content"])):
            return None
        delta = {"role": "assistant", "content": text} if first else {"content": text}
        return {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": FINISH_REASONS.get(event.finish_reason or ""),
        }

    def _logprobs(self, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
        """Of the tokens of the text, which special ones have no part in."""
        if not self.body.logprobs:
            return None
        content = [
            {**_token(event.token), "top_logprobs": [_token(t) for t in event.top_tokens]}
            for event in events
            if event.token is not None and not event.token.special
        ]
        return {"content": content, "refusal": None}


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.raw)}
