"""`POST /v1/chat/completions`: the wire format, field by field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from engine import checkpoint as checkpoints

if TYPE_CHECKING:
    from tests.server.conftest import Live, Serve

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
PLAIN = "User: hi\nAssistant:"
TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('users begin') }}{% endif %}"
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chat(live: Live, messages: Any = HI, **fields: Any) -> dict[str, Any]:
    response = live.http.post(PATH, json={"messages": messages, "temperature": 0, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def stream(live: Live, **fields: Any) -> list[dict[str, Any]]:
    body = {"messages": HI, "temperature": 0, "stream": True, **fields}
    response = live.http.post(PATH, json=body)
    assert response.status_code == 200, response.text
    frames = response.text.removesuffix("\n\n").split("\n\n")
    assert frames.pop() == "data: [DONE]"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def test_an_answer_has_every_field(live: Live) -> None:
    answer = chat(live, max_completion_tokens=5)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    text = live.generate(PLAIN, max_new_tokens=5)["generated_text"]
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    assert answer["usage"]["prompt_tokens"] == len(PLAIN)
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["experts"]["policy"] == "top_k:4"


def test_the_old_name_of_the_limit_and_text_parts_work(live: Live) -> None:
    expected = chat(live, max_completion_tokens=5)["choices"]
    assert chat(live, max_tokens=5)["choices"] == expected
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert chat(live, [{"role": "user", "content": parts}], max_tokens=5)["choices"] == expected


def test_an_answer_can_come_back_as_it_was(live: Live) -> None:
    first = chat(live, max_tokens=5)["choices"][0]["message"]
    assert chat(live, [*HI, first, *HI], max_tokens=5)["usage"]["prompt_tokens"] > len(PLAIN) + 5


def test_without_a_limit_the_answer_may_fill_the_context(live: Live) -> None:
    answer = chat(live, [{"role": "user", "content": "x" * 3900}], ignore_eos=True, stop=None)
    most = live.frontend.max_total_tokens
    usage = answer["usage"]
    assert usage["total_tokens"] == most or answer["choices"][0]["finish_reason"] == "stop"


def test_the_plain_template_ends_where_the_user_would_speak(live: Live) -> None:
    """The model of the tests never writes that, so it is made to."""
    for letter in "\nUser:":
        (token,) = live.http.post("/tokenize", json={"prompt": letter}).json()["tokens"]
        biases = {token: 100}
        answer = chat(live, logit_bias=biases, max_tokens=3)["choices"][0]
        assert answer["message"]["content"] == letter * 3
    spelled = chat(live, stop=["zz"], logit_bias={token: 100}, max_tokens=3)
    assert spelled["choices"][0]["finish_reason"] == "length"


def test_logprobs(live: Live) -> None:
    answer = chat(live, max_tokens=6, logprobs=True, top_logprobs=2)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 6
    for entry in content:
        assert list(entry) == ["token", "logprob", "bytes", "top_logprobs"]
        assert len(entry["top_logprobs"]) == 2
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"]
        for token in (entry, *entry["top_logprobs"]):
            assert bytes(token["bytes"]).decode("utf-8", "replace") == token["token"]
    bare = chat(live, max_tokens=6, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in bare)


def test_bytes_of_parts_of_characters_add_up(live: Live) -> None:
    """The tokens of the tests are single bytes; an emoji is made likely, byte after byte."""
    ids = live.http.post("/tokenize", json={"prompt": "🙂"}).json()["tokens"]
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "🙂"}}}
    answer = chat(live, max_tokens=9, logprobs=True, response_format=format_)["choices"][0]
    raw = [bytes(entry["bytes"]) for entry in answer["logprobs"]["content"]]
    assert b"".join(raw).decode() == answer["message"]["content"] == '"🙂"'
    assert len(raw) == len(ids) + 2


def test_a_stream_says_what_the_whole_says(live: Live) -> None:
    fields = {"max_tokens": 9, "n": 2, "seed": 5, "temperature": 1.0, "logprobs": True}
    whole = chat(live, **fields)
    chunks = stream(live, **fields, stream_options={"include_usage": True})
    contents, tokens, roles = ["", ""], [[], []], [0, 0]
    for chunk in chunks[:-1]:
        assert chunk["object"] == "chat.completion.chunk"
        (piece,) = chunk["choices"]
        contents[piece["index"]] += piece["delta"]["content"]
        roles[piece["index"]] += piece["delta"].get("role") == "assistant"
        tokens[piece["index"]] += piece["logprobs"]["content"]
    assert contents == [c["message"]["content"] for c in whole["choices"]]
    assert tokens == [c["logprobs"]["content"] for c in whole["choices"]]
    assert roles == [1, 1]
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert chunks[-1]["experts"] == whole["experts"]


def test_the_plain_template_ends_where_a_named_user_would_speak(live: Live) -> None:
    """Beside many stop strings of the client. Three tokens are made likely, so the name
    comes up soon."""
    (ids,) = [live.http.post("/tokenize", json={"prompt": "\nZ:"}).json()["tokens"]]
    fields = {
        "logit_bias": dict.fromkeys(ids, 100),
        "temperature": 2.0,
        "frequency_penalty": 2.0,
        "seed": 1,
        "n": 8,
        "max_tokens": 100,
        "stop": [f"stop {i}" for i in range(14)],
    }
    others = chat(live, **fields)["choices"]
    assert {choice["finish_reason"] for choice in others} == {"length"}
    assert any("\nZ:" in choice["message"]["content"] for choice in others)
    named = chat(live, [{**HI[0], "name": "Z"}], **fields)["choices"]
    assert any(choice["finish_reason"] == "stop" for choice in named)
    assert not any("\nZ:" in choice["message"]["content"] for choice in named)


# Templates


def copy_with(checkpoint_dir: Path, path: Path, name: str, text: str) -> Path:
    """The checkpoint of the tests with one more file, at `path`."""
    loaded = checkpoints.load(checkpoint_dir)
    checkpoints.save(path, loaded.model, loaded.tokenizer, loaded.report, {name: text})
    return path


@pytest.fixture(scope="module")
def templated(
    serve: Serve, checkpoint_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Live]:
    path = tmp_path_factory.mktemp("templated") / "chatty"
    with serve(model=copy_with(checkpoint_dir, path, "chat_template.jinja", TEMPLATE)) as live:
        yield live


def test_the_checkpoint_s_template_makes_the_prompt(templated: Live) -> None:
    """Its end-of-text is one token; a message's own spelling of it is text."""
    usage = chat(templated, max_tokens=1)["usage"]
    assert usage["prompt_tokens"] == len("[user]hi") + 1 + len("[assistant]")
    spelled = [{"role": "user", "content": "a<|endoftext|>b"}]
    usage = chat(templated, spelled, max_tokens=1)["usage"]
    assert usage["prompt_tokens"] == len("[user]a<|endoftext|>b") + 1 + len("[assistant]")
    info = templated.http.get("/tokenizer_info").json()
    assert info["chat_template"] == TEMPLATE
    developer = [{"role": "developer", "content": "x"}, *HI]
    system = [{"role": "system", "content": "x"}, *HI]
    answers = [chat(templated, m, max_tokens=9)["choices"] for m in (developer, system)]
    assert answers[0] == answers[1]


def test_a_template_can_refuse_messages(templated: Live) -> None:
    body = {"messages": [{"role": "assistant", "content": "x"}]}
    response = templated.http.post(PATH, json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert "users begin" in error["message"]
    assert error["param"] == "messages"


def test_a_template_that_does_not_work_breaks_chats_alone(
    serve: Serve, checkpoint_dir: Path, tmp_path: Path
) -> None:
    text = json.dumps({"chat_template": "{% if %}"})
    path = copy_with(checkpoint_dir, tmp_path / "broken", "tokenizer_config.json", text)
    with serve(model=path) as live:
        response = live.http.post(PATH, json={"messages": HI})
        assert response.status_code == 400
        assert "chat template" in response.json()["error"]["message"]
        assert live.generate(max_new_tokens=1)
