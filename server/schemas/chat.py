"""Requests and responses of `POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from engine.serving.request import MAX_TOP_N, SamplingParams
from server.schemas.fields import MAX_TOKENS, Strict, Text, encodable, refuse, strict_object
from server.schemas.openai import Answer, Count, GenerationBody
from server.schemas.openai_fields import Unsupported
from server.schemas.sentences import CONTINUATION, SENTENCE

MAX_MESSAGES: Final = 2048
MAX_PARTS: Final = 256


def _read_content(value: Any) -> str:
    """A text, or the texts of a list of parts one after the other."""
    if isinstance(value, str):
        return encodable(value)
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_PARTS:
        raise refuse(f"must be a string or a list of 1 to {MAX_PARTS} parts of type text")
    return "".join(_part_text(index, part) for index, part in enumerate(value))


def _part_text(index: int, part: Any) -> str:
    match part:
        case {"type": "text", "text": str(text)} if len(part) == 2:
            return encodable(text)
        case {"type": str(kind)} if kind != "text":
            raise refuse(f"[{index}].type must be text: the model reads nothing else", CONTINUATION)
    raise refuse(f'[{index}] must be {{"type": "text", "text": string}}', CONTINUATION)


Content = Annotated[
    Any,
    PlainValidator(_read_content),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": MAX_PARTS,
                    "items": strict_object(
                        {"type": {"const": "text"}, "text": {"type": "string"}}, "type", "text"
                    ),
                },
            ]
        }
    ),
]


class Message(Strict):
    """One message of a chat. What answers have but nobody wrote may come back as null."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="Who wrote it; `developer` is `system`."
    )
    content: Content = Field(description="Its text, or a list of parts of type text.")
    name: Annotated[Text, Field(min_length=1, max_length=64)] | None = Field(
        default=None, description="Name of the writer; templates may show it."
    )
    refusal: Annotated[Any, Unsupported()] = None
    annotations: Annotated[Any, Unsupported([])] = None
    audio: Annotated[Any, Unsupported()] = None
    tool_calls: Annotated[Any, Unsupported([])] = None
    function_call: Annotated[Any, Unsupported()] = None

    def for_template(self) -> dict[str, str]:
        """The message as chat templates know them."""
        role = "system" if self.role == "developer" else self.role
        named = {} if self.name is None else {"name": self.name}
        return {"role": role, "content": self.content, **named}


_EXAMPLE: Final[dict[str, Any]] = {
    "messages": [{"role": "user", "content": "What do plants make sugar from?"}],
    "max_completion_tokens": 40,
    "experts": {"top_k": 8},
}


class ChatRequest(GenerationBody):
    """The body of `POST /v1/chat/completions`."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="The chat so far."
    )
    logprobs: bool | None = Field(
        default=None, description="Report the output's tokens with log-probabilities."
    )
    max_completion_tokens: Count | None = Field(
        default=None, description="Tokens to generate at most. Default: as many as there is room."
    )
    max_tokens: Count | None = Field(
        default=None, description="The older name of `max_completion_tokens`."
    )
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_N)] | None = Field(
        default=None, description="Report this many of the likeliest tokens; needs `logprobs`."
    )
    audio: Annotated[Any, Unsupported()] = None
    function_call: Annotated[Any, Unsupported("none", "auto")] = None
    functions: Annotated[Any, Unsupported([])] = None
    modalities: Annotated[Any, Unsupported(["text"])] = None
    parallel_tool_calls: Annotated[Any, Unsupported(True, False)] = None
    prediction: Annotated[Any, Unsupported()] = None
    reasoning_effort: Annotated[Any, Unsupported("none")] = None
    tool_choice: Annotated[Any, Unsupported("none", "auto")] = None
    tools: Annotated[Any, Unsupported([])] = None
    verbosity: Annotated[Any, Unsupported()] = None
    web_search_options: Annotated[Any, Unsupported()] = None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise refuse("top_logprobs must be left out unless logprobs is true", SENTENCE)
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise refuse("max_tokens must be left out beside max_completion_tokens", SENTENCE)
        return self

    def sampling(self, room: int, stop: tuple[str, ...] = ()) -> SamplingParams:
        """The engine's parameters when the prompt leaves `room` tokens for the output."""
        asked = self.max_completion_tokens or self.max_tokens
        name = "max_completion_tokens" if self.max_completion_tokens else "max_tokens"
        top_n = self.top_logprobs or 0
        return self.params(room, asked, MAX_TOKENS, stop=stop, top_n=top_n, name=name)


class TopToken(BaseModel):
    """A token that might have stood here."""

    token: str = Field(description="Its text.")
    logprob: float = Field(description="Its log-probability.")
    bytes: list[int] = Field(
        description="Its part of the text's UTF-8, also where it is a part of a character."
    )


class ChatToken(TopToken):
    """A token of the output."""

    top_logprobs: list[TopToken] = Field(description="The likeliest tokens, if asked for.")


class ChatLogprobs(BaseModel):
    """The output's tokens."""

    content: list[ChatToken] = Field(description="One entry a token.")


class ChatMessage(BaseModel):
    """What the model answers."""

    role: Literal["assistant"] = Field(description="Who speaks.")
    content: str = Field(description="The text.")
    refusal: None = Field(default=None, description="Always null.")


class ChatChoice(BaseModel):
    """One answer."""

    index: int = Field(description="Which of the `n`.")
    message: ChatMessage = Field(description="What it says.")
    logprobs: ChatLogprobs | None = Field(description="If asked for.")
    finish_reason: Literal["stop", "length"] = Field(
        description="`stop`: the end of text or a stop string."
    )


class ChatResponse(Answer):
    """The answer to `POST /v1/chat/completions`."""

    object: Literal["chat.completion"] = Field(description="What this is.")
    choices: list[ChatChoice] = Field(description="The answers.")


class ChatDelta(BaseModel):
    """The next piece of an answer."""

    role: Literal["assistant"] | None = Field(default=None, description="In the first piece.")
    content: str | None = Field(default=None, description="The next piece of the text.")


class ChunkChoice(BaseModel):
    """The next piece of one answer."""

    index: int = Field(description="Which of the `n`.")
    delta: ChatDelta = Field(description="What is new.")
    logprobs: ChatLogprobs | None = Field(description="Of the new tokens, if asked for.")
    finish_reason: Literal["stop", "length"] | None = Field(description="In the last piece.")


class ChatChunk(Answer):
    """One event of a stream."""

    object: Literal["chat.completion.chunk"] = Field(description="What this is.")
    choices: list[ChunkChoice] = Field(description="One; none in the chunk that has the usage.")
