"""What OpenAI's completions and chat completions share: parameters of generation, usage, errors.

Every known field does what OpenAI says of it or is refused by name; a field of a feature that is
not here is taken only with the value that means "without it". Fields of others that are common
among servers of open models (`top_k`, `min_p`, `repetition_penalty`, `min_tokens`, `ignore_eos`,
`stop_token_ids`) work too, and one is ours: `experts`, the expert policy.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from engine.errors import InvalidRequest, require
from engine.policy import ExpertPolicy
from engine.serving.request import MAX_COMPLETIONS, MAX_SEED, MAX_STOPS, SamplingParams
from engine.text.grammar import Grammar
from server.errors import ContextTooLong
from server.schemas.fields import (
    MAX_TOKENS,
    Factor,
    Penalty,
    Policy,
    Probability,
    Strict,
    Text,
    or_default,
    refuse,
)
from server.schemas.openai_fields import MAX_NAME, Bias, Stop, TokenId, Unsupported
from server.schemas.response_format import FormatField
from server.schemas.sentences import SENTENCE
from server.schemas.tgi import ExpertDetails

Count = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
_OpenAITemperature = Annotated[float, Field(ge=0.0, le=2.0, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


class StreamOptions(Strict):
    """What a stream has besides its text."""

    include_usage: bool | None = Field(
        default=None,
        description="End with a chunk that has no choices and the usage of the whole request.",
    )
    include_obfuscation: Annotated[Any, Unsupported(False)] = None


class GenerationBody(Strict):
    """The fields that completions and chat completions share."""

    model: Annotated[Text, Field(max_length=MAX_NAME)] | None = Field(
        default=None, description="Name of the model: see `GET /v1/models`. Default: the one here."
    )
    experts: Policy = Field(
        default_factory=ExpertPolicy.auto,
        description="Extension: the expert policy, as in `parameters.experts` of `/generate`.",
    )
    frequency_penalty: Penalty | None = Field(
        default=None,
        description="Subtracted from a token's logit per earlier occurrence in the output.",
    )
    ignore_eos: bool | None = Field(
        default=None, description="Extension: generate past the end of text."
    )
    logit_bias: Bias = Field(
        default=(), description="Token ids, as strings, and what is added to their logits."
    )
    metadata: Annotated[Any, Unsupported({})] = None
    min_p: _Share | None = Field(
        default=None,
        description="Extension: drop tokens less likely than this share of the likeliest.",
    )
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = Field(
        default=None, description="Extension: tokens before which nothing ends the output."
    )
    n: Annotated[int, Field(ge=1, le=MAX_COMPLETIONS)] | None = Field(
        default=None, description="Completions of each prompt. Default 1."
    )
    presence_penalty: Penalty | None = Field(
        default=None, description="Subtracted once from the logit of a token in the output."
    )
    prompt_cache_key: Annotated[Any, Unsupported()] = None
    repetition_penalty: Factor | None = Field(
        default=None,
        description="Extension: divides positive and multiplies negative logits of seen tokens.",
    )
    response_format: FormatField = Field(
        default=None,
        description="The form that the text has: `text`, `json_object`, or `json_schema`.",
    )
    safety_identifier: Annotated[Any, Unsupported()] = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = Field(
        default=None, description="Makes sampling reproducible, whatever else the server runs."
    )
    service_tier: Annotated[Any, Unsupported("auto", "default")] = None
    stop: Stop = Field(default=(), description="Strings that end the text; they are cut off.")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = Field(
        default=None, description="Extension: tokens that end the text."
    )
    store: Annotated[Any, Unsupported(False)] = None
    stream: bool | None = Field(default=None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = Field(
        default=None, description="Only for a stream: what it has besides its text."
    )
    temperature: _OpenAITemperature | None = Field(
        default=None, description="Divides the logits before drawing; 0 is greedy. Default 1."
    )
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS)] | None = Field(
        default=None, description="Extension: draw from the k likeliest tokens; 0 or -1 from all."
    )
    top_p: Probability | None = Field(
        default=None, description="Draw from the likeliest tokens that hold this probability."
    )
    user: Annotated[Text, Field(max_length=MAX_NAME)] | None = Field(
        default=None, description="Who asks, for the access log."
    )

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options must be left out unless stream is true", SENTENCE)
        return self

    @property
    def policy(self) -> ExpertPolicy:
        """The expert policy; `auto` is not resolved yet."""
        assert isinstance(self.experts, ExpertPolicy)
        return self.experts

    @property
    def grammar(self) -> Grammar | None:
        """The form that the output has."""
        assert self.response_format is None or isinstance(self.response_format, Grammar)
        return self.response_format

    @property
    def completions(self) -> int:
        """Completions of each prompt."""
        return self.n or 1

    @property
    def hides_output(self) -> bool:
        """Whether the answer leaves the output out."""
        return False

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def params(
        self,
        room: int,
        asked: int | None,
        default: int,
        *,
        stop: tuple[str, ...] = (),
        top_n: int = 0,
        prompt_logprobs: bool = False,
        name: str = "max_tokens",
    ) -> SamplingParams:
        """The engine's parameters.

        Args:
            room: tokens that the prompt leaves for the output.
            asked: `max_tokens` as it came.
            default: `max_tokens` where it did not; `room` if that is less.
            stop: strings that end the text besides those that the client sent.
            top_n: alternatives to report with each token.
            prompt_logprobs: report log-probabilities of the prompt, with as many alternatives.
            name: what the client calls `max_tokens`.

        Raises:
            ContextTooLong: the output does not fit.
            InvalidRequest: `min_tokens` is above `max_tokens`.
        """
        most = min(default, room) if asked is None else asked
        require(
            max(1, most) <= room,
            f"{name} must be at most {max(0, room)}, which is what the prompt leaves of the "
            f"model's context; got {most}",
            ContextTooLong,
        )
        least = self.min_tokens or 0
        require(
            least <= most,
            f"min_tokens must be from 0 to {name}, which is {most}; got {least}",
            InvalidRequest,
        )
        return SamplingParams(
            max_new_tokens=max(1, most),  # 0 is for echo alone; the answer leaves that token out
            temperature=or_default(self.temperature, 1.0),
            top_k=max(0, self.top_k or 0),
            top_p=or_default(self.top_p, 1.0),
            min_p=or_default(self.min_p, 0.0),
            repetition_penalty=or_default(self.repetition_penalty, 1.0),
            frequency_penalty=or_default(self.frequency_penalty, 0.0),
            presence_penalty=or_default(self.presence_penalty, 0.0),
            seed=self.seed,
            logit_bias=self.logit_bias,
            stop=(*self.stop, *stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            min_tokens=least,
            ignore_eos=bool(self.ignore_eos),
            top_n_tokens=top_n,
            prompt_logprobs=prompt_logprobs,
            prompt_top_n=top_n if prompt_logprobs else 0,
            grammar=self.grammar,
        )


class PromptDetails(BaseModel):
    """Tokens of prompts by where they came from."""

    cached_tokens: int = Field(description="Those whose keys and values were in the cache.")


class UsageInfo(BaseModel):
    """Tokens that a request took."""

    prompt_tokens: int = Field(description="Tokens of the prompts, each prompt once.")
    completion_tokens: int = Field(description="Tokens of all completions.")
    total_tokens: int = Field(description="Their sum.")
    prompt_tokens_details: PromptDetails = Field(description="Of the tokens of the prompt.")


class Answer(BaseModel):
    """What answers and chunks share."""

    id: str = Field(description="Name of this answer.")
    created: int = Field(description="When the request came, Unix time.")
    model: str = Field(description="Name of the model.")
    system_fingerprint: str = Field(description="Names the weights.")
    usage: UsageInfo | None = Field(
        default=None, description="Of a stream: only in the last chunk, if asked for."
    )
    experts: ExpertDetails | None = Field(
        default=None,
        description="Extension: the experts that were used. Of a stream: in the last chunk.",
    )


class OpenAIErrorDetails(BaseModel):
    """An error."""

    message: str = Field(description="One sentence.", max_length=1000)
    type: str = Field(description="Such as `invalid_request_error`.")
    param: str | None = Field(description="The field that is to blame, if one is.")
    code: str = Field(description="Such as `validation` or `rate_limit_exceeded`.")


class OpenAIErrorResponse(BaseModel):
    """Every error below /v1."""

    error: OpenAIErrorDetails = Field(description="What went wrong.")
