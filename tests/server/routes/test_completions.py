"""`POST /v1/completions`: the wire format, field by field."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httpx
import pytest

if TYPE_CHECKING:
    from tests.server.conftest import Live, Serve

PATH = "/v1/completions"


def complete(live: Live, prompt: Any = "hello", **fields: Any) -> dict[str, Any]:
    response = live.http.post(PATH, json={"prompt": prompt, "temperature": 0, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def stream(live: Live, prompt: Any = "hello", path: str = PATH, **fields: Any) -> list[Any]:
    """The chunks of a stream; asserts its framing and its end."""
    body = {"prompt": prompt, "temperature": 0, "stream": True, **fields}
    response = live.http.post(path, json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.text.removesuffix("\n\n").split("\n\n")
    assert frames.pop() == "data: [DONE]"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


def test_an_answer_has_every_field(live: Live) -> None:
    answer = complete(live, "four", max_tokens=5, experts="dense")
    assert list(answer) == [
        *("id", "created", "model", "system_fingerprint", "object", "choices", "usage", "experts")
    ]
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert answer["id"].startswith("cmpl-")
    (choice,) = answer["choices"]
    assert list(choice) == ["index", "text", "logprobs", "finish_reason"]
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert (
        choice["text"] == live.generate("four", max_new_tokens=5, experts="dense")["generated_text"]
    )
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 5,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert list(answer["experts"]) == ["policy", "activated_ratio", "activated", "available"]


@pytest.mark.parametrize(
    ("experts", "policy", "ratio"),
    [("dense", "dense", 1.0), (None, "top_k:4", 0.5), ({"top_k": 1}, "top_k:1", 0.125)],
)
def test_expert_policies(live: Live, experts: Any, policy: str, ratio: float) -> None:
    body = {"prompt": "four", "max_tokens": 4, "n": 2, "experts": experts}
    response = live.http.post(PATH, json=body)
    found = response.json()["experts"]
    assert (found["policy"], found["activated_ratio"]) == (policy, ratio)
    assert float(response.headers["x-activated-expert-ratio"]) == ratio
    last = stream(live, "four", max_tokens=4, experts=experts)[-1]
    assert (last["experts"]["policy"], last["experts"]["activated_ratio"]) == (policy, ratio)


def test_defaults_are_those_of_openai(live: Live) -> None:
    answers = [live.http.post(PATH, json={"prompt": "hello"}).json() for _ in range(4)]
    assert all(answer["usage"]["completion_tokens"] <= 16 for answer in answers)
    assert len({answer["choices"][0]["text"] for answer in answers}) > 1  # temperature 1


def test_a_prompt_may_be_text_or_ids_or_a_list_of_either(live: Live) -> None:
    ids = live.http.post("/tokenize", json={"prompt": "hello"}).json()["tokens"]
    text = complete(live)["choices"][0]["text"]
    for prompt in (ids, ["hello"], [ids]):
        assert complete(live, prompt)["choices"][0]["text"] == text
    many = complete(live, ["hello", "a", "hello"], max_tokens=7)
    assert [choice["index"] for choice in many["choices"]] == [0, 1, 2]
    assert many["choices"][0]["text"] == many["choices"][2]["text"] == text[: len(text)][:7]
    assert many["usage"]["prompt_tokens"] == 11
    assert many["usage"]["completion_tokens"] == 21


def test_n_completions_of_each_prompt_are_reproducible(live: Live) -> None:
    fields = {"n": 3, "temperature": 1.5, "seed": 4, "max_tokens": 20}
    answer = complete(live, ["ab", "cd"], **fields)
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(texts) == 6
    assert len(set(texts)) > 3
    assert answer["usage"]["prompt_tokens"] == 4
    assert [c["text"] for c in complete(live, ["ab", "cd"], **fields)["choices"]] == texts
    alone = complete(live, "cd", **{**fields, "n": 1})["choices"][0]["text"]
    assert alone == texts[3]
    assert complete(live, best_of=2, n=2)["choices"]


@pytest.mark.parametrize("as_list", [True, False])
def test_a_stop_string_is_cut_off(live: Live, as_list: bool) -> None:
    text = complete(live, max_tokens=40)["choices"][0]["text"]
    stop = text[9:12]
    fields = {"max_tokens": 40, "stop": ["never", stop] if as_list else stop}
    (choice,) = complete(live, **fields)["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"
    chunks = stream(live, **fields)
    assert "".join(c["choices"][0]["text"] for c in chunks) == choice["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_the_longest_of_the_stop_strings_that_end_together_is_cut(live: Live) -> None:
    text = complete(live, max_tokens=40)["choices"][0]["text"]
    longer = text[8:12]
    assert text.index(longer[1:]) > text.index(longer)
    (choice,) = complete(live, max_tokens=40, stop=[longer[1:], longer])["choices"]
    assert choice["text"] == text[: text.index(longer)]


def test_logit_bias_penalties_and_extensions_reach_the_engine(live: Live) -> None:
    plain = complete(live, max_tokens=30)["choices"][0]["text"]
    (letter,) = live.http.post("/tokenize", json={"prompt": "x"}).json()["tokens"]
    assert complete(live, max_tokens=5, logit_bias={letter: 100})["choices"][0]["text"] == "xxxxx"
    fields: dict[str, Any]
    for fields in (
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"repetition_penalty": 50.0},
    ):
        assert complete(live, max_tokens=30, **fields)["choices"][0]["text"] != plain
    heat = {"temperature": 2.0, "max_tokens": 30}
    for fields in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        assert complete(live, **heat, **fields)["choices"][0]["text"] == plain
    assert complete(live, max_tokens=30, top_k=-1)["choices"][0]["text"] == plain
    forced = {"logit_bias": {"0": 100}}  # the end of text
    assert complete(live, **forced)["choices"][0] == {
        **{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}
    }
    assert complete(live, **forced, ignore_eos=True)["usage"]["completion_tokens"] == 16
    assert complete(live, **forced, min_tokens=3)["usage"]["completion_tokens"] == 4
    stopped = complete(live, logit_bias={letter: 100}, stop_token_ids=[letter])
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert stopped["choices"][0]["text"] == ""


# Log-probabilities


def test_logprobs_have_the_chosen_token_among_the_likeliest(live: Live) -> None:
    (choice,) = complete(live, max_tokens=6, logprobs=3)["choices"]
    details = live.generate(max_new_tokens=6, top_n_tokens=3)["details"]
    found = choice["logprobs"]
    assert list(found) == ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
    assert found["token_logprobs"] == [token["logprob"] for token in details["tokens"]]
    for logprob, top, expected in zip(
        found["token_logprobs"], found["top_logprobs"], details["top_tokens"], strict=True
    ):
        assert logprob == max(top.values())  # greedy
        assert set(top.values()) <= {token["logprob"] for token in expected}
    only = complete(live, max_tokens=6, logprobs=0)["choices"][0]["logprobs"]
    assert [list(top.values()) for top in only["top_logprobs"]] == [
        [logprob] for logprob in only["token_logprobs"]
    ]


def test_offsets_lead_to_the_tokens(live: Live) -> None:
    prompt = "abc def"
    (choice,) = complete(live, prompt, max_tokens=12, logprobs=0, echo=True)["choices"]
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert offsets[: len(prompt)] == list(range(len(prompt)))
    whole = [(t, at) for t, at in zip(tokens, offsets, strict=True) if "\ufffd" not in t]
    assert len(whole) > len(prompt)
    assert offsets == sorted(offsets)
    for token, at in whole:  # behind what was left of a character before it, if anything was
        assert choice["text"][at:].lstrip("\ufffd").startswith(token)


@pytest.mark.parametrize("as_ids", [False, True])
def test_offsets_count_characters(live: Live, as_ids: bool) -> None:
    """Each token of these prompts is a byte: several lead to one character."""
    prompt = "né 東🙂!"
    (ids,) = [live.http.post("/tokenize", json={"prompt": prompt}).json()["tokens"]]
    given = ids if as_ids else prompt
    (choice,) = complete(live, given, max_tokens=2, logprobs=0, echo=True)["choices"]
    offsets = choice["logprobs"]["text_offset"][:-2]
    assert [choice["text"][at] for at in offsets] == list("néé 東東東🙂🙂🙂🙂!")
    assert choice["logprobs"]["text_offset"][-2] == len(prompt)


def test_echo_puts_the_prompt_first(live: Live) -> None:
    plain = complete(live, max_tokens=5)["choices"][0]["text"]
    (choice,) = complete(live, max_tokens=5, echo=True)["choices"]
    assert choice["text"] == "hello" + plain
    (nothing,) = complete(live, max_tokens=0, echo=True)["choices"]
    assert (nothing["text"], nothing["finish_reason"]) == ("hello", "length")


def score(live: Live, prompt: Any, max_tokens: int) -> tuple[list[Any], dict[str, Any]]:
    """What lm-evaluation-harness sends and reads: `LocalCompletionsAPI._create_payload` and
    `parse_logprobs` of its lm_eval/models/openai_completions.py, 0.4.13."""
    body = {
        "model": "tiny",
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": max_tokens,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    response = live.http.post(PATH, json=body)
    assert response.status_code == 200, response.text
    return [choice["logprobs"] for choice in response.json()["choices"]], response.json()["usage"]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_prompts_are_scored(live: Live, max_tokens: int) -> None:
    """As TGI's `decoder_input_details` has it, which the engine's own tests check."""
    prompts = ["the cat sat", "on"]
    ids = [live.http.post("/tokenize", json={"prompt": p}).json()["tokens"] for p in prompts]
    for prompt in (prompts, ids):
        scores, usage = score(live, prompt, max_tokens)
        assert usage["completion_tokens"] == 2 * max_tokens
        for text, found in zip(prompts, scores, strict=True):
            details = live.generate(text, max_new_tokens=1, decoder_input_details=True)["details"]
            assert {len(values) for values in found.values()} == {len(text) + max_tokens}
            expected = [token["logprob"] for token in details["prefill"]]
            assert found["token_logprobs"][: len(text)] == pytest.approx(expected, nan_ok=False)
            assert found["token_logprobs"][0] is None
            assert found["top_logprobs"][0] is None
            assert found["tokens"][: len(text)] == list(text)


def test_a_greedy_continuation_is_recognised_as_such(live: Live) -> None:
    ids = live.http.post("/tokenize", json={"prompt": "hello"}).json()["tokens"]
    output = live.generate(max_new_tokens=6, details=True)["details"]["tokens"]
    greedy = ids + [token["id"] for token in output]
    other = [*greedy[:-1], (greedy[-1] + 1) % 257]
    for prompt, expected in ((greedy, True), (other, False)):
        (found,), _ = score(live, [prompt], 1)
        pairs = zip(
            found["token_logprobs"][len(ids) : -1],
            found["top_logprobs"][len(ids) : -1],
            strict=True,
        )
        assert all(logprob == max(top.values()) for logprob, top in pairs) is expected


def test_scoring_is_the_same_with_what_the_prefix_cache_knows(live: Live) -> None:
    text = "a prompt that is longer than a block or two of the cache"
    first, _ = score(live, text, 1)
    complete(live, text, max_tokens=3)
    assert score(live, text, 1)[0] == first
    assert complete(live, text)["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


# Streams


def test_a_stream_says_what_the_whole_says(live: Live) -> None:
    fields = {"max_tokens": 12, "logprobs": 2, "echo": True}
    (whole,) = complete(live, **fields)["choices"]
    chunks = stream(live, **fields)
    pieces = [chunk["choices"][0] for chunk in chunks]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    for key, values in whole["logprobs"].items():
        assert [v for piece in pieces for v in piece["logprobs"][key]] == values
    assert [piece["finish_reason"] for piece in pieces] == [None] * 11 + ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    assert ["experts" in chunk for chunk in chunks] == [False] * 11 + [True]


def test_a_stream_of_many_choices_keeps_them_apart(live: Live) -> None:
    fields = {"n": 3, "temperature": 1.0, "seed": 9, "max_tokens": 15}
    whole = complete(live, ["ab", "cd"], **fields)
    chunks = stream(live, ["ab", "cd"], stream_options={"include_usage": True}, **fields)
    texts, finished = [""] * 6, [0] * 6
    for chunk in chunks[:-1]:
        (piece,) = chunk["choices"]
        texts[piece["index"]] += piece["text"]
        finished[piece["index"]] += piece["finish_reason"] is not None
        assert chunk["usage"] is None
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert finished == [1] * 6
    last = chunks[-1]
    assert last["choices"] == []
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [last["usage"][c] for c in counts] == [whole["usage"][c] for c in counts]
    assert last["experts"]["policy"] == "top_k:4"


def test_empty_pieces_are_not_sent_without_need(live: Live) -> None:
    chunks = stream(live, max_tokens=60, temperature=2.0, seed=3)
    pieces = [chunk["choices"][0] for chunk in chunks]
    assert all(piece["text"] for piece in pieces[:-1])
    assert pieces[-1]["finish_reason"] is not None
    (nothing,) = stream(live, max_tokens=0)
    assert nothing["choices"][0]["text"] == ""


# Limits of the server


def test_a_client_that_leaves_aborts_all_its_completions(serve: Serve) -> None:
    with serve(step_seconds=0.02) as slow:
        for streams in (True, False):
            body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 2000, "stream": streams}
            before = slow.metrics()["ambidex_aborts_total"]
            # Streams are left after their first event, others when patience ends.
            patient = slow.http.stream("POST", PATH, json=body, timeout=60 if streams else 2)
            with suppress(httpx.ReadTimeout), patient as response:
                next(response.iter_raw())
            slow.wait_until_idle()
            assert slow.metrics()["ambidex_aborts_total"] == before + 4


def test_deadlines_hold(serve: Serve) -> None:
    with serve(step_seconds=0.02) as slow:
        body = {"prompt": "a", "max_tokens": 2000, "n": 2}
        headers = {"X-Request-Timeout": "0.3"}
        response = slow.http.post(PATH, json=body, headers=headers)
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "timeout"
        assert response.headers["x-should-retry"] == "false"
        response = slow.http.post(PATH, json={**body, "stream": True}, headers=headers)
        frames = response.text.removesuffix("\n\n").split("\n\n")
        assert frames[-1] == "data: [DONE]"
        assert json.loads(frames[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        slow.wait_until_idle()


def test_all_or_none_of_a_request_s_completions_are_admitted(serve: Serve) -> None:
    with serve(max_concurrent_requests=4, step_seconds=0.02) as small:
        response = small.http.post(PATH, json={"prompt": "a", "n": 5})
        assert response.status_code == 400
        assert "at most 4" in response.json()["error"]["message"]
        body = {"prompt": "a", "n": 3, "max_tokens": 20}
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda _: small.http.post(PATH, json=body), range(2)))
        assert sorted(answer.status_code for answer in answers) == [200, 429]
        small.wait_until_idle()
        assert small.frontend.active == 0
        assert small.http.post(PATH, json={"prompt": "a", "n": 4}).status_code == 200


def test_a_full_queue_ends_what_had_been_accepted(serve: Serve) -> None:
    with serve(max_waiting=2, max_num_seqs=1, step_seconds=0.02) as small:
        response = small.http.post(PATH, json={"prompt": "a", "n": 8, "max_tokens": 50})
        assert response.status_code == 429
        assert response.headers["retry-after"]
        small.wait_until_idle()
        assert small.http.post(PATH, json={"prompt": "a", "n": 2}).status_code == 200


def test_answers_with_too_many_logprobs_are_refused(live: Live) -> None:
    body = {"prompt": ["x" * 2000] * 8, "logprobs": 20, "echo": True, "max_tokens": 1}
    response = live.http.post(PATH, json=body)
    assert response.status_code == 400
    assert "logprobs must be for at most" in response.json()["error"]["message"]


def test_a_stream_s_output_does_not_count_against_that_limit(live: Live) -> None:
    """It goes out token by token; what it echoes comes at once and counts."""
    body: dict[str, Any] = {"prompt": "a", "n": 8, "logprobs": 20, "max_tokens": 1000}
    assert live.http.post(PATH, json=body).status_code == 400
    with live.http.stream("POST", PATH, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        next(response.iter_raw())
    live.wait_until_idle()
    long = {"prompt": ["x" * 2000] * 8, "n": 1, "max_tokens": 1}
    echoed = {**body, **long, "echo": True, "stream": True}
    response = live.http.post(PATH, json=echoed)
    assert response.status_code == 400
    assert "logprobs must be for at most" in response.json()["error"]["message"]
