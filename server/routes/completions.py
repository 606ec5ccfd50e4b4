"""`POST /v1/completions`: OpenAI's older interface, which also scores prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from engine.serving.request import TokenEvent, TokenLogprob
from engine.text.tokenizer import text_offsets
from server.events import Output
from server.generation import Prompt
from server.routes.dependencies import Front
from server.routes.openai import ERRORS, FINISH_REASONS, respond, visible_text
from server.schemas.completions import CompletionRequest, CompletionResponse

router = APIRouter(tags=["openai"])

ANSWER: dict[str, Any] = {
    "description": "The completions, or a stream of such objects with the next pieces of them, "
    "`data: [DONE]` at its end.",
    "content": {
        "text/event-stream": {"schema": {"$ref": "#/components/schemas/CompletionResponse"}}
    },
}


@router.post(
    "/v1/completions",
    response_model=CompletionResponse,
    responses={**ERRORS, 200: ANSWER},
    summary="Complete prompts",
)
async def completions(body: CompletionRequest, request: Request, front: Front) -> Response:
    """Text that goes on where each prompt ends.

    With `echo`, `logprobs` and `max_tokens` 0 or 1 it scores the prompts, as harnesses that compare
    likelihoods do. A client that disconnects aborts its request.
    """
    prompts: Sequence[Prompt] = body.prompt
    many = len(prompts) > 1
    names = {f"prompt[{i}]" if many else "prompt": prompt for i, prompt in enumerate(prompts)}
    texts = [await _text(front, prompt) for prompt in body.echoed]
    writer = CompletionWriter(body, texts, len(front.engine.tokenizer.start_ids))
    wants = body.logprobs is not None
    return await respond(front, request, writer, names, body.sampling, logprobs=wants)


async def _text(front: Front, prompt: str | list[int]) -> str:
    """A prompt to echo. Many ids take a while to spell."""
    if isinstance(prompt, str):
        return prompt
    return await front.in_thread(partial(front.engine.tokenizer.spell, prompt))


class CompletionWriter:
    """Writes the answer to a request for completions.

    Args:
        body: the request.
        prompts: the texts to echo; none without echo.
        start: tokens in front of a prompt that is text, which are no part of it.
    """

    prefix = "cmpl"
    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(self, body: CompletionRequest, prompts: Sequence[str], start: int) -> None:
        self.body = body
        self._prompts = prompts
        self._start = start
        self._offsets: dict[int, int] = {}  # by choice: characters of the text so far

    def choice(self, index: int, output: Output) -> dict[str, Any]:
        """A whole choice."""
        return self._choice(index, output.events)

    def piece(self, index: int, event: TokenEvent) -> dict[str, Any] | None:
        """A choice of a stream's chunk; None if the event has nothing to show."""
        choice = self._choice(index, [event])
        empty = not choice["text"] and choice["logprobs"] is None
        return None if empty and choice["finish_reason"] is None else choice

    def _choice(self, index: int, events: Sequence[TokenEvent]) -> dict[str, Any]:
        """Some events of a choice, its first or next ones."""
        echo = self._prompts[index // self.body.completions] if self._prompts else ""
        echo = echo if events[0].index == 0 else ""
        shown = [] if self.body.hides_output else events
        finish = FINISH_REASONS.get(events[-1].finish_reason or "")
        if finish is not None and self.body.hides_output:
            finish = "length"
        wanted = self.body.logprobs is not None
        return {
            "index": index,
            "text": echo + "".join(visible_text(event, self.body.stop) for event in shown),
            "logprobs": self._logprobs(index, echo, events[0], shown) if wanted else None,
            "finish_reason": finish,
        }

    def _logprobs(
        self, index: int, echo: str, first: TokenEvent, shown: Sequence[TokenEvent]
    ) -> dict[str, Any]:
        tokens: list[TokenLogprob] = []
        tops: list[tuple[TokenLogprob, ...]] = []
        offsets: list[int] = []
        if first.prompt:
            tokens += first.prompt
            tops += first.prompt_top or ((),) * len(first.prompt)
            is_text = isinstance(self.body.prompt[index // self.body.completions], str)
            start = self._start if is_text else 0
            raw = [token.raw for token in first.prompt[start:]]
            offsets += [0] * start + text_offsets(raw, echo)
        at = self._offsets.get(index, len(echo))
        for event in shown:
            if event.token is not None:
                tokens.append(event.token)
                tops.append(event.top_tokens)
                offsets.append(at)
            at += len(event.text)
        self._offsets[index] = at
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_top(token, top) for token, top in zip(tokens, tops, strict=True)],
            "text_offset": offsets,
        }


def _top(token: TokenLogprob, top: Sequence[TokenLogprob]) -> dict[str, float] | None:
    """The likeliest tokens and the one that stands there; of equal texts the likeliest counts."""
    if token.logprob is None:
        return None
    best: dict[str, float] = {}
    for each in (*top, token):
        if each.logprob is not None:
            best[each.text] = max(each.logprob, best.get(each.text, each.logprob))
    return best
