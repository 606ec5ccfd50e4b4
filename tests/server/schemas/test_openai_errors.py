"""Errors below /v1: OpenAI's shape whatever raised them, one sentence, no echo of large input."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.server.conftest import Live, Serve

JSON = {"Content-Type": "application/json"}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def refused(response: Any, status: int = 400) -> dict[str, Any]:
    """Assert the one shape of an error; returns it."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert 0 < len(error["message"]) <= 1000
    assert error["type"].endswith("_error")
    assert "x-request-id" in response.headers
    return error


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "prompt is required"),
        ({"prompt": []}, "prompt must be a string, a list of token ids, or a list of 1 to 2048"),
        ({"prompt": ["a", 1]}, "prompt[1] must be a string or a list of token ids"),
        ({"prompt": [1, True]}, "prompt[0] must be a string or a list of token ids"),
        ({"prompt": [[1], []]}, "prompt[1] must be a string or a list of token ids"),
        ({"prompt": [-1]}, "token ids of prompt must be from 0"),
        ({"prompt": [257]}, "token ids of prompt must be from 0 to 256"),
        ({"prompt": [[1], [257]]}, "token ids of prompt[1] must be from 0 to 256"),
        ({"prompt": [1.0]}, "prompt[0] must be"),
        ({"prompt": "x", "n": 0}, "n must be an integer from 1 to 128, got 0"),
        ({"prompt": "x", "n": 129}, "n must be an integer from 1 to 128"),
        ({"prompt": "x", "logprobs": 21}, "logprobs must be an integer from 0 to 20"),
        ({"prompt": "x", "logprobs": True}, "logprobs must be an integer"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens must be an integer from 0"),
        ({"prompt": "x", "min_tokens": 17}, "min_tokens must be from 0 to max_tokens, which is 16"),
        ({"prompt": "x", "stream": "yes"}, "stream must be true or false, got 'yes'"),
        ({"prompt": "x", "stream_options": {}}, "stream_options must be left out unless stream"),
        ({"prompt": "x", "stream": True, "stream_options": {"x": 1}}, "stream_options.x is not a"),
        ({"prompt": "x", "stop": [""]}, "stop must be a string of 1 to 256 characters, or a list"),
        ({"prompt": "x", "stop_token_ids": [257]}, "token ids of stop_token_ids must be"),
        ({"prompt": "x", "logit_bias": {"x": 1}}, "logit_bias must map token ids"),
        ({"prompt": "x", "logit_bias": {"1": 101}}, "to numbers from -100 to 100"),
        ({"prompt": "x", "logit_bias": {"1": "2"}}, "to numbers from -100 to 100"),
        ({"prompt": "x", "logit_bias": {"257": 1}}, "token ids of logit_bias must be"),
        ({"prompt": "x", "logit_bias": [1]}, "logit_bias must be an object of at most 300"),
        ({"prompt": "x", "experts": "sparse"}, "experts must be dense, auto, top_k:N"),
        ({"prompt": "x", "experts": {"shared": 4}}, "experts must not be shared: that policy was"),
        ({"prompt": "x", "user": "u" * 257}, "user must be a string of 0 to 256 characters"),
        ({"prompt": "x", "messages": []}, "messages is not a known field; known are best_of, "),
        ([], "body must be a JSON object"),
    ],
)
def test_completions(live: Live, body: Any, sentence: str) -> None:
    assert sentence in refused(live.http.post(COMPLETIONS, json=body))["message"]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "messages is required"),
        ({"messages": []}, "messages must be a list of 1 to 2048 objects, got []"),
        ({"messages": ["x"]}, "messages[0] must be an object, got 'x'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content is required"),
        ({"messages": [{"content": "x"}]}, "messages[0].role is required"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "must be one of system, developer,"),
        ({"messages": [{"role": "user", "content": None}]}, "content must be a string or a list"),
        ({"messages": [{"role": "user", "content": []}]}, "content must be a string or a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type must be text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            'messages[0].content[0] must be {"type": "text", "text": string}',
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages[0].tool_calls is not supported",
        ),
    ],
)
def test_messages(live: Live, body: Any, sentence: str) -> None:
    assert sentence in refused(live.http.post(CHAT, json=body))["message"]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"top_logprobs": 2}, "top_logprobs must be left out unless logprobs is true"),
        ({"logprobs": 1}, "logprobs must be true or false"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens must be left out beside"),
        ({"max_tokens": 0}, "max_tokens must be an integer from 1"),
        ({"response_format": {"type": "xml"}}, "response_format.type must be one of text,"),
        ({"stop": "x" * 257}, "stop must be a string"),
        ({"echo": True}, "echo is not a known field"),
    ],
)
def test_chats(live: Live, fields: Any, sentence: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], **fields}
    assert sentence in refused(live.http.post(CHAT, json=body))["message"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"prompt": ' + b"9" * 5000 + b"}"],
    ids=["empty", "cut", "utf16", "brackets", "digits"],
)
def test_what_is_not_json(live: Live, content: bytes) -> None:
    error = refused(live.http.post(COMPLETIONS, content=content, headers=JSON))
    assert error["code"] == "validation"


def test_half_a_surrogate_pair(live: Live) -> None:
    for body in (
        r'{"prompt": "\ud800"}',
        r'{"prompt": ["x", "\ud800"]}',
        r'{"prompt": "x", "stop": "\udc00"}',
        r'{"prompt": "x", "user": "\udc00"}',
        r'{"prompt": "x", "model": "\udc00"}',
    ):
        error = refused(live.http.post(COMPLETIONS, content=body, headers=JSON))
        assert "must be valid Unicode" in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": {"a" * 100_000: "b" * 100_000}},
        {"prompt": "x", "stop": ["a" * 1_000_000]},
        {"prompt": "x", "logit_bias": {"z" * 1_000_000: 1}},
        {"prompt": "x", "logit_bias": {str(i): 1 for i in range(50_000)}},
        {"prompt": "x", "suffix": "s" * 1_000_000},
        {"prompt": "x", "model": "m" * 256},
        {"prompt": "x", "model": "\x1b[2J\u202e"},
        {"prompt": "x", "y" * 100_000: 1},
        {"prompt": [[]] * 2000},
    ],
    ids=["object", "stop", "bias", "biases", "suffix", "model", "escapes", "name", "lists"],
)
def test_large_input_is_not_echoed(live: Live, body: Any) -> None:
    response = live.http.post(COMPLETIONS, content=json.dumps(body), headers=JSON)
    error = refused(response, 404 if "model" in body else 400)
    assert len(error["message"]) < 600
    assert error["message"].isprintable()


def test_errors_of_the_layers_around_the_routes(serve: Serve) -> None:
    with serve(max_body_bytes=1024, max_url_bytes=100) as live:
        assert refused(live.http.get("/v1/nothing"), 404)["code"] == "not_found"
        assert refused(live.http.get(CHAT), 405)["code"] == "method_not_allowed"
        assert refused(live.http.post(CHAT, content=b"x" * 2000), 413)["param"] is None
        assert refused(live.http.get("/v1/models/" + "x" * 100), 414)["code"] == "validation"
        assert live.http.get("/nothing").json()["error_type"] == "not_found"  # TGI's shape


def test_a_fault_of_our_own_says_nothing_of_itself(serve: Serve) -> None:
    with serve() as live:

        def crash(*_: Any) -> None:
            raise ZeroDivisionError("a secret")

        live.frontend.check_model = crash  # type: ignore[method-assign, assignment]
        error = refused(live.http.post(COMPLETIONS, json={"prompt": "x"}), 500)
        assert (error["type"], error["code"]) == ("server_error", "internal")
        assert "secret" not in error["message"]


def test_the_user_goes_to_the_access_log(live: Live) -> None:
    from server.http.access_log import record
    from server.http.calls import Call

    assert record(Call(user="ada"))["user"] == "ada"
    assert "user" not in record(Call())
