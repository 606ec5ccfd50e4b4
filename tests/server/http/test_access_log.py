"""The access log: one JSON object a request, with what it took and never a key."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from server.http import access_log
from server.http.calls import Call
from server.http.middleware import CallMiddleware

if TYPE_CHECKING:
    from tests.server.conftest import Live, Serve

KEY = "alice-0123456789abcdef"
Lines = Callable[[int], list[dict[str, Any]]]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    """The lines so far, once there are as many as expected: they come after the responses."""

    def read(count: int) -> list[dict[str, Any]]:
        deadline = time.monotonic() + 30
        while True:
            found = [r.getMessage() for r in caplog.records if r.name == access_log.LOGGER]
            if len(found) >= count or time.monotonic() > deadline:
                assert not any("\n" in line or KEY in line for line in found)
                assert len(found) == count
                return [json.loads(line) for line in found]
            time.sleep(0.01)

    caplog.set_level("INFO", access_log.LOGGER)
    return read


@pytest.fixture(scope="module")
def logging_server(serve: Serve) -> Iterator[Live]:
    with serve(access_log=True, api_keys=f"alice:{KEY}", step_seconds=0.002) as live:
        live.http.headers["Authorization"] = f"Bearer {KEY}"
        yield live


def test_a_generation(logging_server: Live, lines: Lines) -> None:
    answer = logging_server.http.post(
        "/generate",
        json={"inputs": "hello", "parameters": {"max_new_tokens": 4, "experts": "top_k:2"}},
        headers={"X-Request-Id": "mine"},
    )
    (line,) = lines(1)
    assert line["request_id"] == "mine"
    assert (line["method"], line["path"], line["route"]) == ("POST", "/generate", "/generate")
    assert (line["status"], line["outcome"], line["key"]) == (200, "length", "alice")
    assert (line["prompt_tokens"], line["generated_tokens"]) == (5, 4)
    assert line["activated_ratio"] == float(answer.headers["x-activated-expert-ratio"]) == 0.25
    assert 0 <= line["queue_ms"] <= line["first_token_ms"] <= line["duration_ms"]
    assert line["inference_ms"] > 0
    assert line["client"] == "127.0.0.1"
    assert line["time"].endswith("Z")


def test_a_stream_ends_its_line_and_a_refusal_has_one(logging_server: Live, lines: Lines) -> None:
    logging_server.stream(max_new_tokens=3)
    logging_server.http.get("/info", headers={"Authorization": "Bearer wrong"})
    stream, refused = lines(2)
    assert (stream["route"], stream["generated_tokens"]) == ("/generate_stream", 3)
    assert (refused["status"], refused["key"], refused["route"]) == (401, None, None)
    assert "outcome" not in refused


def test_a_call_ends_with_its_response_and_not_with_what_is_cleaned_up_after_it() -> None:
    """Or the connection's next request, which begins then, could end before it."""
    order: list[str] = []

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for more in (True, False):
            await send({"type": "http.response.body", "body": b"x", "more_body": more})
            order.append("more" if more else "complete")
        await asyncio.sleep(0)
        order.append("cleaned up")

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            order.append("sent")

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    def ended(call: Call) -> None:
        assert call.status == 200
        order.append("ended")

    scope = {"type": "http", "method": "GET", "raw_path": b"/", "headers": []}
    asyncio.run(CallMiddleware(app, ended)(scope, receive, send))
    assert order == ["sent", "more", "sent", "ended", "complete", "cleaned up"]


def test_a_client_that_left(logging_server: Live, lines: Lines) -> None:
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 4000}}
    with logging_server.http.stream("POST", "/generate_stream", json=body) as response:
        next(response.iter_raw())
    (line,) = lines(1)
    assert line["outcome"] == "abort"
    assert line["generated_tokens"] >= 1


def test_a_late_request(logging_server: Live, lines: Lines) -> None:
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 4000}}
    headers = {"X-Request-Timeout": "0.1"}
    assert logging_server.http.post("/generate", json=body, headers=headers).status_code == 504
    (line,) = lines(1)
    assert (line["status"], line["outcome"]) == (504, "timeout")


def test_a_path_cannot_forge_a_line(logging_server: Live, lines: Lines) -> None:
    logging_server.http.get("/no%0aforged?key=secret")
    (line,) = lines(1)
    assert line["path"] == "/no%0aforged"
    assert "secret" not in json.dumps(line)


def test_nothing_is_logged_unless_asked(live: Live, lines: Lines) -> None:
    live.http.get("/version")
    time.sleep(0.05)
    lines(0)


def test_lines_are_bare_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger(access_log.LOGGER)
    before = logger.handlers, logger.propagate, logger.level
    try:
        access_log.write_to_stderr()
        logger.info("{}")
        assert capsys.readouterr().err == "{}\n"
    finally:
        logger.handlers, logger.propagate = before[0], before[1]
        logger.setLevel(before[2])


# Heads, and pages of other origins


def test_heads_are_bounded(serve: Serve) -> None:
    with serve(max_url_bytes=100, max_header_bytes=2000) as live:
        long_url = live.http.get("/version?" + "x" * 100)
        assert long_url.status_code == 414
        assert "max_url_bytes" in long_url.json()["error"]
        large = live.http.get("/version", headers={"X-Large": "x" * 2000})
        assert large.status_code == 431
        assert "max_header_bytes" in large.json()["error"]
        assert live.http.get("/version").status_code == 200


def test_other_origins_may_call_only_if_told_so(serve: Serve, live: Live) -> None:
    asked = {
        "Origin": "https://a.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    with serve(cors_origins="https://a.example, https://b.example", api_keys=f"a:{KEY}") as shared:
        preflight = shared.http.options("/generate", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        refused = shared.http.get("/info", headers={"Origin": "https://a.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.example"
        other = shared.http.options("/generate", headers={**asked, "Origin": "https://c.example"})
        assert "access-control-allow-origin" not in other.headers
    closed = httpx.options(f"{live.url}/generate", headers=asked, trust_env=False)
    assert "access-control-allow-origin" not in closed.headers
