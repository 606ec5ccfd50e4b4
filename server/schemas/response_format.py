"""OpenAI's `response_format`: what it takes, and the engine's grammar that it means."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field, PlainValidator, ValidationError, WithJsonSchema
from pydantic.config import JsonDict

from engine.errors import InvalidRequest
from engine.text.grammar import Grammar
from server.schemas.fields import Strict, refuse, strict_object
from server.schemas.sentences import CONTINUATION, SENTENCE, sentence

FIELD = "response_format"


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]
    value: dict[str, Any] | None = Field(
        default=None, description="A JSON schema, as huggingface_hub sends it."
    )


class JsonSchema(Strict):
    """A named JSON schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")] = Field(
        description="A name of the schema, for the client's own use."
    )
    description: Annotated[str, Field(max_length=1024)] | None = Field(
        default=None, description="What the schema is for; the model does not see it."
    )
    # `schema` is a method of pydantic's
    schema_: dict[str, Any] | None = Field(
        default=None,
        alias="schema",
        description="The JSON schema that the output satisfies; without it, any JSON object.",
    )
    strict: bool | None = Field(
        default=None, description="Schemas are always followed strictly, whatever this says."
    )


class JsonSchemaFormat(Strict):
    """JSON that satisfies a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


def grammar_of(response_format: ResponseFormat | None) -> Grammar | None:
    """The grammar that constrains the output; None for text.

    Raises:
        InvalidRequest: if the schema is too large. What else may be wrong with it shows when it
            is compiled; either sentence names the field.
    """
    match response_format:
        case JsonObjectFormat(value=dict() as schema):
            return Grammar.json_schema(schema, f"{FIELD}.value")
        case JsonObjectFormat():
            return Grammar.json_object(FIELD)
        case JsonSchemaFormat(json_schema=JsonSchema(schema_=None)):
            return Grammar.json_object(FIELD)
        case JsonSchemaFormat(json_schema=JsonSchema(schema_=dict() as schema)):
            return Grammar.json_schema(schema, f"{FIELD}.json_schema.schema")
    return None


FORMATS: Final[dict[str, type[Strict]]] = {
    "text": TextFormat,
    "json_object": JsonObjectFormat,
    "json_schema": JsonSchemaFormat,
}


def _read(value: Any) -> Grammar | None:
    """The grammar of the field as it comes; compiled later, off the event loop."""
    if value is None or isinstance(value, Grammar):
        return value
    kind = value.get("type") if isinstance(value, dict) else None
    model = FORMATS.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise refuse(".type must be one of text, json_object, json_schema", CONTINUATION)
    try:
        found = model.model_validate(value)
        assert isinstance(found, TextFormat | JsonObjectFormat | JsonSchemaFormat)
        return grammar_of(found)
    except ValidationError as error:
        raise refuse(f".{sentence(error.errors()[0], model)}", CONTINUATION) from error
    except InvalidRequest as error:
        raise refuse(str(error), SENTENCE) from error


_SCHEMA: Final[JsonDict] = {"type": "object", "description": "A JSON schema."}
_NAMED: Final = strict_object(
    {
        "name": {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"},
        "description": {"type": "string", "maxLength": 1024},
        "schema": _SCHEMA,
        "strict": {"type": "boolean"},
    },
    "name",
)
# What a body has: read as the grammar that it means, with sentences that name the field.
FormatField = Annotated[
    Any,
    PlainValidator(_read),
    WithJsonSchema(
        {
            "anyOf": [
                strict_object({"type": {"const": "text"}}, "type"),
                strict_object({"type": {"const": "json_object"}, "value": _SCHEMA}, "type"),
                strict_object(
                    {"type": {"const": "json_schema"}, "json_schema": _NAMED},
                    *("type", "json_schema"),
                ),
                {"type": "null"},
            ]
        }
    ),
]
