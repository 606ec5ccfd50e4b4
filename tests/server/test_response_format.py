"""OpenAI's `response_format` and the grammars that it means."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from engine.errors import InvalidRequest
from engine.text.grammar import Grammar
from server.schemas.response_format import ResponseFormat, grammar_of

FORMAT: TypeAdapter[Any] = TypeAdapter(ResponseFormat | None)
SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}


def named(**fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", **fields}}


@pytest.mark.parametrize(
    ("value", "grammar"),
    [
        (None, None),
        ({"type": "text"}, None),
        ({"type": "json_object"}, Grammar.json_object()),
        (named(), Grammar.json_object()),
        (named(schema=SCHEMA), Grammar.json_schema(SCHEMA)),
        (named(schema=SCHEMA, strict=True), Grammar.json_schema(SCHEMA)),
        (named(schema=SCHEMA, strict=False, description="x"), Grammar.json_schema(SCHEMA)),
        (named(schema={}), Grammar.json_schema({})),
    ],
)
def test_grammar(value: Any, grammar: Grammar | None) -> None:
    assert grammar_of(FORMAT.validate_python(value)) == grammar


def test_the_order_of_properties_stays() -> None:
    made = grammar_of(FORMAT.validate_json(json.dumps(named(schema=SCHEMA))))
    assert made is not None
    assert list(json.loads(made.source)["properties"]) == ["b", "a"]
    assert made.field == "response_format.json_schema.schema"


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"type": "xml"},
        {"type": "text", "x": 1},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
        named(schema=True),
        named(schema="{}"),
        named(strict="yes"),
        {"type": "json_schema", "json_schema": {"name": "a b"}},
        {"type": "json_schema", "json_schema": {"name": "x" * 65}},
    ],
)
def test_refused(value: Any) -> None:
    with pytest.raises(ValidationError):
        FORMAT.validate_python(value)


def test_a_schema_that_is_too_large() -> None:
    value = FORMAT.validate_python(named(schema={"const": "x" * 70_000}))
    with pytest.raises(InvalidRequest, match=r"^response_format.json_schema.schema must have at"):
        grammar_of(value)
