"""OpenAI's `response_format`: what it takes, and the engine's grammar that it means."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from engine.grammar import Grammar
from server.schemas.tgi import Strict

FIELD = "response_format"


class TextFormat(Strict):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Strict):
    """Any JSON object."""

    type: Literal["json_object"]


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
        case JsonObjectFormat():
            return Grammar.json_object(FIELD)
        case JsonSchemaFormat(json_schema=JsonSchema(schema_=None)):
            return Grammar.json_object(FIELD)
        case JsonSchemaFormat(json_schema=JsonSchema(schema_=dict() as schema)):
            return Grammar.json_schema(schema, f"{FIELD}.json_schema.schema")
    return None
