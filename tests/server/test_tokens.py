"""`/tokenize`, `/detokenize`, `/tokenizer_info`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

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
        ("/tokenize", {"prompt": "x", "add_special_tokens": True}, 422, "is not supported"),
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


def test_special_tokens_are_those_of_the_checkpoint(foreign: Live) -> None:
    info = foreign.http.get("/tokenizer_info").json()
    assert info["eos_token"] == "</s>"
