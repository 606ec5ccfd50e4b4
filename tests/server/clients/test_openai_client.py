"""The `openai` package, unmodified: what it sends is served, what it gets it understands."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import jsonschema
import openai
import pydantic
import pytest

if TYPE_CHECKING:
    from tests.server.conftest import Live, Serve

KEY = "alice-0123456789abcdef"
HI: Any = [{"role": "user", "content": "hi"}]


def connect(live: Live, retries: int = 0, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=retries, timeout=60)


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[openai.OpenAI]:
    with connect(live) as client:
        yield client


def test_completions(client: openai.OpenAI, live: Live) -> None:
    answer = client.completions.create(
        model="tiny",
        prompt="hello",
        max_tokens=8,
        temperature=0,
        logprobs=2,
        user="somebody",
        extra_body={"experts": {"top_k": 2}},
    )
    expected = live.generate("hello", max_new_tokens=8, experts={"top_k": 2})
    assert answer.choices[0].text == expected["generated_text"]
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.token_logprobs or []) == 8
    assert answer.usage is not None
    assert answer.usage.total_tokens == 13
    assert answer.model_extra is not None
    assert answer.model_extra["experts"]["activated_ratio"] == 0.25


def test_completions_stream(client: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny", "prompt": ["a", "b"], "max_tokens": 8, "seed": 3}
    whole = client.completions.create(**fields)
    texts = ["", ""]
    usage = None
    with client.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    ) as chunks:
        for chunk in chunks:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=HI,
        max_completion_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
        n=2,
    )
    assert len(answer.choices) == 2
    assert answer.choices[0].message.content == answer.choices[1].message.content
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content[0].top_logprobs) == 3
    again: Any = [*HI, answer.choices[0].message, *HI]
    assert client.chat.completions.create(model="tiny", messages=again, max_tokens=1).choices


def test_chat_stream(client: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny", "messages": HI, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**fields).choices[0]
    with client.chat.completions.create(**fields, stream=True) as chunks:
        pieces = [chunk.choices[0] for chunk in chunks]
    assert pieces[0].delta.role == "assistant"
    assert "".join(piece.delta.content or "" for piece in pieces) == whole.message.content
    assert pieces[-1].finish_reason == whole.finish_reason
    assert whole.message.content
    stop = whole.message.content[3]
    with client.chat.completions.stream(**fields, stop=stop) as events:  # refuses one cut short
        final = events.get_final_completion()
    assert final.choices[0].message.content == whole.message.content.partition(stop)[0]


def test_the_asynchronous_client(live: Live) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{live.url}/v1", api_key=KEY, max_retries=0
        ) as client:
            chunks = await client.completions.create(
                model="tiny", prompt="hello", max_tokens=6, temperature=0, stream=True
            )
            return [chunk.choices[0].text async for chunk in chunks]

    expected = live.generate("hello", max_new_tokens=6)["generated_text"]
    assert "".join(asyncio.run(ask())) == expected


def test_models(client: openai.OpenAI, serve: Serve) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "ambidex"
    for alias in ("ambidex", "tgi"):
        assert client.models.retrieve(alias).id == "tiny"
    with pytest.raises(openai.NotFoundError, match="it is called 'tiny'"):
        client.models.retrieve("org/other")
    with serve(model_name="org/mine") as named, connect(named) as client:
        assert client.models.retrieve("org/mine").id == "org/mine"
        assert client.completions.create(model="org/mine", prompt="x").model == "org/mine"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="tiny", prompt="x")


# Structured output

PERSON: Any = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_answers_satisfy_their_schema(client: openai.OpenAI, temperature: float) -> None:
    fields: Any = {
        "model": "tiny",
        "messages": HI,
        "max_tokens": 300,
        "temperature": temperature,
        "seed": 1,
        "n": 3,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": PERSON, "strict": True},
        },
    }
    for choice in client.chat.completions.create(**fields).choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), PERSON)
    texts = ["", "", ""]
    with client.chat.completions.create(**fields, stream=True) as chunks:
        for chunk in chunks:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)


def test_a_parsed_answer_is_an_object(client: openai.OpenAI) -> None:
    class Person(pydantic.BaseModel):
        age: Literal[1, 2, 3]
        alive: bool

    answer = client.chat.completions.parse(
        model="tiny", messages=HI, max_tokens=300, response_format=Person
    )
    parsed = answer.choices[0].message.parsed
    assert parsed is not None
    assert parsed.age in (1, 2, 3)


def test_json_objects_in_both_routes(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny",
        prompt="hello",
        max_tokens=300,
        extra_body={"response_format": {"type": "json_object", "value": PERSON}},
    )
    jsonschema.validate(json.loads(answer.choices[0].text), PERSON)
    wanted: Any = {"type": "json_object"}
    short = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=30, response_format=wanted, logit_bias={"94": 100}
    )
    assert (short.choices[0].message.content or "").startswith("{")


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ("json", "response_format.type must be one of text, json_object, json_schema"),
        ({"type": "xml"}, "response_format.type must be one of text, json_object, json_schema"),
        ({"type": "json_schema"}, "response_format.json_schema is required"),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}},
            "response_format.json_schema.schema must be an object, got 5",
        ),
        (
            {"type": "json_schema", "json_schema": {"schema": {}}},
            "response_format.json_schema.name is required",
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}},
            "response_format.json_schema.schema",
        ),
        (
            {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"uniqueItems": True, "type": "array"}},
            },
            "response_format.json_schema.schema",
        ),
    ],
)
def test_formats_that_cannot_be_followed(client: openai.OpenAI, wanted: Any, sentence: str) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(sentence)):
        client.chat.completions.create(model="tiny", messages=HI, response_format=wanted)


# Errors


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": 3}, "temperature", "validation"),
        ({"stop": ["x"] * 16}, "stop", "validation"),
        ({"max_tokens": 1 << 20}, "max_tokens", "context_length_exceeded"),
        ({"prompt": "x" * 5000}, "prompt", "context_length_exceeded"),
        ({"prompt": ["a", "x" * 5000]}, "prompt[1]", "context_length_exceeded"),
        ({"prompt": ""}, "prompt", "validation"),
        ({"suffix": "x"}, "suffix", "validation"),
        ({"best_of": 3}, "best_of", "validation"),
        ({"extra_body": {"experts": {"top_k": 9}}}, "experts.top_k", "validation"),
        ({"extra_body": {"nonsense": 1}}, "nonsense", "validation"),
    ],
)
def test_bad_requests(client: openai.OpenAI, fields: Any, param: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "x", **fields})
    error = caught.value
    assert (error.param, error.code) == (param, code)
    assert error.type == "invalid_request_error"
    assert error.request_id


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"functions": [{"name": "f"}]},
        {"tool_choice": "required"},
        {"modalities": ["text", "audio"]},
        {"audio": {"voice": "x", "format": "wav"}},
        {"prediction": {"type": "content", "content": "x"}},
        {"reasoning_effort": "high"},
        {"web_search_options": {}},
        {"store": True},
        {"metadata": {"a": "b"}},
        {"service_tier": "priority"},
    ],
)
def test_features_that_are_not_here_are_refused_by_name(
    client: openai.OpenAI, fields: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError, match="is not supported") as caught:
        client.chat.completions.create(model="tiny", messages=HI, **fields)
    assert caught.value.param == next(iter(fields))


def test_fields_with_a_neutral_value_are_taken(client: openai.OpenAI) -> None:
    neutral: Any = {
        **{"store": False, "metadata": {}, "service_tier": "auto", "modalities": ["text"]},
        **{"tools": [], "tool_choice": "none", "response_format": {"type": "text"}},
    }
    answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=1, **neutral)
    assert answer.choices


def test_unknown_models_and_routes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-5", prompt="x")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="/v1/embeddings"):
        client.embeddings.create(model="tiny", input="x")


def test_keys(serve: Serve) -> None:
    with serve(api_keys=f"alice:{KEY}") as closed:
        with connect(closed, key="wrong-0123456789") as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                client.models.list()
            assert caught.value.code == "invalid_api_key"
        with connect(closed) as client:
            assert client.completions.create(model="tiny", prompt="x", max_tokens=3).choices
        closed.wait_until_idle()
        assert closed.metrics()['ambidex_key_requests_total{key="alice"}'] == 1


def test_a_full_server_is_asked_again(serve: Serve) -> None:
    """429 with Retry-After: the client waits and tries again by itself."""
    with serve(max_concurrent_requests=1, step_seconds=0.02) as small:
        fields: Any = {"model": "tiny", "prompt": "x", "max_tokens": 30, "temperature": 0}
        hasty, patient = connect(small), connect(small, retries=5)
        with hasty, patient, ThreadPoolExecutor(2) as pool:
            first = pool.submit(patient.completions.create, **fields)
            while not small.active():
                assert not first.done()
                time.sleep(0.005)
            with pytest.raises(openai.RateLimitError) as caught:
                hasty.completions.create(**fields)
            assert caught.value.code == "rate_limit_exceeded"
            assert int(caught.value.response.headers["retry-after"]) >= 1
            second = pool.submit(patient.completions.create, **fields)
            assert second.result().choices == first.result().choices


def test_a_draining_server_says_so_and_rate_limits_say_when(serve: Serve) -> None:
    with serve(requests_per_minute=2) as limited, connect(limited) as client:
        client.completions.create(model="tiny", prompt="x", max_tokens=1)
        client.completions.create(model="tiny", prompt="x", max_tokens=1)
        with pytest.raises(openai.RateLimitError, match="at most 2 requests"):
            client.completions.create(model="tiny", prompt="x", max_tokens=1)
    with serve() as stopping, connect(stopping) as client:
        stopping.refuse_requests()
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="tiny", prompt="x", max_tokens=1)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"] == "5"
        assert caught.value.code == "service_unavailable"


def test_a_request_that_is_late_is_not_sent_again(serve: Serve) -> None:
    with serve(step_seconds=0.02) as slow, connect(slow, retries=3) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(
                model="tiny",
                prompt="x",
                max_tokens=2000,
                extra_headers={"X-Request-Timeout": "0.3"},
            )
        assert caught.value.status_code == 504
        slow.wait_until_idle()
        assert slow.metrics()["ambidex_deadlines_exceeded_total"] == 1


def test_a_failing_step_ends_streams_with_an_error(serve: Serve) -> None:
    with serve() as broken, connect(broken) as client:
        broken.fail_steps(after=4)
        chunks = client.completions.create(model="tiny", prompt="x", max_tokens=50, stream=True)
        with pytest.raises(openai.APIError, match="boom"):
            list(chunks)
        with pytest.raises(openai.InternalServerError, match="boom") as caught:
            client.completions.create(model="tiny", prompt="x", max_tokens=50)
        assert caught.value.status_code == 500


def test_leaving_a_stream_aborts_it(serve: Serve) -> None:
    with serve(step_seconds=0.01) as slow, connect(slow) as client:
        with client.chat.completions.create(
            model="tiny", messages=HI, stream=True, extra_body={"ignore_eos": True}
        ) as chunks:
            next(iter(chunks))
        slow.wait_until_idle()
        assert slow.metrics()["ambidex_aborts_total"] == 1
