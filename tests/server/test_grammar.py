"""Structured output over HTTP: what `parameters.grammar` takes, refuses, and does."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

from engine.grammar import MAX_GRAMMAR_BYTES

if TYPE_CHECKING:
    from conftest import Live

SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "ok": {"type": "boolean"},
    },
    "required": ["n", "ok"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "grammar",
    [
        {"type": "json", "value": SCHEMA},
        {"type": "json", "value": json.dumps(SCHEMA)},
        {"type": "json_schema", "value": {"name": "answer", "schema": SCHEMA}},
    ],
)
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 5}])
def test_json(live: Live, grammar: dict[str, Any], sampling: dict[str, Any]) -> None:
    answer = live.generate(grammar=grammar, max_new_tokens=60, details=True, **sampling)
    value = json.loads(answer["generated_text"])
    assert value.keys() == {"n", "ok"}
    assert 0 <= value["n"] <= 99
    assert isinstance(value["ok"], bool)
    assert answer["details"]["finish_reason"] == "eos_token"
    # the same, streamed
    events = live.stream(grammar=grammar, max_new_tokens=60, **sampling)
    assert events[-1]["generated_text"] == answer["generated_text"]
    assert "".join(e["token"]["text"] for e in events) == answer["generated_text"]


def test_regex(live: Live) -> None:
    pattern = "(é|🙂){2,3}-[0-9]{4}"
    answer = live.generate(grammar={"type": "regex", "value": pattern}, details=True)
    assert re.fullmatch(pattern, answer["generated_text"])
    assert answer["details"]["finish_reason"] == "eos_token"


@pytest.mark.parametrize(
    ("grammar", "sentence"),
    [
        ("x", 'parameters.grammar must be {"type": "json", "value": SCHEMA}'),
        ({}, "parameters.grammar must be {"),
        ({"type": "yaml", "value": {}}, "parameters.grammar must be {"),
        ({"type": "json", "value": 3}, "parameters.grammar must be {"),
        ({"type": "json"}, "parameters.grammar must be {"),
        ({"type": "json", "value": {}, "x": 1}, "parameters.grammar must be {"),
        ({"type": "json_schema", "value": SCHEMA}, "parameters.grammar must be {"),
        ({"type": "json_schema", "value": {"schema": {}, "x": 1}}, "parameters.grammar must be {"),
        ({"type": "regex", "value": {}}, "parameters.grammar must be {"),
        ({"type": "json", "value": "{bad"}, "parameters.grammar.value cannot be compiled: key"),
        ({"type": "json", "value": False}, "parameters.grammar must be {"),
        (
            {"type": "json", "value": {"type": "integer", "minimum": 5, "maximum": 3}},
            "cannot be compiled: Unsatisfiable schema",
        ),
        ({"type": "json", "value": {"type": "set"}}, "cannot be compiled: Invalid type: set"),
        (
            {"type": "json_schema", "value": {"schema": {"uniqueItems": True, "type": "array"}}},
            'grammar.value.schema cannot be compiled: Unimplemented keys: ["uniqueItems"]',
        ),
        (
            {"type": "json", "value": {"type": "array", "uniqueItems": True, "x-guidance": {}}},
            "cannot be compiled: Unimplemented keys",
        ),
        ({"type": "json", "value": {"$ref": "http://127.0.0.1/x"}}, "is not present in a registry"),
        ({"type": "regex", "value": "(a"}, "parameters.grammar.value cannot be compiled: unclosed"),
        ({"type": "regex", "value": "(?=a)b"}, "cannot be compiled: look-around, including"),
        (
            {"type": "regex", "value": "é" * (MAX_GRAMMAR_BYTES // 2 + 1)},
            "parameters.grammar.value must have at most 65536 bytes, got 65538",
        ),
        ({"type": "regex", "value": "\ud800"}, "parameters.grammar.value must be valid Unicode"),
    ],
)
def test_refused(live: Live, grammar: Any, sentence: str) -> None:
    body = json.dumps({"inputs": "x", "parameters": {"grammar": grammar}})
    response = live.http.post(
        "/generate", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 422, response.text
    assert sentence in response.json()["error"]
    assert "\n" not in response.json()["error"]
    assert len(response.json()["error"]) < 300
