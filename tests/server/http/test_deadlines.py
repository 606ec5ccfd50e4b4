"""Deadlines: a terminal answer in time, streaming or not, and nothing left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from engine.errors import InvalidRequest
from server.http import calls
from server.http.calls import Call
from server.http.deadlines import timeout_of
from server.http.streaming import EventResponse

if TYPE_CHECKING:
    from tests.server.conftest import Live, Serve

LONG = {"inputs": "hello", "parameters": {"max_new_tokens": 4000}}
SECONDS = {"X-Request-Timeout": "0.2"}


@pytest.fixture(scope="module")
def slow(serve: Serve) -> Iterator[Live]:
    """5 ms a step, one request at a time."""
    with serve(step_seconds=0.005, max_num_seqs=1, max_request_timeout=100) as live:
        yield live


def check_nothing_is_left(live: Live, late: int) -> None:
    live.wait_until_idle()
    metrics = live.metrics()
    assert metrics["ambidex_deadlines_exceeded_total"] == late
    assert metrics["ambidex_kv_blocks_used"] == 0
    assert metrics["ambidex_requests_running"] == metrics["ambidex_requests_waiting"] == 0
    assert metrics["ambidex_http_requests_active"] == 0


def test_what_is_late_gets_an_answer_and_is_aborted(slow: Live) -> None:
    before = slow.metrics()
    late = int(before["ambidex_deadlines_exceeded_total"])
    response = slow.http.post("/generate", json=LONG, headers=SECONDS)
    assert response.status_code == 504
    assert response.json()["error_type"] == "timeout"
    assert "0.2 seconds" in response.json()["error"]
    check_nothing_is_left(slow, late + 1)
    assert slow.metrics()["ambidex_aborts_total"] == before["ambidex_aborts_total"] + 1


def test_a_late_stream_ends_with_an_event(slow: Live) -> None:
    late = int(slow.metrics()["ambidex_deadlines_exceeded_total"])
    enough = {"X-Request-Timeout": "3"}  # for the first token, and for nowhere near the last
    response = slow.http.post("/generate_stream", json=LONG, headers=enough)
    assert response.status_code == 200
    frames = [f for f in response.text.split("\n\n") if f]
    assert '"token"' in frames[0]
    assert '"error_type":"timeout"' in frames[-1]
    assert sum('"error"' in f for f in frames) == 1
    check_nothing_is_left(slow, late + 1)


def test_who_waits_in_the_queue_has_a_deadline_too(slow: Live) -> None:
    late = int(slow.metrics()["ambidex_deadlines_exceeded_total"])
    with slow.http.stream("POST", "/generate_stream", json=LONG) as first:
        next(first.iter_raw())
        assert slow.http.post("/generate", json=LONG, headers=SECONDS).status_code == 504
    check_nothing_is_left(slow, late + 1)


def test_in_time_is_in_time(slow: Live) -> None:
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 3}}
    response = slow.http.post("/generate", json=body, headers={"X-Request-Timeout": "60"})
    assert response.status_code == 200


@pytest.mark.parametrize("value", ["0", "-1", "101", "nan", "inf", "soon", "", "9" * 100])
def test_a_timeout_out_of_range_is_refused_by_name(slow: Live, value: str) -> None:
    for path in ("/generate", "/generate_stream"):
        response = slow.http.post(path, json=LONG, headers={"X-Request-Timeout": value})
        assert response.status_code == 422
        assert (
            "X-Request-Timeout must be seconds above 0 and at most 100" in response.json()["error"]
        )


def test_the_server_s_own_limit_holds_without_a_header(serve: Serve) -> None:
    with serve(step_seconds=0.005, request_timeout=0.2) as live:
        assert live.http.post("/generate", json=LONG).status_code == 504


def test_seconds_that_a_request_may_take() -> None:
    assert timeout_of(None, default=30, most=60) == 30
    assert timeout_of(" 45.5 ", default=30, most=60) == 45.5
    with pytest.raises(InvalidRequest):
        timeout_of("61", default=30, most=60)
    assert timeout_of(None, default=90, most=60) == 60


def test_a_client_that_does_not_read_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection whose buffers are full: sending never returns."""
    monkeypatch.setattr("server.http.streaming.SLOW_READER_SECONDS", 0.05)
    closed: list[bool] = []

    async def frames() -> AsyncGenerator[bytes]:
        yield b"data: {}\n\n"

    async def close() -> None:
        closed.append(True)

    async def never(*_: object) -> Any:
        await asyncio.Event().wait()

    async def test() -> None:
        calls.begin(Call(deadline=asyncio.get_running_loop().time() + 0.05))
        await asyncio.wait_for(EventResponse(frames(), close, {})({}, never, never), 10)

    asyncio.run(test())
    assert closed == [True]
    assert "was cut off" in caplog.text
