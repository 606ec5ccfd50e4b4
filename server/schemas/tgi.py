"""Requests and responses of the text-generation-inference (TGI) interface.

Field by field what TGI takes, each bounded; unknown fields are refused, and so are the features
that this server does not have, by name. One field is ours: `experts`, the expert policy.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic.config import JsonDict

from engine.errors import InvalidRequest
from engine.policy import ExpertPolicy
from engine.serving.request import MAX_SEED, MAX_STOP_LENGTH, MAX_STOPS, MAX_TOP_N, SamplingParams
from engine.text.grammar import MAX_GRAMMAR_BYTES, Grammar
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
    strict_object,
)
from server.schemas.sentences import SENTENCE

DEFAULT_NEW_TOKENS: Final = 100


def _only_one(value: Any) -> Any:
    if type(value) is int and value > 1:
        raise refuse("above 1 is not supported: leave it out or send 1")
    return value


def _no_watermark(value: bool) -> bool:
    if value:
        raise refuse("is not supported: leave it out or send false")
    return value


def _read_grammar(value: Any) -> Grammar | None:
    """The `grammar` field; compiled later, off the event loop."""
    try:
        return _grammar(value)
    except InvalidRequest as error:
        raise refuse(str(error), SENTENCE) from error


def _grammar(value: Any) -> Grammar | None:
    field = "parameters.grammar"
    match value:
        case None | Grammar():
            return value
        case {"type": "json", "value": str(text)} if len(value) == 2:  # TGI takes it as text too
            return Grammar("json_schema", text, f"{field}.value")
        case {"type": "json", "value": dict() as schema} if len(value) == 2:
            return Grammar.json_schema(schema, f"{field}.value")
        case {"type": "json_schema", "value": {"schema": dict() as schema} as named} if len(
            value
        ) == 2 and named.keys() <= {"name", "schema"}:
            return Grammar.json_schema(schema, f"{field}.value.schema")
        case {"type": "regex", "value": str(pattern)} if len(value) == 2:
            return Grammar.regex(pattern, f"{field}.value")
    raise InvalidRequest(
        f'{field} must be {{"type": "json", "value": SCHEMA}}, {{"type": "json_schema", "value": '
        '{"name": NAME, "schema": SCHEMA}} or {"type": "regex", "value": PATTERN}'
    )


_SCHEMA: Final[JsonDict] = {"type": "object", "description": "A JSON schema."}


def _typed(kind: str, value: JsonDict) -> JsonDict:
    return strict_object({"type": {"const": kind}, "value": value}, "type", "value")


# Any, not Grammar: its own schema is not what a client sends.
GrammarField = Annotated[
    Any,
    PlainValidator(_read_grammar),
    WithJsonSchema(
        {
            "anyOf": [
                _typed("json", _SCHEMA),
                _typed(
                    "json_schema",
                    {
                        "type": "object",
                        "properties": {"name": {}, "schema": _SCHEMA},
                        "required": ["schema"],
                        "additionalProperties": False,
                    },
                ),
                _typed("regex", {"type": "string", "maxLength": MAX_GRAMMAR_BYTES}),
                {"type": "null"},
            ],
            "examples": [
                {"type": "regex", "value": "(yes|no)"},
                {"type": "json", "value": {"type": "object"}},
            ],
        }
    ),
]


class GenerateParameters(Strict):
    """How to generate. Everything is optional; null means the default."""

    best_of: Annotated[int | None, Field(ge=1, le=1), BeforeValidator(_only_one)] = Field(
        default=None, description="Candidates to choose from. Only 1 (or null) is supported."
    )
    decoder_input_details: bool = Field(
        default=False,
        description="Report the prompt's tokens and log-probabilities in `details.prefill`; "
        "implies `details`. Not for streams.",
    )
    details: bool = Field(
        default=False,
        description="Report tokens, finish reason, seed and experts beside the text. "
        "A stream's last event always has its details.",
    )
    details_experts: bool = Field(
        default=False,
        description="Report in `experts` of each token which experts computed it, and their share; "
        "implies `details`.",
    )
    do_sample: bool = Field(
        default=False,
        description="Draw tokens at random. Without it generation is greedy, unless one of "
        "`temperature` (other than 1), `top_k` (other than 0), `top_p` (below 1) or `typical_p` "
        "(below 1) is given, which implies it.",
    )
    experts: Policy = Field(
        default_factory=ExpertPolicy.auto,
        description="Expert policy of this request. `dense`: all experts. `top_k`: that many per "
        "token. `mass`: as many as the router predicts to hold this share of the activation mass. "
        "`shared`: as `top_k`, but a decoding token gives some of its experts up for others that "
        "the batch reads anyway, so the output depends on what else is decoded. "
        "`auto` (the default): what the checkpoint recommends, see `GET /info`.",
    )
    frequency_penalty: Penalty | None = Field(
        default=None,
        description="Subtracted from a token's logit per earlier occurrence in the output.",
    )
    grammar: GrammarField = Field(
        default=None,
        description="The form that the output has: JSON by a schema (given as an object, or as "
        "text), or a regular expression (in the syntax of Rust's regex crate) that it matches as a "
        f"whole. At most {MAX_GRAMMAR_BYTES} bytes, and a few seconds to compile.",
    )
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = Field(
        default=None,
        description=f"Tokens to generate at most. Default: {DEFAULT_NEW_TOKENS}, or fewer where "
        "the prompt leaves less room.",
    )
    repetition_penalty: Factor | None = Field(
        default=None,
        description="Divides positive and multiplies negative logits of tokens seen before.",
    )
    return_full_text: bool | None = Field(
        default=None, description="Put the prompt in front of `generated_text`."
    )
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = Field(
        default=None, description="Makes sampling reproducible, whatever else the server runs."
    )
    stop: Annotated[
        list[Annotated[Text, Field(min_length=1, max_length=MAX_STOP_LENGTH)]],
        Field(max_length=MAX_STOPS),
    ] = Field(
        default_factory=list,
        description="Strings that end the text. They are kept in it.",
    )
    temperature: Annotated[float, Field(ge=0.0, le=100.0, allow_inf_nan=False)] | None = Field(
        default=None, description="Divides the logits before drawing; 0 is greedy. Default 1."
    )
    top_k: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = Field(
        default=None, description="Draw from the k likeliest tokens; 0 or null from all."
    )
    top_n_tokens: Annotated[int, Field(ge=0, le=MAX_TOP_N)] | None = Field(
        default=None,
        description="Report this many of the likeliest tokens at each position, in "
        "`top_tokens`; implies `details`.",
    )
    top_p: Probability | None = Field(
        default=None, description="Draw from the likeliest tokens that hold this probability."
    )
    truncate: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = Field(
        default=None, description="Keep only this many tokens of the prompt, from its end."
    )
    typical_p: Probability | None = Field(
        default=None, description="Locally typical sampling (Meister et al., 2022)."
    )
    watermark: Annotated[bool, AfterValidator(_no_watermark)] = Field(
        default=False, description="Watermarks are not supported: only false is accepted."
    )

    @model_validator(mode="after")
    def _sampling_needs_heat(self) -> GenerateParameters:
        if self.do_sample and self.temperature == 0.0:
            raise refuse(
                "parameters.temperature must be above 0 and at most 100 when do_sample is true",
                SENTENCE,
            )
        return self

    @property
    def policy(self) -> ExpertPolicy:
        """The expert policy; `auto` is not resolved yet."""
        assert isinstance(self.experts, ExpertPolicy)
        return self.experts

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random; TGI's rule."""
        warps = (
            self.temperature not in (None, 1.0),
            self.top_k not in (None, 0),
            self.top_p not in (None, 1.0),
            self.typical_p not in (None, 1.0),
        )
        return self.do_sample or any(warps)

    @property
    def wants_details(self) -> bool:
        asked = self.details, self.decoder_input_details, self.details_experts
        return any(asked) or bool(self.top_n_tokens)

    def sampling(self, room: int) -> SamplingParams:
        """The engine's parameters when the prompt leaves `room` tokens for the output."""
        return SamplingParams(
            max_new_tokens=self.max_new_tokens or max(1, min(DEFAULT_NEW_TOKENS, room)),
            temperature=self._temperature(),
            top_k=self.top_k or 0,
            top_p=or_default(self.top_p, 1.0),
            typical_p=or_default(self.typical_p, 1.0),
            repetition_penalty=or_default(self.repetition_penalty, 1.0),
            frequency_penalty=or_default(self.frequency_penalty, 0.0),
            seed=self.seed,
            stop=tuple(self.stop),
            top_n_tokens=self.top_n_tokens or 0,
            prompt_logprobs=self.decoder_input_details,
            grammar=self.grammar,
            token_experts=self.details_experts,
        )

    def _temperature(self) -> float:
        return or_default(self.temperature, 1.0) if self.samples else 0.0


_EXAMPLE: Final[JsonDict] = {
    "inputs": "Plants make sugar from",
    "parameters": {"max_new_tokens": 40, "details": True, "experts": {"top_k": 8}},
}


class GenerateRequest(Strict):
    """The body of `POST /generate` and `POST /generate_stream`."""

    model_config = ConfigDict(json_schema_extra={"examples": [_EXAMPLE]})

    inputs: Annotated[Text, Field(min_length=1)] = Field(description="The prompt.")
    parameters: GenerateParameters = Field(
        default_factory=GenerateParameters, description="How to generate."
    )


class RootRequest(GenerateRequest):
    """The body of `POST /`: that of `/generate`, and whether to stream."""

    model_config = ConfigDict(json_schema_extra={"examples": [{**_EXAMPLE, "stream": False}]})

    stream: bool | None = Field(
        default=False, description="Answer with server-sent events, as `POST /generate_stream`."
    )


class PrefillToken(BaseModel):
    """A token of the prompt."""

    id: int = Field(description="Token id.")
    text: str = Field(description="The token's text.")
    logprob: float | None = Field(
        description="Log-probability given the tokens before it; null for the first."
    )


class TokenExperts(BaseModel):
    """The experts that computed a token."""

    activated_ratio: float = Field(description="Their share of all experts, over all layers.")
    chosen: str = Field(
        description="Which ones, in base64: for each layer one bit an expert, that of expert `e` "
        "being bit `e % 8`, from the least on, of byte `e // 8`; each layer begins a byte."
    )


class Token(BaseModel):
    """A generated token."""

    id: int = Field(description="Token id.")
    text: str = Field(
        description="The text that this token completes; empty inside a character of several "
        "tokens. The texts of all tokens that are not special make up the output."
    )
    logprob: float = Field(description="Log-softmax of the model's logits, before temperature.")
    special: bool = Field(
        description="Whether it is a control token, such as the end of text; false if it carries "
        "text, which had been held back as the possible beginning of a stop string."
    )
    experts: TokenExperts | None = Field(
        default=None, description="Extension: what computed the token, if `details_experts`."
    )


class ExpertDetails(BaseModel):
    """What the feed-forward layers computed for this request."""

    policy: str = Field(description="The policy that ran; `auto` appears as what it meant.")
    activated_ratio: float = Field(description="activated / available, from 0 to 1.")
    activated: int = Field(description="Experts used, summed over tokens and layers.")
    available: int = Field(description="Experts that a dense run would have used.")


class Details(BaseModel):
    """What `details` adds to a response."""

    finish_reason: str = Field(description="`length`, `eos_token` or `stop_sequence`.")
    generated_tokens: int = Field(description="Tokens in the output.")
    seed: int | None = Field(description="The seed that was used; null when greedy.")
    prefill: list[PrefillToken] = Field(description="The prompt, if `decoder_input_details`.")
    tokens: list[Token] = Field(description="The output.")
    top_tokens: list[list[Token]] | None = Field(
        default=None, description="The likeliest tokens at each position, if `top_n_tokens`."
    )
    experts: ExpertDetails = Field(description="Extension: the experts that were used.")


class GenerateResponse(BaseModel):
    """The answer to `POST /generate`."""

    generated_text: str = Field(description="The output.")
    details: Details | None = Field(default=None, description="If asked for.")


class StreamDetails(BaseModel):
    """What a stream's last event says about the whole."""

    finish_reason: str = Field(description="`length`, `eos_token` or `stop_sequence`.")
    generated_tokens: int = Field(description="Tokens in the output.")
    input_length: int = Field(description="Tokens in the prompt.")
    seed: int | None = Field(description="The seed that was used; null when greedy.")
    experts: ExpertDetails = Field(description="Extension: the experts that were used.")


class StreamEvent(BaseModel):
    """One event of a stream: one token."""

    index: int = Field(description="Position in the output, from 1.")
    token: Token = Field(description="The token.")
    top_tokens: list[Token] | None = Field(
        default=None, description="The likeliest tokens at this position, if `top_n_tokens`."
    )
    generated_text: str | None = Field(default=None, description="The output, in the last event.")
    details: StreamDetails | None = Field(default=None, description="In the last event.")


class ErrorResponse(BaseModel):
    """Every error."""

    error: str = Field(description="One sentence.", max_length=1000)
    error_type: str = Field(
        description="`validation`, `generation`, `overloaded`, `incomplete_generation`, "
        "`healthcheck`, `timeout`, `authentication`, `permission`, `checkpoint`, `not_found`, "
        "`model_not_found`, `method_not_allowed` or `internal`."
    )
