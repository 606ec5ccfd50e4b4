"""Fields of OpenAI's bodies that no type describes: either-or, by number, or without effect."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import CoreSchema, core_schema

from engine.serving.request import MAX_BIAS, MAX_BIASES, MAX_STOP_LENGTH, MAX_STOPS
from server.schemas.fields import encodable, refuse

MAX_TEXT_STOPS: Final = MAX_STOPS - 1  # one is left for the end of a turn
MAX_TOKEN_ID: Final = (1 << 31) - 1
MAX_NAME: Final = 256


class Unsupported:
    """In an annotation: a feature that is not here. It takes null, or a value that means so."""

    def __init__(self, *neutral: Any) -> None:
        self.neutral = (None, *neutral)

    def check(self, value: Any) -> Any:
        """The value, if it is neutral; 0 is not false."""
        if not any(type(value) is type(other) and value == other for other in self.neutral):
            raise refuse("is not supported: leave it out or send null")
        return value

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, _schema: Any, _handler: Any) -> dict[str, Any]:
        return {"enum": list(self.neutral), "description": "Not supported: without effect."}


def _read_stop(value: Any) -> tuple[str, ...]:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    fits = (
        isinstance(texts, list)
        and len(texts) <= MAX_TEXT_STOPS
        and all(isinstance(text, str) and 1 <= len(text) <= MAX_STOP_LENGTH for text in texts)
    )
    if not fits:
        raise refuse(
            f"must be a string of 1 to {MAX_STOP_LENGTH} characters, or a list of at most "
            f"{MAX_TEXT_STOPS} of them"
        )
    return tuple(map(encodable, texts))


_STOP: Final = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}
Stop = Annotated[
    Any,
    PlainValidator(_read_stop),
    WithJsonSchema(
        {
            "anyOf": [
                _STOP,
                {"type": "array", "items": _STOP, "maxItems": MAX_TEXT_STOPS},
                {"type": "null"},
            ]
        }
    ),
]


def _read_bias(value: Any) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise refuse(f"must be an object of at most {MAX_BIASES} token ids")
    biases = {}
    for token, bias in value.items():
        number = type(bias) in (int, float) and -MAX_BIAS <= bias <= MAX_BIAS
        if not number or len(token) > 10 or not (token.isascii() and token.isdigit()):
            raise refuse(
                f"must map token ids, as strings, to numbers from {-MAX_BIAS:g} to {MAX_BIAS:g}"
            )
        biases[int(token)] = float(bias)
    return tuple(biases.items())


Bias = Annotated[
    Any,
    PlainValidator(_read_bias),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "propertyNames": {"pattern": "^[0-9]{1,10}$"},
                    "additionalProperties": {
                        "type": "number",
                        "minimum": -MAX_BIAS,
                        "maximum": MAX_BIAS,
                    },
                    "maxProperties": MAX_BIASES,
                },
                {"type": "null"},
            ]
        }
    ),
]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
