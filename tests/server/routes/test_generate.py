"""`POST /generate`, `/generate_stream` and `/`: the wire format, field by field."""

from __future__ import annotations

import base64
import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from tests.server.conftest import Live

EXPERTS_PER_TOKEN = 2 * 8  # layers times experts of the tiny model


def texts(tokens: list[dict[str, Any]]) -> str:
    return "".join(t["text"] for t in tokens if not t["special"])


def test_without_details_there_is_only_the_text(live: Live) -> None:
    response = live.post("/generate", max_new_tokens=5)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["generated_text"]


def test_details_have_every_field(live: Live) -> None:
    answer = live.generate(max_new_tokens=5, details=True)
    details = answer["details"]
    assert list(details) == [
        *("finish_reason", "generated_tokens", "seed", "prefill", "tokens", "experts")
    ]
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == len(details["tokens"]) == 5
    assert details["seed"] is None
    assert details["prefill"] == []
    for token in details["tokens"]:
        assert list(token) == ["id", "text", "logprob", "special"]
        assert token["logprob"] <= 0
        assert token["special"] is False
    assert texts(details["tokens"]) == answer["generated_text"]


def test_headers_say_what_it_took(live: Live) -> None:
    headers = live.post("/generate", "four", max_new_tokens=5, experts="dense").headers
    assert headers["x-prompt-tokens"] == "4"
    assert headers["x-generated-tokens"] == "5"
    assert float(headers["x-activated-expert-ratio"]) == 1.0
    total, seconds = float(headers["x-total-time"]), float(headers["x-compute-time"])
    assert total == pytest.approx(1000 * seconds, abs=0.01)
    parts = [f"x-{part}-time" for part in ("validation", "queue", "inference")]
    assert sum(float(headers[name]) for name in parts) <= total + 0.01
    assert float(headers["x-time-per-token"]) == pytest.approx(
        float(headers["x-inference-time"]) / 5, abs=0.01
    )


def test_greedy_is_the_default_and_does_not_vary(live: Live) -> None:
    first = live.generate(max_new_tokens=20)
    assert first == live.generate(max_new_tokens=20, temperature=1.0, top_k=0, top_p=1.0)
    assert first == live.generate(max_new_tokens=20, temperature=0.0, top_k=3)


@pytest.mark.parametrize(
    "parameters",
    [
        {"do_sample": True},
        {"temperature": 0.7},
        {"top_k": 10},
        {"top_p": 0.9},
        {"typical_p": 0.9},
    ],
)
def test_sampling_parameters_imply_sampling(live: Live, parameters: dict[str, Any]) -> None:
    details = live.generate(max_new_tokens=3, details=True, **parameters)["details"]
    assert isinstance(details["seed"], int)


def test_a_seed_reproduces_a_sample(live: Live) -> None:
    def sample(seed: int) -> dict[str, Any]:
        answer = live.generate(max_new_tokens=30, do_sample=True, seed=seed, details=True)
        assert answer["details"]["seed"] == seed
        return answer["details"]["tokens"]

    assert sample(7) == sample(7)
    assert sample(7) != sample(8)


def test_an_unseeded_sample_names_the_seed_that_repeats_it(live: Live) -> None:
    first = live.generate(max_new_tokens=30, do_sample=True, details=True)
    seed = first["details"]["seed"]
    assert live.generate(max_new_tokens=30, do_sample=True, seed=seed, details=True) == first


@pytest.mark.parametrize(
    "parameters",
    [{"repetition_penalty": 50.0}, {"frequency_penalty": 2.0}],
)
def test_penalties_reach_the_engine(live: Live, parameters: dict[str, Any]) -> None:
    plain = live.generate(max_new_tokens=60)
    assert live.generate(max_new_tokens=60, **parameters) != plain


def test_prefill_reports_the_prompt(live: Live) -> None:
    details = live.generate("abc", max_new_tokens=1, decoder_input_details=True)["details"]
    assert [list(t) for t in details["prefill"]] == [["id", "text", "logprob"]] * 3
    assert [t["text"] for t in details["prefill"]] == ["a", "b", "c"]
    assert details["prefill"][0]["logprob"] is None
    assert all(t["logprob"] < 0 for t in details["prefill"][1:])


def test_top_tokens_are_sorted_and_begin_with_the_greedy_one(live: Live) -> None:
    details = live.generate(max_new_tokens=4, top_n_tokens=3)["details"]
    assert len(details["top_tokens"]) == 4
    for token, top in zip(details["tokens"], details["top_tokens"], strict=True):
        assert [list(t) for t in top] == [["id", "text", "logprob", "special"]] * 3
        logprobs = [t["logprob"] for t in top]
        assert logprobs == sorted(logprobs, reverse=True)
        assert top[0]["id"] == token["id"]
        assert sum(math.exp(p) for p in logprobs) <= 1.0 + 1e-6


def test_return_full_text_puts_the_prompt_first(live: Live) -> None:
    plain = live.generate("hello", max_new_tokens=5)["generated_text"]
    full = live.generate("hello", max_new_tokens=5, return_full_text=True)["generated_text"]
    assert full == "hello" + plain


def test_truncate_keeps_the_end_of_the_prompt(live: Live) -> None:
    response = live.post("/generate", "abcdefgh", max_new_tokens=5, truncate=3)
    assert response.headers["x-prompt-tokens"] == "3"
    assert response.json() == live.generate("fgh", max_new_tokens=5)


def test_a_stop_string_ends_the_text_and_stays_in_it(live: Live) -> None:
    text = live.generate(max_new_tokens=40)["generated_text"]
    stop = text[9:12]
    answer = live.generate(max_new_tokens=40, stop=["never\u2603", stop], details=True)
    assert answer["generated_text"] == text[: text.index(stop) + len(stop)]
    assert answer["details"]["finish_reason"] == "stop_sequence"


def test_the_end_of_text_is_a_special_token(live: Live) -> None:
    def generate(seed: int) -> dict[str, Any]:
        return live.generate(max_new_tokens=60, temperature=100.0, seed=seed, details=True)

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(generate, range(64)))
    ended = [a for a in answers if a["details"]["finish_reason"] == "eos_token"]
    specials = []
    for answer in ended:
        tokens = answer["details"]["tokens"]
        assert [t["id"] == 0 for t in tokens] == [False] * (len(tokens) - 1) + [True]
        assert texts(tokens) == answer["generated_text"]
        assert "endoftext" not in answer["generated_text"]
        specials += [t["text"] for t in tokens if t["special"]]
    # Where random bytes end inside a character, the last token carries its replacement instead.
    assert set(specials) == {"<|endoftext|>"}
    assert len(specials) < len(ended)


def test_max_new_tokens_defaults_to_100_or_what_is_left(live: Live) -> None:
    assert live.post("/generate").headers["x-generated-tokens"] == "100"
    most = live.frontend.max_total_tokens
    response = live.post("/generate", "x" * (most - 7))
    assert response.headers["x-generated-tokens"] == "7"


@pytest.mark.parametrize(
    ("experts", "policy", "ratio"),
    [
        ("dense", "dense", 1.0),
        ("auto", "top_k:4", 0.5),
        (None, "top_k:4", 0.5),
        ("top_k:2", "top_k:2", 0.25),
        ({"top_k": 1}, "top_k:1", 0.125),
        ({"mass": 1}, "mass:1", None),
        ("mass:0.3", "mass:0.3", None),
    ],
)
def test_expert_policies(live: Live, experts: Any, policy: str, ratio: float | None) -> None:
    response = live.post("/generate", "four", max_new_tokens=4, details=True, experts=experts)
    found = response.json()["details"]["experts"]
    assert list(found) == ["policy", "activated_ratio", "activated", "available"]
    assert found["policy"] == policy
    assert found["activated_ratio"] == found["activated"] / found["available"]
    assert found["available"] % EXPERTS_PER_TOKEN == 0
    assert ratio is None or found["activated_ratio"] == ratio
    header = float(response.headers["x-activated-expert-ratio"])
    assert header == pytest.approx(found["activated_ratio"], abs=1e-6)


@pytest.mark.parametrize("experts", ["dense", "top_k:3", "mass:0.5"])
def test_details_experts_say_what_computed_each_token(live: Live, experts: str) -> None:
    """Of a prompt of one token that is everything that was computed."""
    parameters = {"max_new_tokens": 6, "experts": experts, "details_experts": True}
    details = live.generate("x", **parameters)["details"]
    tokens = details["tokens"]
    assert [list(t) for t in tokens] == [["id", "text", "logprob", "special", "experts"]] * 6
    activated = 0
    for token in tokens:
        assert list(token["experts"]) == ["activated_ratio", "chosen"]
        layers = base64.b64decode(token["experts"]["chosen"])
        assert len(layers) == 2
        used = [layer.bit_count() for layer in layers]
        assert experts != "dense" or used == [8, 8]
        assert experts != "top_k:3" or used == [3, 3]
        assert token["experts"]["activated_ratio"] == sum(used) / EXPERTS_PER_TOKEN
        activated += sum(used)
    assert activated == details["experts"]["activated"]
    assert [e["token"] for e in live.stream("x", **parameters)] == tokens


def test_the_root_route_answers_a_list_of_one(live: Live) -> None:
    parameters = {"max_new_tokens": 5, "details": True}
    for stream in ({}, {"stream": False}, {"stream": None}):
        body = {"inputs": "hello", "parameters": parameters, **stream}
        assert live.http.post("/", json=body).json() == [live.generate(**parameters)]


def test_parameters_may_be_left_out(live: Live) -> None:
    assert live.http.post("/generate", json={"inputs": "hello"}).json() == live.generate()


def test_text_of_several_bytes_a_character_survives(live: Live) -> None:
    answer = live.generate("naïve 東京 🙂", max_new_tokens=3, return_full_text=True)
    assert answer["generated_text"].startswith("naïve 東京 🙂")


def test_requests_at_the_same_time_do_not_mix(live: Live) -> None:
    prompts = ["a", "bc", "def", "ghij"] * 3
    alone = [live.generate(p, max_new_tokens=20, details=True) for p in prompts[:4]]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda p: live.generate(p, max_new_tokens=20), prompts))
    expected = [a["generated_text"] for a in alone]
    assert [t["generated_text"] for t in together] == expected * 3


# Streams


def test_a_stream_has_an_event_a_token_and_ends_with_details(live: Live) -> None:
    events = live.stream(max_new_tokens=5)
    assert [e["index"] for e in events] == [1, 2, 3, 4, 5]
    for event in events:
        assert list(event) == ["index", "token", "generated_text", "details"]
        assert list(event["token"]) == ["id", "text", "logprob", "special"]
    assert all(e["generated_text"] is None and e["details"] is None for e in events[:-1])
    last = events[-1]
    assert list(last["details"]) == [
        *("finish_reason", "generated_tokens", "input_length", "seed", "experts")
    ]
    assert last["details"]["finish_reason"] == "length"
    assert last["details"]["generated_tokens"] == 5
    assert last["details"]["input_length"] == 5
    assert last["generated_text"] == texts([e["token"] for e in events])


def test_a_stream_says_what_the_whole_says(live: Live) -> None:
    parameters = {"max_new_tokens": 12, "details": True, "top_n_tokens": 2, "stop": ["zz"]}
    whole, events = live.generate(**parameters), live.stream(**parameters)
    assert [e["token"] for e in events] == whole["details"]["tokens"]
    assert [e["top_tokens"] for e in events] == whole["details"]["top_tokens"]
    assert events[-1]["generated_text"] == whole["generated_text"]
    assert events[-1]["details"]["experts"] == whole["details"]["experts"]


def test_a_stream_can_return_the_full_text(live: Live) -> None:
    events = live.stream("hello", max_new_tokens=3, return_full_text=True)
    assert events[-1]["generated_text"] == "hello" + texts([e["token"] for e in events])


def test_the_root_route_streams(live: Live) -> None:
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 3}, "stream": True}
    response = live.http.post("/", json=body)
    assert response.text == live.post("/generate_stream", max_new_tokens=3).text


def test_stream_headers(live: Live) -> None:
    headers = live.post("/generate_stream", "four", max_new_tokens=1).headers
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    assert headers["x-prompt-tokens"] == "4"
    assert (headers["x-compute-type"], headers["x-compute-characters"]) == ("cpu", "4")


def test_events_arrive_while_the_model_still_works(serve: Any) -> None:
    with serve(step_seconds=0.02) as slow:
        body = {"inputs": "hello", "parameters": {"max_new_tokens": 50}}
        with slow.http.stream("POST", "/generate_stream", json=body) as response:
            parts = response.iter_raw()
            next(parts)
            assert slow.frontend.active == 1
            assert slow.metrics()["ambidex_generated_tokens_total"] < 25


def test_a_long_stream_holds_no_partial_characters(live: Live) -> None:
    events = live.stream("hello", max_new_tokens=300, temperature=100.0, seed=5)
    assert texts([e["token"] for e in events]) == events[-1]["generated_text"]


def test_httpx_sees_no_leftovers(live: Live) -> None:
    """Keep-alive works across routes: a route that leaves bytes behind would break the next."""
    with httpx.Client(base_url=live.url, trust_env=False) as http:
        for _ in range(3):
            assert http.post("/generate", json={"inputs": "x"}).status_code == 200
            assert http.post("/generate", content=b"{").status_code == 422
            assert http.get("/health").status_code == 200
