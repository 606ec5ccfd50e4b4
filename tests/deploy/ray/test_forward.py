"""One request through the ingress: its replicas answer, refuse, die or hang as a test says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.types import Message

from deploy.ray import forward
from deploy.ray.affinity import prompt_key
from deploy.ray.forward import Forwarder, ReplicaLost
from deploy.ray.wire import Accepted, Target, merged_body
from server.app import add_middleware
from server.http.ratelimit import RateLimiter
from server.settings import Settings

JSON = (b"content-type", b"application/json")
EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
Script = list[Any]  # replies of one replica: messages, an exception, or seconds to wait


def start(status: int = 200, kind: tuple[bytes, bytes] = JSON) -> Message:
    return {"type": "http.response.start", "status": status, "headers": [kind]}


def body(text: str, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}


class Scripted:
    """Replicas that follow scripts, one a call."""

    def __init__(self, *scripts: Script) -> None:
        self.scripts = list(scripts)
        self.asked: list[tuple[Target, dict[str, Any], bytes]] = []
        self.closed = 0

    async def call(
        self, target: Target, scope: dict[str, Any], body: bytes
    ) -> AsyncGenerator[Accepted | list[Message], None]:
        script = self.scripts[len(self.asked)]
        self.asked.append((target, scope, body))
        try:
            for step in script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    yield step
        finally:
            self.closed += 1


def answers(status: int, text: str, replica: str = "a") -> Script:
    return [Accepted(replica), [start(status)], [body(text)]]


def ask(
    replicas: Scripted,
    path: str = "/generate",
    headers: dict[str, str] | None = None,
    content: str = '{"inputs": "hello"}',
    use: Callable[[Forwarder], None] = lambda _: None,
    **values: Any,
) -> httpx.Response:
    forwarder = Forwarder(replicas, Settings(**values), 256, 2)
    use(forwarder)
    app = Starlette(routes=[Mount("/", app=forwarder)])
    add_middleware(app, forwarder.settings, RateLimiter(0, 0), lambda _: None, lambda _: None)

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.post(path, content=content, headers=headers or {})

    response = asyncio.run(run())
    assert replicas.closed == len(replicas.asked)
    return response


def test_an_answer_passes_through() -> None:
    replicas = Scripted(answers(200, '{"x": 1}'))
    response = ask(replicas, headers={"X-Request-Id": "mine", "X-Other": "1"})
    assert (response.status_code, response.json()) == (200, {"x": 1})
    assert response.headers["x-request-id"] == "mine"
    target, scope, sent = replicas.asked[0]
    assert target == Target(prompt_key(sent))
    assert target.key == b"hello"
    assert (b"x-other", b"1") in scope["headers"]
    assert scope["path"] == "/generate"
    assert "app" not in scope


def test_a_request_goes_on_to_the_next_replica() -> None:
    lost = [Accepted("a"), [start()], 0.01, ReplicaLost("died")]
    replicas = Scripted(lost, answers(503, "busy", "b"), answers(200, "{}", "c"))
    response = ask(replicas, headers={"X-Request-Timeout": "50"})
    assert response.status_code == 200
    assert [target.avoid for target, _, _ in replicas.asked] == [set(), {"a"}, {"a", "b"}]
    limits = [dict(scope["headers"])[b"x-request-timeout"] for _, scope, _ in replicas.asked]
    assert limits[0] == b"50"
    assert 49 < float(limits[1]) < 50  # what is left of it


@pytest.mark.parametrize("replica", ["a", "b"])
def test_a_refusal_by_all_is_the_answer(replica: str) -> None:
    replicas = Scripted(*(answers(503, "busy", name) for name in ("a", replica, "c")))
    response = ask(replicas)
    assert (response.status_code, response.text) == (503, "busy")
    assert len(replicas.asked) == (2 if replica == "a" else 3)


def test_a_request_that_kills_replicas_stops() -> None:
    replicas = Scripted(*([[Accepted(name), ReplicaLost("died")] for name in "abc"]))
    response = ask(replicas)
    assert response.status_code == 503
    assert response.headers["retry-after"]
    assert response.json()["error"] == "2 replicas were lost over this request"
    assert len(replicas.asked) == 2


@pytest.mark.parametrize("path", ["/generate_stream", "/v1/completions"])
def test_a_lost_stream_ends_with_an_error(path: str) -> None:
    replicas = Scripted(
        [Accepted("a"), [start(kind=EVENTS), body("data: 1\n\n", True)], ReplicaLost("died")]
    )
    response = ask(replicas, path)
    assert response.status_code == 200
    frames = response.text.removesuffix("\n\n").split("\n\n")
    assert frames[0] == "data: 1"
    error = json.loads(frames[1].removeprefix("data: "))
    if path == "/v1/completions":
        assert error["error"]["code"] == "incomplete_generation"
        assert frames[2:] == ["data: [DONE]"]
    else:
        assert error["error_type"] == "incomplete_generation"
        assert not frames[2:]


def test_a_stream_whose_replica_raises_ends_with_an_error() -> None:
    replicas = Scripted(
        [Accepted("a"), [start(kind=EVENTS), body("data: 1\n\n", True)], RuntimeError("boom")]
    )
    response = ask(replicas, "/generate_stream")
    assert "incomplete_generation" in response.text
    assert "boom" not in response.text


def test_what_raises_before_anything_was_sent_is_a_500() -> None:
    response = ask(Scripted([Accepted("a"), RuntimeError("boom")]))
    assert (response.status_code, response.json()["error_type"]) == (500, "internal")


def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "ACCEPT_SECONDS", 0.05)
    monkeypatch.setattr(forward, "GRACE_SECONDS", 0.05)
    response = ask(Scripted([10.0]))
    assert (response.status_code, "no replica took" in response.text) == (503, True)
    response = ask(Scripted([Accepted("a"), 10.0]), headers={"X-Request-Timeout": "0.05"})
    assert (response.status_code, response.json()["error_type"]) == (504, "timeout")
    stuck = [Accepted("a"), [start(kind=EVENTS), body("data: 1\n\n", True)], 10.0]
    response = ask(Scripted(stuck), headers={"X-Request-Timeout": "0.05"})
    assert '"error_type":"timeout"' in response.text
    nothing = Scripted()
    assert ask(nothing, headers={"X-Request-Timeout": "-1"}).status_code == 422

    def full(forwarder: Forwarder) -> None:
        forwarder.counts.active = 2

    response = ask(nothing, use=full)
    assert (response.status_code, response.json()["error_type"]) == (429, "overloaded")
    assert ask(nothing, content="x" * 2000, max_body_bytes=1024).status_code == 413
    assert ask(nothing, api_keys="alice-0123456789abcdef").status_code == 401
    assert not nothing.asked


def test_what_the_ingress_refuses_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "ACCEPT_SECONDS", 0.05)
    seen: list[Forwarder] = []

    def full(forwarder: Forwarder) -> None:
        forwarder.counts.active = 2
        seen.append(forwarder)

    ask(Scripted(), use=full)
    ask(Scripted([10.0]), use=seen.append)
    ask(Scripted(), headers={"X-Request-Timeout": "-1"}, use=seen.append)
    ask(Scripted(*(answers(503, "busy", name) for name in "abc")), use=seen.append)
    assert [dict(forwarder.counts.rejections) for forwarder in seen] == [
        {"overloaded": 1},
        {"stopped": 1},
        {"invalid": 1},
        {},  # the replicas have counted those
    ]


def test_a_client_that_leaves_closes_the_call() -> None:
    replicas = Scripted([Accepted("a"), 10.0])

    async def run() -> None:
        messages = iter([{"type": "http.request", "body": b"{}", "more_body": False}])

        async def receive() -> Message:
            if (message := next(messages, None)) is not None:
                return message
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            raise AssertionError(message)

        scope = {"type": "http", "method": "POST", "path": "/generate", "headers": []}
        await Forwarder(replicas, Settings(), 256, 2)(scope, receive, send)

    asyncio.run(asyncio.wait_for(run(), 5))
    assert replicas.closed == 1


def test_pieces_of_a_body_become_one() -> None:
    pieces = [start(), body("a", True), body("b", True), body("")]
    assert merged_body(pieces) == [start(), body("ab")]
    assert merged_body(pieces[:2]) == pieces[:2]
