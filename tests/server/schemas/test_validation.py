"""What is refused: always with the right status, one sentence, and no echo of large input."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from tests.server.conftest import Live, Serve

JSON = {"Content-Type": "application/json"}
SHARED_REMOVED = "parameters.experts must not be shared: that policy was removed, use top_k instead"


def refused(response: Any, status: int = 422, error_type: str = "validation") -> str:
    """Assert the one shape of an error; returns its sentence."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error", "error_type"]
    assert body["error_type"] == error_type
    assert 0 < len(body["error"]) <= 1000
    assert "x-request-id" in response.headers
    return body["error"]


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        # what this server does not have, by name
        ({"best_of": 2}, "parameters.best_of above 1 is not supported"),
        ({"watermark": True}, "parameters.watermark is not supported"),
        # unknown fields
        ({"max_tokens": 5}, "parameters.max_tokens is not a known field; known are best_of, "),
        ({"adapter_id": "x"}, "parameters.adapter_id is not a known field"),
        ({"top_K": 5}, "parameters.top_K is not a known field"),
        # types
        ({"best_of": "1"}, "parameters.best_of must be an integer equal to 1, got '1'"),
        ({"details": 1}, "parameters.details must be true or false, got 1"),
        ({"do_sample": "true"}, "parameters.do_sample must be true or false"),
        ({"decoder_input_details": None}, "must be true or false, got null"),
        ({"max_new_tokens": "5"}, "must be an integer from 1 to 1048576, got '5'"),
        ({"max_new_tokens": 5.5}, "parameters.max_new_tokens must be an integer"),
        ({"max_new_tokens": True}, "parameters.max_new_tokens must be an integer"),
        ({"return_full_text": "yes"}, "parameters.return_full_text must be true or false"),
        ({"seed": "7"}, "parameters.seed must be an integer from 0 to 9223372036854775807"),
        ({"stop": "x"}, "parameters.stop must be a list of at most 16 strings"),
        ({"stop": [1]}, "parameters.stop[0] must be a string of 1 to 256 characters"),
        ({"temperature": "hot"}, "parameters.temperature must be a number from 0 to 100"),
        ({"watermark": 0}, "parameters.watermark must be true or false"),
        ([], "parameters must be an object"),
        (None, "parameters must be an object, got null"),
        ("x", "parameters must be an object"),
        # ranges
        ({"best_of": 0}, "parameters.best_of must be"),
        ({"frequency_penalty": 2.1}, "parameters.frequency_penalty must be a number from -2 to 2"),
        ({"max_new_tokens": 0}, "parameters.max_new_tokens must be"),
        ({"max_new_tokens": 10**30}, "parameters.max_new_tokens must be"),
        ({"repetition_penalty": 0}, "must be a number above 0 and at most 100, got 0"),
        ({"seed": -1}, "parameters.seed must be"),
        ({"seed": 2**63}, "parameters.seed must be"),
        ({"stop": ["a"] * 17}, "parameters.stop must be a list of at most 16"),
        ({"stop": [""]}, "parameters.stop[0] must be"),
        ({"stop": ["ok", "a" * 257]}, "parameters.stop[1] must be"),
        ({"temperature": -0.1}, "parameters.temperature must be"),
        ({"temperature": 0, "do_sample": True}, "parameters.temperature must be above 0"),
        ({"top_k": -1}, "parameters.top_k must be an integer from 0 to 1048576"),
        ({"top_n_tokens": 21}, "parameters.top_n_tokens must be an integer from 0 to 20"),
        ({"top_p": 0}, "parameters.top_p must be a number above 0 and at most 1"),
        ({"top_p": 1.01}, "parameters.top_p must be"),
        ({"truncate": 0}, "parameters.truncate must be"),
        ({"typical_p": 2}, "parameters.typical_p must be"),
        # expert policies
        ({"experts": "sparse"}, "parameters.experts must be dense, auto, top_k:N or mass:SHARE"),
        ({"experts": {"shared": 4}}, SHARED_REMOVED),
        ({"experts": "shared:4"}, SHARED_REMOVED),
        ({"experts": "shared"}, SHARED_REMOVED),
        ({"experts": {"shared": True}}, SHARED_REMOVED),
        ({"experts": {"shared": 4, "top_k": 4}}, SHARED_REMOVED),
        ({"experts": "oracle:4"}, "parameters.experts must be"),
        ({"experts": {"oracle": 4}}, "parameters.experts must be"),
        ({"experts": {}}, "parameters.experts must be"),
        ({"experts": {"top_k": 4, "mass": 0.5}}, "parameters.experts must be"),
        ({"experts": {"top_k": 0}}, "experts.top_k must be between 1 and 512, got 0"),
        ({"experts": {"top_k": 9}}, "experts.top_k must be between 1 and 8, got 9"),
        ({"experts": "top_k:9"}, "experts.top_k must be between 1 and 8, got 9"),
        ({"experts": {"top_k": True}}, "parameters.experts must be"),
        ({"experts": {"top_k": 2.0}}, "parameters.experts must be"),
        ({"experts": {"mass": 0}}, "experts.mass must be above 0 and at most 1, got 0"),
        ({"experts": {"mass": 1.5}}, "experts.mass must be above 0 and at most 1"),
        ({"experts": "mass:nan"}, "experts.mass must be above 0 and at most 1, got nan"),
        ({"experts": "top_k:" + "9" * 5000}, "parameters.experts must be"),
        ({"experts": 4}, "parameters.experts must be"),
    ],
)
def test_refused_parameters(live: Live, parameters: Any, sentence: str) -> None:
    for path in ("/generate", "/generate_stream", "/"):
        body = {"inputs": "x", "parameters": parameters}
        assert sentence in refused(live.http.post(path, json=body))


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize(
    "field",
    [
        *("temperature", "top_p", "typical_p", "repetition_penalty", "frequency_penalty"),
        *("max_new_tokens", "top_k", "seed"),
    ],
)
def test_numbers_must_be_finite(live: Live, field: str, literal: str) -> None:
    body = f'{{"inputs": "x", "parameters": {{"{field}": {literal}}}}}'
    response = live.http.post("/generate", content=body, headers=JSON)
    assert f"parameters.{field} must be" in refused(response)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "1e999", "9" * 400])
def test_an_expert_mass_must_be_finite(live: Live, literal: str) -> None:
    body = f'{{"inputs": "x", "parameters": {{"experts": {{"mass": {literal}}}}}}}'
    assert "experts" in refused(live.http.post("/generate", content=body, headers=JSON))


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ({}, "inputs is required"),
        ({"inputs": ""}, "inputs must be a string of at least 1 character"),
        ({"inputs": None}, "inputs must be a string of at least 1 character, got null"),
        ({"inputs": ["a", "b"]}, "inputs must be a string"),
        ({"inputs": [1, 2]}, "inputs must be a string"),
        ({"inputs": "x", "input": "y"}, "input is not a known field; known are inputs, par"),
        ([], "body must be a JSON object"),
        ("text", "body must be a JSON object"),
        (5, "body must be a JSON object"),
        (None, "body"),
    ],
)
def test_refused_bodies(live: Live, body: Any, sentence: str) -> None:
    assert sentence in refused(live.http.post("/generate", json=body))


def test_stream_is_a_field_of_the_root_route_alone(live: Live) -> None:
    body = {"inputs": "x", "stream": False}
    assert "stream is not a known field" in refused(live.http.post("/generate", json=body))
    body = {"inputs": "x", "stream": "yes"}
    assert "stream must be true or false" in refused(live.http.post("/", json=body))


def test_prefill_details_are_not_for_streams(live: Live) -> None:
    response = live.post("/generate_stream", decoder_input_details=True)
    assert "decoder_input_details must be false" in refused(response)


def test_a_prompt_that_is_too_long_is_refused_with_its_length(live: Live) -> None:
    limit = live.frontend.max_input_tokens
    response = live.post("/generate", "x" * (limit + 1))
    assert f"from 1 to {limit} tokens, got {limit + 1}" in refused(response)
    assert "inputs" in refused(live.post("/generate_stream", "x" * (limit + 1)))
    ok = live.post("/generate", "x" * (limit + 1), truncate=10, max_new_tokens=1)
    assert ok.status_code == 200


def test_a_truncation_beyond_the_limit_is_refused(live: Live) -> None:
    limit = live.frontend.max_input_tokens
    response = live.post("/generate", "x", truncate=limit + 1)
    assert f"truncate must be from 1 to {limit}" in refused(response)


def test_prompt_and_output_must_fit_together(live: Live) -> None:
    total = live.frontend.max_total_tokens
    assert live.post("/generate", "x" * (total - 2), max_new_tokens=2).status_code == 200
    sentence = refused(live.post("/generate", "x" * (total - 2), max_new_tokens=3))
    assert f"max_new_tokens must be at most {total}, got {total - 2} + 3" in sentence


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"inputs": "x"} trailing',
        b"\xff\xfe",
        b'{"inputs": "\xff"}',
        b'{"inputs": "x", "parameters": {"seed": ' + b"9" * 5000 + b"}}",
        b"[" * 100_000,
        b'{"inputs":' * 5_000 + b"1" + b"}" * 5_000,
    ],
    ids=["empty", "cut", "trailing", "utf16", "latin1", "digits", "brackets", "nested"],
)
def test_what_is_not_json_is_refused(live: Live, content: bytes) -> None:
    assert "body" in refused(live.http.post("/generate", content=content, headers=JSON))
    assert live.http.get("/health").status_code == 200


def test_nesting_that_json_allows_is_refused_shortly(live: Live) -> None:
    body = b'{"inputs": "x", "parameters": {"stop": ' + b"[" * 500 + b"]" * 500 + b"}}"
    assert len(refused(live.http.post("/generate", content=body, headers=JSON))) < 300


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "junk"])
def test_another_content_type_is_refused(live: Live, kind: str) -> None:
    response = live.http.post(
        "/generate", content=b'{"inputs":"x"}', headers={"Content-Type": kind}
    )
    assert "Content-Type: application/json" in refused(response)


def test_half_a_surrogate_pair_is_refused(live: Live) -> None:
    for body in (r'{"inputs": "\ud800"}', r'{"inputs": "x", "parameters": {"stop": ["\udc00"]}}'):
        response = live.http.post("/generate", content=body, headers=JSON)
        assert "must be valid Unicode" in refused(response)


def test_zero_bytes_and_controls_are_text(live: Live) -> None:
    text = "\x00\x1b\u2028\r\n\n"
    answer = live.generate(text, max_new_tokens=2, return_full_text=True)
    assert answer["generated_text"].startswith(text)
    assert live.stream(text, max_new_tokens=2)[-1]["details"]["generated_tokens"] == 2


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": "x", "y" * 100_000: 1},
        {"inputs": {"a" * 100_000: "b" * 100_000}},
        {"inputs": ["word " * 20_000] * 10},
        {"inputs": "x", "parameters": {"seed": "7" * 1_000_000}},
        {"inputs": "x", "parameters": {"stop": ["a" * 1_000_000]}},
        {"inputs": "x", "parameters": {"experts": "e" * 1_000_000}},
        {"inputs": "x", "parameters": {"experts": {"z" * 1_000_000: 1}}},
        {"inputs": "x", "parameters": {f"field{i}": i for i in range(50_000)}},
        {"inputs": "x", "parameters": {"\x1b[2J\n\u202e": 1}},
    ],
    ids=["name", "object", "list", "seed", "stop", "experts", "policy", "many", "escapes"],
)
def test_large_input_is_not_echoed(live: Live, body: Any) -> None:
    sentence = refused(live.http.post("/generate", content=json.dumps(body), headers=JSON))
    assert len(sentence) < 500
    assert sentence.isprintable()


@pytest.mark.parametrize("extreme", [{"temperature": 1e-300}, {"temperature": 100.0}])
@pytest.mark.parametrize("penalty", [1e-300, 1e-3, 100.0])
def test_extreme_numbers_within_range_are_served(
    live: Live, extreme: dict[str, float], penalty: float
) -> None:
    for others in (
        {"top_p": 1e-300, "typical_p": 1e-300, "repetition_penalty": penalty},
        {"top_k": 1 << 20, "frequency_penalty": -2.0, "repetition_penalty": penalty},
    ):
        parameters = {"max_new_tokens": 8, "details": True, "top_n_tokens": 20}
        answer = live.generate(**parameters, **extreme, **others)
        assert answer["details"]["generated_tokens"] >= 1
    assert live.http.get("/health").status_code == 200


# Around the routes


def test_unknown_paths_and_methods_have_the_same_shape(live: Live) -> None:
    sentence = refused(live.http.get("/nothing"), 404, "not_found")
    assert "GET /nothing" in sentence
    response = live.http.get("/generate")
    assert "GET /generate" in refused(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    long = refused(live.http.get("/" + "a%0a" * 1000), 404, "not_found")
    assert len(long) < 200
    assert long.isprintable()


def test_request_ids_are_echoed_or_made(live: Live) -> None:
    def answer(given: str | None) -> str:
        headers = {} if given is None else {"X-Request-Id": given}
        return live.http.get("/health", headers=headers).headers["x-request-id"]

    assert answer("my-request:1.2_3") == "my-request:1.2_3"
    assert answer(None) != answer(None)
    for bad in ("", "a" * 129, "two words", "semi;colon", "<script>"):
        made = answer(bad)
        assert made != bad
        assert len(made) == 32


def test_the_engine_knows_a_request_by_its_id(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[str] = []
    submit = live.worker.submit

    async def noting(request: Any) -> Any:
        known.append(request.request_id)
        return await submit(request)

    monkeypatch.setattr(live.worker, "submit", noting)

    def post(path: str, **body: Any) -> None:
        response = live.http.post(path, json=body, headers={"X-Request-Id": "mine"})
        assert response.status_code == 200, response.text

    chat = [{"role": "user", "content": "x"}]
    post("/generate", inputs="x", parameters={"max_new_tokens": 1})
    post("/generate_stream", inputs="x", parameters={"max_new_tokens": 1})
    post("/v1/chat/completions", messages=chat, max_tokens=1)
    assert known == ["mine"] * 3
    known.clear()
    post("/v1/completions", prompt="x", max_tokens=1, n=2)
    assert known == ["mine-0", "mine-1"]
    known.clear()
    post("/v1/completions", prompt=["x", "y"], max_tokens=1)
    post("/v1/completions", prompt=["x", "y"], max_tokens=1, n=2)
    assert known[:2] == ["mine-0", "mine-1"]
    assert known[2:] == ["mine-0-0", "mine-0-1", "mine-1-0", "mine-1-1"]


def test_requests_that_share_an_id_are_all_answered(serve: Serve) -> None:
    asked = {"inputs": "hello", "parameters": {"max_new_tokens": 30, "details": True}}
    with serve(step_seconds=0.002) as live, ThreadPoolExecutor(16) as pool:

        def post(number: int) -> tuple[str, list[Any]]:
            request_id = ("same", "same-0", "same-1")[number % 3]
            http = httpx.Client(base_url=live.url, trust_env=False, timeout=60)
            with http:
                headers = {"X-Request-Id": request_id}
                if number % 4:
                    answer = http.post("/generate", json=asked, headers=headers)
                    text = [answer.json()["generated_text"]]
                else:
                    body = {"prompt": "hello", "max_tokens": 30, "n": 2, "temperature": 0}
                    answer = http.post("/v1/completions", json=body, headers=headers)
                    text = [choice["text"] for choice in answer.json()["choices"]]
            assert answer.headers["x-request-id"] == request_id
            return answer.text, text

        answers = list(pool.map(post, range(24)))
        assert len({text for _, texts in answers for text in texts}) == 1


def test_refusals_are_counted(live: Live) -> None:
    name = 'ambidex_rejections_total{reason="invalid"}'
    before = live.metrics()[name]
    live.post("/generate", top_k=-1)
    live.post("/generate", "x" * (live.frontend.max_input_tokens + 1))
    live.post("/generate", experts="top_k:9")
    live.post("/generate", max_new_tokens=1 << 20)
    live.http.post("/generate", content=b"{", headers=JSON)
    live.http.post("/generate", content=b"[" * 100_000, headers=JSON)
    assert live.metrics()[name] == before + 6
