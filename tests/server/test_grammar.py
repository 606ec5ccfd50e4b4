"""Structured output over HTTP: what `parameters.grammar` takes, refuses, and does."""

from __future__ import annotations

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from engine.text import structured
from engine.text.grammar import MAX_GRAMMAR_BYTES
from server.generation import MAX_COMPILING
from tests.server.conftest import read_events, wait_for

if TYPE_CHECKING:
    from conftest import Live, Serve

PATHS = ("/generate", "/generate_stream", "/v1/completions", "/v1/chat/completions")

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


def body_for(path: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A request of `path` whose output follows `schema`."""
    if not path.startswith("/v1"):
        return {"inputs": "x", "parameters": {"grammar": {"type": "json", "value": schema}}}
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    prompt = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    return {**prompt, "response_format": format_}


def test_what_outgrows_its_bounds_is_the_request_s_fault(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would do so again, so no client may try by itself; a 500 would make OpenAI's."""
    monkeypatch.setattr(structured, "MAX_LEXER_STATES", 40)
    monkeypatch.setattr(structured, "MAX_OWN_STATES", 40)
    schema = {"type": "string", "pattern": "^[ab]*a[ab]{40}$"}
    sentence = "is too complex to follow any further"
    with serve() as live:
        body = body_for("/generate", schema)
        body["parameters"]["max_new_tokens"] = 200
        response = live.http.post("/generate", json=body)
        assert response.status_code == 422, response.text
        assert response.json()["error_type"] == "validation"
        assert response.json()["error"].endswith(f"parameters.grammar.value {sentence}")
        body = {**body_for("/v1/completions", schema), "max_tokens": 200}
        response = live.http.post("/v1/completions", json=body)
        assert response.status_code == 400
        assert response.headers["x-should-retry"] == "false"
        error = response.json()["error"]
        assert error["param"] == "response_format.json_schema.schema"
        assert sentence in error["message"]
        response = live.http.post("/v1/completions", json={**body, "stream": True})
        events = read_events(response.text.replace("data: [DONE]\n\n", ""))
        assert events[-1] == {"error": error}
        assert live.generate(max_new_tokens=3)


def test_who_leaves_while_a_grammar_is_compiled_is_given_up(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiling, release = threading.Event(), threading.Event()

    def slow(_source: str) -> None:
        compiling.set()
        release.wait(60)

    monkeypatch.setattr(structured, "_check", slow)
    with serve() as live:
        try:
            for path in PATHS:
                body = body_for(path, {"const": path})
                with suppress(httpx.ReadTimeout):
                    live.http.post(path, json=body, timeout=0.3)
                assert compiling.is_set()
                wait_for(lambda: live.frontend.active == 0)
        finally:
            release.set()
        assert live.generate(max_new_tokens=3)
        assert live.frontend.numbers().finished["abort"] == 0  # none of them began


def test_the_queue_of_new_grammars_is_bounded(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In number and in time: schemas that would take minutes, as many as may wait and one more."""
    monkeypatch.setattr(structured, "COMPILE_SECONDS", 0.5)

    def ask(number: int) -> httpx.Response:
        schema = {"type": "integer", "multipleOf": 99_999_991 - 2 * number}
        return live.http.post("/generate", json=body_for("/generate", schema))

    with serve() as live, ThreadPoolExecutor(MAX_COMPILING) as pool:
        started = time.monotonic()
        waiting = [pool.submit(ask, number) for number in range(MAX_COMPILING)]
        wait_for(lambda: live.frontend._compiling == MAX_COMPILING)
        refused = ask(MAX_COMPILING)
        assert refused.status_code == 429
        assert refused.headers["retry-after"]
        assert f"{MAX_COMPILING} new grammars are waiting" in refused.json()["error"]
        assert live.generate(max_new_tokens=3)  # who has none need not wait
        answers = [each.result() for each in waiting]
        assert time.monotonic() - started < MAX_COMPILING * 0.5 + 10
        assert {answer.status_code for answer in answers} == {422}
        assert all("takes more than 0.5 s" in answer.json()["error"] for answer in answers)
        grammar = {"type": "regex", "value": "[0-9]{2}"}
        assert re.fullmatch("[0-9]{2}", live.generate(grammar=grammar)["generated_text"])
