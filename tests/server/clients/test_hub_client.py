"""`huggingface_hub.InferenceClient`, unmodified: TGI's routes and chats."""

from __future__ import annotations

from typing import TYPE_CHECKING

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GenerationError,
    HfHubHTTPError,
    OverloadedError,
    ValidationError,
)

if TYPE_CHECKING:
    from tests.server.conftest import Live, Serve

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture
def client(live: Live) -> huggingface_hub.InferenceClient:
    return huggingface_hub.InferenceClient(model=live.url)


def test_text_generation(client: huggingface_hub.InferenceClient, live: Live) -> None:
    expected = live.generate(max_new_tokens=8, details=True)
    assert client.text_generation("hello", max_new_tokens=8) == expected["generated_text"]
    detailed = client.text_generation("hello", max_new_tokens=8, details=True, seed=1, top_p=0.99)
    assert detailed.details.generated_tokens == 8
    text = expected["generated_text"]
    stopped = client.text_generation("hello", max_new_tokens=8, stop=[text[3]])
    assert stopped == text[: text.index(text[3]) + 1]
    best = client.text_generation(
        "hello", max_new_tokens=2, details=True, top_n_tokens=2, decoder_input_details=True
    )
    assert best.details
    assert best.details.top_tokens
    assert len(best.details.prefill) == 5
    assert len(best.details.top_tokens[0]) == 2


def test_text_generation_stream(client: huggingface_hub.InferenceClient, live: Live) -> None:
    text = live.generate(max_new_tokens=8)["generated_text"]
    assert "".join(client.text_generation("hello", max_new_tokens=8, stream=True)) == text
    events = list(client.text_generation("hello", max_new_tokens=8, stream=True, details=True))
    assert events[-1].generated_text == text
    assert events[-1].details.generated_tokens == 8


def test_chat_completion(client: huggingface_hub.InferenceClient, live: Live) -> None:
    expected = live.generate("User: hi\nAssistant:", max_new_tokens=8)["generated_text"]
    answer = client.chat_completion(HI, max_tokens=8, temperature=0.0)
    assert answer.choices[0].message.content == expected
    assert answer.usage.completion_tokens == 8
    pieces = client.chat_completion(HI, max_tokens=8, temperature=0.0, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected
    scored = client.chat_completion(HI, max_tokens=3, logprobs=True, top_logprobs=2, seed=1)
    assert len(scored.choices[0].logprobs.content) == 3
    by_url = huggingface_hub.InferenceClient(base_url=live.url)
    assert by_url.chat.completions.create(HI, max_tokens=1).choices
    chosen = client.chat_completion(HI, max_tokens=2, extra_body={"experts": "dense"})
    assert chosen["experts"]["activated_ratio"] == 1.0


def test_errors(client: huggingface_hub.InferenceClient, serve: Serve) -> None:
    with pytest.raises(ValidationError, match="max_new_tokens"):
        client.text_generation("hello", max_new_tokens=1 << 20)
    with pytest.raises(HfHubHTTPError, match="max_tokens") as caught:
        client.chat_completion(HI, max_tokens=1 << 20)
    assert caught.value.response.status_code == 400
    with pytest.raises(HfHubHTTPError, match="tools is not supported"):
        client.chat_completion(HI, tools=[{"type": "function", "function": {"name": "f"}}])
    with serve(requests_per_minute=1) as limited:
        hasty = huggingface_hub.InferenceClient(model=limited.url)
        hasty.text_generation("x", max_new_tokens=1)
        with pytest.raises(OverloadedError):
            hasty.text_generation("x", max_new_tokens=1)
    with serve() as broken:
        broken.fail_steps()
        with pytest.raises(GenerationError, match="boom"):
            huggingface_hub.InferenceClient(model=broken.url).text_generation("x")
