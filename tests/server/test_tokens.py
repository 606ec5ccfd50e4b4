"""`/tokenize`, `/detokenize`, `/tokenizer_info`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from engine.policy import ExpertPolicy
from engine.serving.request import SamplingParams

if TYPE_CHECKING:
    from conftest import Live, Serve


def post(live: Live, path: str, **body: Any) -> dict[str, Any]:
    response = live.http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_there_and_back(live: Live) -> None:
    text = "naïve 東京 🙂\n\x00"
    answer = post(live, "/tokenize", prompt=text, model="tiny", add_special_tokens=False)
    assert list(answer) == ["count", "max_model_len", "tokens"]
    assert answer["count"] == len(answer["tokens"]) == len(text.encode())
    assert answer["max_model_len"] == live.frontend.max_total_tokens
    assert post(live, "/detokenize", tokens=answer["tokens"]) == {"prompt": text}
    assert post(live, "/tokenize", prompt="")["tokens"] == []
    assert post(live, "/detokenize", tokens=[]) == {"prompt": ""}


def test_special_tokens_are_read_unless_asked_otherwise(live: Live) -> None:
    info = live.http.get("/tokenizer_info").json()
    ids = post(live, "/tokenize", prompt=info["eos_token"])["tokens"]
    assert ids == [live.engine.tokenizer.eos_id]
    assert post(live, "/detokenize", tokens=ids) == {"prompt": info["eos_token"]}
    spelled = post(live, "/tokenize", prompt=info["eos_token"], parse_special_tokens=False)
    assert spelled["count"] == len(info["eos_token"])
    body = {"prompt": info["eos_token"], "max_tokens": 1}
    usage = live.http.post("/v1/completions", json=body).json()["usage"]
    assert usage["prompt_tokens"] == spelled["count"]  # as prompts are read
    assert info["vocab_size"] == live.engine.model_config.vocab_size


@pytest.mark.parametrize(
    ("path", "body", "status", "sentence"),
    [
        ("/tokenize", {}, 422, "prompt is required"),
        ("/tokenize", {"prompt": 5}, 422, "prompt must be a string, got 5"),
        ("/tokenize", {"prompt": "x", "model": "y"}, 404, "model 'y' is not served here"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": 1}, 422, "must be true or false"),
        ("/detokenize", {"tokens": [257]}, 422, "tokens must be ids from 0 to 256"),
        ("/detokenize", {"tokens": [-1]}, 422, "tokens[0] must be an integer from 0 to"),
        ("/detokenize", {"tokens": "x"}, 422, "tokens must be a list of at most 1048576 integers"),
        ("/detokenize", {"tokens": [True]}, 422, "tokens[0] must be an integer"),
    ],
)
def test_refusals(live: Live, path: str, body: Any, status: int, sentence: str) -> None:
    response = live.http.post(path, json=body)
    assert response.status_code == status
    assert sentence in response.json()["error"]


@pytest.fixture(scope="module")
def foreign(serve: Serve, foreign_dir: Path) -> Iterator[Live]:
    """A server of a model that was imported, with tokens of its own."""
    with serve(model=foreign_dir) as live:
        yield live


def test_special_tokens_are_those_of_the_checkpoint(foreign: Live, live: Live) -> None:
    info = foreign.http.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<s>", "</s>")
    assert live.http.get("/tokenizer_info").json()["bos_token"] is None
    assert post(live, "/tokenize", prompt="ab") == post(
        live, "/tokenize", prompt="ab", add_special_tokens=False
    )


def test_every_text_begins_as_the_tokenizer_has_it(foreign: Live) -> None:
    """Whatever route reads it; ids mean what they say."""
    bare = post(foreign, "/tokenize", prompt="ab", add_special_tokens=False)["tokens"]
    ids = post(foreign, "/tokenize", prompt="ab")["tokens"]
    assert ids == [1, *bare] == post(foreign, "/tokenize", prompt="<s>ab")["tokens"]
    request = foreign.engine.make_request("ab", SamplingParams(), ExpertPolicy.dense())
    assert request.prompt_ids == ids
    asked = {"max_new_tokens": 3, "decoder_input_details": True}
    given = foreign.generate("ab", **asked)
    prefill = given["details"]["prefill"]
    assert [token["id"] for token in prefill] == ids
    assert prefill[0] == {"id": 1, "text": "<s>", "logprob": None}
    cut = foreign.generate("xyzab", **asked, truncate=3)
    assert [token["id"] for token in cut["details"]["prefill"]] == ids
    fields = {"max_tokens": 3, "temperature": 0, "echo": True, "logprobs": 1}
    text, tokens, without = (
        post(foreign, "/v1/completions", prompt=prompt, **fields) for prompt in ("ab", ids, bare)
    )
    assert [a["usage"]["prompt_tokens"] for a in (text, tokens, without)] == [3, 3, 2]
    choice, other = text["choices"][0], tokens["choices"][0]
    assert choice["text"] == "ab" + given["generated_text"]
    assert other["text"] == f"<s>{choice['text']}"
    assert choice["logprobs"]["token_logprobs"] == other["logprobs"]["token_logprobs"]
    assert choice["logprobs"]["text_offset"][:4] == [0, 0, 1, 2]
    assert other["logprobs"]["text_offset"][:4] == [0, 3, 4, 5]
    body = {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 1}
    spelled = post(foreign, "/tokenize", prompt="User: ab\nAssistant:")
    usage = post(foreign, "/v1/chat/completions", **body)["usage"]
    assert usage["prompt_tokens"] == spelled["count"] == 1 + len("User: ab\nAssistant:")
