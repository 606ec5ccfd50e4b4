"""Bounds on what is here at once and on what a body may be; clients that leave."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.waiting import wait_for as wait

if TYPE_CHECKING:
    from tests.server.conftest import Live, Serve

LONG = {"max_new_tokens": 4000}
ABORTED = 'ambidex_requests_total{reason="abort"}'


@contextmanager
def connection(live: Live) -> Iterator[socket.socket]:
    address = urlsplit(live.url)
    with closing(socket.create_connection((address.hostname, address.port), timeout=10)) as sock:
        yield sock


def request_bytes(path: str, parameters: dict[str, Any]) -> bytes:
    body = json.dumps({"inputs": "hello", "parameters": parameters}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.fixture(scope="module")
def slow(serve: Serve) -> Iterator[Live]:
    """At most two requests in the server, one of them running, at 5 ms a step."""
    with serve(step_seconds=0.005, max_concurrent_requests=2, max_num_seqs=1) as live:
        yield live


# Clients that leave


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_client_that_leaves_aborts_its_request(slow: Live, path: str) -> None:
    before = slow.metrics()[ABORTED]
    with connection(slow) as sock:
        sock.sendall(request_bytes(path, LONG))
        wait(lambda: slow.metrics()["ambidex_requests_running"] == 1)
        if path == "/generate_stream":
            assert sock.recv(4096).startswith(b"HTTP/1.1 200")
    wait(lambda: slow.metrics()["ambidex_requests_running"] == 0)
    slow.wait_until_idle()
    metrics = slow.metrics()
    assert metrics[ABORTED] == before + 1
    assert metrics["ambidex_aborts_total"] == before + 1
    assert metrics["ambidex_kv_blocks_used"] == 0
    assert metrics["ambidex_http_requests_active"] == 0


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_client_that_leaves_the_queue_aborts_its_request(slow: Live, path: str) -> None:
    with connection(slow) as first, connection(slow) as second:
        first.sendall(request_bytes("/generate", LONG))
        wait(lambda: slow.metrics()["ambidex_requests_running"] == 1)
        second.sendall(request_bytes(path, LONG))
        wait(lambda: slow.metrics()["ambidex_requests_waiting"] == 1)
        second.close()
        wait(lambda: slow.metrics()["ambidex_requests_waiting"] == 0)
        assert slow.metrics()["ambidex_requests_running"] == 1
    slow.wait_until_idle()


def test_leaving_after_the_end_aborts_nothing(slow: Live) -> None:
    before = slow.metrics()[ABORTED]
    slow.generate(max_new_tokens=2)
    slow.stream(max_new_tokens=2)
    slow.wait_until_idle()
    assert slow.metrics()[ABORTED] == before


def test_a_half_sent_request_costs_nothing(slow: Live) -> None:
    with connection(slow) as sock:
        sock.sendall(request_bytes("/generate", LONG)[:-5])
        time.sleep(0.05)
    time.sleep(0.05)
    wait(lambda: slow.frontend.active == 0)
    assert slow.generate(max_new_tokens=1)


# Too many


def test_more_than_max_concurrent_requests_are_told_to_come_back(slow: Live) -> None:
    name = 'ambidex_rejections_total{reason="overloaded"}'
    before = slow.metrics()[name]
    with connection(slow) as first, connection(slow) as second:
        for sock in (first, second):
            sock.sendall(request_bytes("/generate_stream", LONG))
        wait(lambda: slow.frontend.active == 2)
        for path in ("/generate", "/generate_stream", "/"):
            response = slow.post(path)
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error_type"] == "overloaded"
            assert "max_concurrent_requests" in response.json()["error"]
        assert slow.http.get("/health").status_code == 200
    slow.wait_until_idle()
    assert slow.metrics()[name] == before + 3
    assert slow.generate(max_new_tokens=1)


def test_a_full_queue_is_told_to_come_back(serve: Serve) -> None:
    with serve(step_seconds=0.005, max_num_seqs=1, max_waiting=1) as live:
        with connection(live) as first, connection(live) as second:
            first.sendall(request_bytes("/generate", LONG))
            wait(lambda: live.metrics()["ambidex_requests_running"] == 1)
            second.sendall(request_bytes("/generate", LONG))
            wait(lambda: live.metrics()["ambidex_requests_waiting"] == 1)
            response = live.post("/generate")
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) >= 1
            assert "1 requests are waiting" in response.json()["error"]
        live.wait_until_idle()
        wait(lambda: live.frontend.active == 0)


def test_the_settings_bound_tokens(serve: Serve) -> None:
    with serve(max_input_tokens=10, max_total_tokens=16) as live:
        assert live.post("/generate", "x" * 11).status_code == 422
        assert live.post("/generate", "x" * 10, max_new_tokens=7).status_code == 422
        answer = live.post("/generate", "x" * 10)
        assert answer.headers["x-generated-tokens"] == "6"
        info = live.http.get("/info").json()
        assert (info["max_input_tokens"], info["max_total_tokens"]) == (10, 16)


def test_a_small_cache_bounds_tokens(serve: Serve) -> None:
    with serve(kv_cache_bytes=16_384) as live:
        most = live.frontend.max_total_tokens
        assert most == live.engine.num_blocks * 16 < 4096
        assert live.post("/generate", "x" * (most - 1)).headers["x-generated-tokens"] == "1"
        assert live.post("/generate", "x" * most).status_code == 422


# Bodies


@pytest.fixture(scope="module")
def small(serve: Serve) -> Iterator[Live]:
    with serve(max_body_bytes=2000, body_timeout=2.0) as live:
        yield live


def check_too_large(response: httpx.Response) -> None:
    assert response.status_code == 413
    assert response.json() == {
        "error": "body must have at most 2000 bytes (max_body_bytes)",
        "error_type": "validation",
    }
    assert "x-request-id" in response.headers


def test_a_body_at_the_limit_is_read_and_one_above_is_not(small: Live) -> None:
    body = json.dumps({"inputs": "hello", "parameters": {"max_new_tokens": 1}}).encode()
    # A refused body is not read, so its connection ends: none is used twice here.
    headers = {"Content-Type": "application/json", "Connection": "close"}
    for path in ("/generate", "/generate_stream", "/"):
        fits = small.http.post(path, content=body.ljust(2000), headers=headers)
        assert fits.status_code == 200
        check_too_large(small.http.post(path, content=body.ljust(2001), headers=headers))


def test_a_body_without_a_length_is_bounded_too(small: Live) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 100

    check_too_large(small.http.post("/generate", content=chunks()))


def test_a_declared_length_is_refused_before_the_body(small: Live) -> None:
    with connection(small) as sock:
        sock.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_body_that_dawdles_is_given_up(small: Live) -> None:
    with connection(small) as sock:
        sock.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        answer = b"".join(iter(lambda: sock.recv(4096), b""))  # until the server hangs up
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"body must arrive within 2 seconds" in answer


def test_bodies_of_other_routes_are_bounded(small: Live) -> None:
    assert small.http.request("GET", "/health", content=b"x" * 5000).status_code == 413
    assert small.http.post("/nothing", content=b"x" * 5000).status_code == 413


def test_many_clients_at_once_all_get_an_answer(serve: Serve) -> None:
    """More requests than fit, some of which leave: nothing is lost, nothing is left behind."""
    statuses: list[int] = []

    def client(number: int) -> None:
        with httpx.Client(base_url=live.url, trust_env=False) as http:
            body = {"inputs": "x" * number, "parameters": {"max_new_tokens": 20}}
            timeout = 0.05 if number % 5 == 0 else 120.0
            try:
                statuses.append(http.post("/generate", json=body, timeout=timeout).status_code)
            except httpx.TimeoutException:
                statuses.append(0)

    with serve(step_seconds=0.005, max_concurrent_requests=12, max_num_seqs=4) as live:
        threads = [threading.Thread(target=client, args=(n,)) for n in range(1, 25)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        live.wait_until_idle()
        assert len(statuses) == 24
        assert set(statuses) <= {0, 200, 429}
        assert statuses.count(200) >= 4
        assert live.metrics()["ambidex_kv_blocks_used"] == 0
