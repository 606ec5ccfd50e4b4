"""What the interfaces share: strict bodies, bounded numbers, texts, and the expert policy."""

from __future__ import annotations

from typing import Annotated, Any, Final, LiteralString

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from engine.config import MAX_EXPERTS
from engine.errors import InvalidRequest
from engine.policy import ExpertPolicy
from server.schemas.sentences import CONTINUATION, PREDICATE

MAX_TOKENS: Final = 1 << 20
MAX_POLICY_CHARS: Final = 32
MAX_FIELDS: Final = 64


def refuse(message: str, kind: LiteralString = PREDICATE) -> PydanticCustomError:
    """An error in our own words: what the field must be, or a whole SENTENCE."""
    # through a placeholder: braces in the message itself would be read as such
    return PydanticCustomError(kind, "{message}", {"message": message})


def encodable(text: str) -> str:
    """JSON can spell half of a surrogate pair, which no tokenizer can read."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise refuse("must be valid Unicode; it has half of a surrogate pair") from error
    return text


def _read_policy(value: Any) -> ExpertPolicy:
    """The `experts` field, as text or as an object, within any model's bounds."""
    try:
        policy = _policy(value)
        policy.validate(MAX_EXPERTS)
    except InvalidRequest as error:
        # the place says where, such as parameters.experts; the rest may lead on: .top_k must be
        raise refuse(str(error).removeprefix("experts"), CONTINUATION) from error
    return policy


def _policy(value: Any) -> ExpertPolicy:
    match value:
        case ExpertPolicy():
            return value
        case None:
            return ExpertPolicy.auto()
        case str() if len(value) <= MAX_POLICY_CHARS and not value.startswith("oracle"):
            return ExpertPolicy.parse(value)
        case {"top_k": int(k)} if len(value) == 1 and not isinstance(k, bool) and abs(k) < 1 << 31:
            return ExpertPolicy.top_k(k)
        case {"shared": int(k)} if len(value) == 1 and not isinstance(k, bool) and abs(k) < 1 << 31:
            return ExpertPolicy.shared(k)
        case {"mass": int(p) | float(p)} if len(value) == 1 and not isinstance(p, bool):
            return ExpertPolicy.mass(min(float(p), 2.0) if abs(p) < 1 << 31 else 2.0)
    raise InvalidRequest(
        'experts must be "dense", "auto", "top_k:N", "mass:SHARE", "shared:N", {"top_k": N}, '
        f'{{"mass": SHARE}} or {{"shared": N}} with N from 1 to {MAX_EXPERTS} and SHARE above 0 '
        "and at most 1"
    )


class Strict(BaseModel):
    """No coercion of types, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _not_too_many(cls, value: Any) -> Any:
        """Stop before a body of a million unknown fields becomes a million complaints."""
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise refuse(f"must have at most {MAX_FIELDS} fields, got {len(value)}")
        return value


Text = Annotated[str, AfterValidator(encodable)]
Probability = Annotated[float, Field(gt=0.0, le=1.0, allow_inf_nan=False)]
Factor = Annotated[float, Field(gt=0.0, le=100.0, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0, allow_inf_nan=False)]


def strict_object(properties: JsonDict, *required: str) -> JsonDict:
    """The JSON schema of an object with these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


# Any, not ExpertPolicy: its own schema is not what a client sends.
Policy = Annotated[
    Any,
    PlainValidator(_read_policy),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "enum": ["dense", "auto"]},
                {"type": "string", "pattern": r"^((top_k|shared):\d+|mass:\d*\.?\d+)$"},
                *(
                    strict_object(
                        {kind: {"type": "integer", "minimum": 1, "maximum": MAX_EXPERTS}}, kind
                    )
                    for kind in ("top_k", "shared")
                ),
                strict_object(
                    {"mass": {"type": "number", "exclusiveMinimum": 0, "maximum": 1}}, "mass"
                ),
            ],
            "examples": ["auto", "dense", {"top_k": 8}, {"mass": 0.95}, {"shared": 8}, "top_k:8"],
        }
    ),
]


def or_default(value: float | None, default: float) -> float:
    """null is the default."""
    return default if value is None else value
