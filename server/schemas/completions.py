"""Requests and responses of `POST /v1/completions`."""

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

from engine.serving.request import MAX_COMPLETIONS, MAX_TOP_N, SamplingParams
from server.schemas.fields import MAX_TOKENS, encodable, refuse
from server.schemas.openai import Answer, GenerationBody
from server.schemas.openai_fields import MAX_TOKEN_ID, Unsupported
from server.schemas.sentences import SENTENCE

DEFAULT_MAX_TOKENS: Final = 16
MAX_PROMPTS: Final = 2048

Prompts = list[str | list[int]]


def _read_prompts(value: Any) -> Prompts:
    """A text, token ids, or a list of texts or of token ids: as a list, of at least one."""
    single = isinstance(value, str) or _all_ints(value)
    prompts = [value] if single else value
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= MAX_PROMPTS:
        raise refuse(
            f"must be a string, a list of token ids, or a list of 1 to {MAX_PROMPTS} of either"
        )
    for position, prompt in enumerate(prompts):
        name = "" if single else f"[{position}]"
        _check_prompt(name, prompt)
    return prompts


def _all_ints(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _check_prompt(name: str, prompt: Any) -> None:
    if isinstance(prompt, str):
        if not prompt:
            raise refuse(f"prompt{name} must have at least 1 character", SENTENCE)
        encodable(prompt)
    elif not _all_ints(prompt):
        raise refuse(
            f"prompt{name} must be a string or a list of token ids, of at least 1", SENTENCE
        )
    elif min(prompt) < 0 or max(prompt) > MAX_TOKEN_ID:
        raise refuse(f"token ids of prompt{name} must be from 0 to {MAX_TOKEN_ID}", SENTENCE)


_STRING: Final = {"type": "string", "minLength": 1}
_IDS: Final = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID},
    "minItems": 1,
}
_EXAMPLE: Final[dict[str, Any]] = {
    "prompt": "Plants make sugar from",
    "max_tokens": 40,
    "experts": {"top_k": 8},
}


class CompletionRequest(GenerationBody):
    """The body of `POST /v1/completions`."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    prompt: Annotated[
        Any,
        PlainValidator(_read_prompts),
        WithJsonSchema(
            {
                "anyOf": [
                    _STRING,
                    _IDS,
                    *(
                        {"type": "array", "items": each, "minItems": 1, "maxItems": MAX_PROMPTS}
                        for each in (_STRING, _IDS)
                    ),
                ]
            }
        ),
    ] = Field(description="A text, a list of texts, or token ids in their place.")
    best_of: Annotated[int, Field(ge=1, le=MAX_COMPLETIONS)] | None = Field(
        default=None, description="Only as many as `n`: no more are made than are returned."
    )
    echo: bool | None = Field(
        default=None,
        description="Put the prompt in front of the text, and with `logprobs` its tokens too.",
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_N)] | None = Field(
        default=None,
        description="Report tokens with log-probabilities, and this many of the likeliest each.",
    )
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = Field(
        default=None,
        description=f"Tokens to generate at most. Default: {DEFAULT_MAX_TOKENS}, or fewer where "
        "the prompt leaves less room. 0 is useful with `echo`.",
    )
    suffix: Annotated[Any, Unsupported("")] = None

    @model_validator(mode="after")
    def _best_is_all(self) -> CompletionRequest:
        if self.best_of not in (None, self.completions):
            raise refuse(
                f"best_of is not supported but as n, which is {self.completions}: leave it out",
                SENTENCE,
            )
        return self

    @property
    def echoed(self) -> Prompts:
        """The prompts that the answer repeats."""
        prompts: Prompts = self.prompt
        return prompts if self.echo else []

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's tokens are reported with their log-probabilities."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def hides_output(self) -> bool:
        """Whether the answer leaves the output out."""
        return self.max_tokens == 0

    def sampling(self, room: int) -> SamplingParams:
        """The engine's parameters when the prompt leaves `room` tokens for the output."""
        return self.params(
            room,
            self.max_tokens,
            DEFAULT_MAX_TOKENS,
            top_n=self.logprobs or 0,
            prompt_logprobs=self.scores_prompt,
        )


class CompletionLogprobs(BaseModel):
    """The tokens of a choice, four lists of one length."""

    tokens: list[str] = Field(description="Their texts.")
    token_logprobs: list[float | None] = Field(
        description="Log-probabilities given the tokens before; null for a prompt's first."
    )
    top_logprobs: list[dict[str, float] | None] = Field(
        description="The likeliest tokens at each place and the one that stands there, by text."
    )
    text_offset: list[int] = Field(description="Where they begin in the text, in characters.")


class CompletionChoice(BaseModel):
    """One completion."""

    index: int = Field(description="Which: the prompts' in their order, `n` of each.")
    text: str = Field(description="The text, or a stream's next piece of it.")
    logprobs: CompletionLogprobs | None = Field(description="If asked for.")
    finish_reason: Literal["stop", "length"] | None = Field(
        description="`stop`: the end of text or a stop string. Null while a stream goes on."
    )


class CompletionResponse(Answer):
    """The answer to `POST /v1/completions`, and each chunk of a stream."""

    object: Literal["text_completion"] = Field(description="What this is.")
    choices: list[CompletionChoice] = Field(description="The completions.")
