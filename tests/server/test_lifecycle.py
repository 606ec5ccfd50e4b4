"""Failure, drain and shutdown: nobody is left without an answer, and health tells the truth."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from rich.console import Console

from server.__main__ import main
from server.serve import listen
from server.serve import serve as serve_process
from server.settings import Settings

if TYPE_CHECKING:
    from conftest import Live, Serve

ROOT = Path(__file__).parents[2]


def wait(condition: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


class Client(threading.Thread):
    """Posts one request in the background and keeps what came back."""

    def __init__(self, url: str, path: str, **parameters: Any) -> None:
        super().__init__()
        self.url, self.path, self.parameters = url, path, parameters
        self.text, self.status, self.events = "", 0, 0
        self.start()

    def run(self) -> None:
        body = {"inputs": "hello", "parameters": self.parameters}
        with (
            httpx.Client(base_url=self.url, trust_env=False, timeout=60) as http,
            http.stream("POST", self.path, json=body) as response,
        ):
            self.status = response.status_code
            with suppress(httpx.RemoteProtocolError):  # the server broke the connection
                for part in response.iter_text():
                    self.text += part
                    self.events = self.text.count("\n\n")

    def last_event(self) -> dict[str, Any]:
        self.join(60)
        assert self.text.endswith("\n\n")
        return json.loads(self.text.removesuffix("\n\n").rpartition("data: ")[2])


def test_an_unforeseen_error_is_an_answer_without_its_insides(serve: Serve) -> None:
    with serve() as live:

        def broken(*_args: Any) -> Any:
            raise RuntimeError("secret insides")

        live.engine.make_request = broken  # type: ignore[method-assign]
        response = live.http.post(
            "/generate", json={"inputs": "x"}, headers={"X-Request-Id": "mine"}
        )
        assert response.status_code == 500
        assert response.json() == {
            "error": "internal error; the server's log has more",
            "error_type": "internal",
        }
        assert response.headers["x-request-id"] == "mine"
        wait(lambda: live.frontend.active == 0)
        assert live.http.get("/health").status_code == 200


# Drain


def drain(live: Live, timeout: float) -> threading.Thread:
    loop = live.app.state.loop
    future = asyncio.run_coroutine_threadsafe(live.frontend.drain(timeout), loop)
    thread = threading.Thread(target=future.result)
    thread.start()
    return thread


@pytest.fixture
def with_loop(serve: Serve) -> Any:
    """A server whose event loop is known, so that a test can drain it from outside."""

    @contextmanager
    def start(**values: Any) -> Iterator[Live]:
        with serve(**values) as live:
            frontend, original = live.frontend, live.frontend.start

            async def noting(*args: Any) -> Any:
                live.app.state.loop = asyncio.get_running_loop()
                return await original(*args)

            frontend.start = noting  # type: ignore[method-assign]
            live.generate(max_new_tokens=1)
            yield live

    return start


def test_draining_finishes_what_runs_and_refuses_what_comes(with_loop: Any) -> None:
    with with_loop(step_seconds=0.01) as live:
        client = Client(live.url, "/generate_stream", max_new_tokens=60)
        wait(lambda: client.events > 0)
        draining = drain(live, 30.0)
        wait(lambda: live.frontend.draining)
        refused = live.post("/generate")
        assert refused.status_code == 503
        assert refused.json()["error_type"] == "healthcheck"
        assert int(refused.headers["retry-after"]) >= 1
        health = live.http.get("/health")
        assert health.status_code == 503
        assert "shutting down" in health.json()["error"]
        draining.join(30)
        last = client.last_event()
        assert last["details"]["finish_reason"] == "length"
        assert last["details"]["generated_tokens"] == 60


def test_draining_aborts_what_takes_too_long(with_loop: Any) -> None:
    with with_loop(step_seconds=0.01) as live:
        stream = Client(live.url, "/generate_stream", max_new_tokens=4000)
        whole = Client(live.url, "/generate", max_new_tokens=4000)
        wait(lambda: stream.events > 0 and live.frontend.worker.num_unfinished == 2)
        drain(live, 0.05).join(30)
        assert stream.last_event()["error_type"] == "incomplete_generation"
        whole.join(30)
        assert whole.status == 500
        assert json.loads(whole.text)["error_type"] == "incomplete_generation"


# A whole process


ENVIRONMENT = {
    "AMBIDEX_PORT": "0",
    "AMBIDEX_NUM_THREADS": "1",
    "AMBIDEX_KV_CACHE_BYTES": str(8 << 20),
}


def url_in(banner: str) -> str | None:
    """The address that a start-up banner names."""
    return next((word for word in banner.split() if word.startswith("http://")), None)


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def process(checkpoint_dir: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`python -m server` on a free port; yields it and its URL."""
    own = {"AMBIDEX_MODEL": str(checkpoint_dir), "COLUMNS": "120", "PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "server"],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **own},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert child.stdout is not None
    try:
        seen = ""
        while url_in(seen) is None:
            line = child.stdout.readline()
            assert line, f"the server ended:\n{seen}"
            seen += line
        wait(lambda: is_up(str(url_in(seen))))
        yield child, str(url_in(seen))
    finally:
        child.kill()
        child.wait(10)
        child.stdout.close()


def test_sigterm_lets_a_stream_finish_and_refuses_new_requests(checkpoint_dir: Path) -> None:
    with process(checkpoint_dir) as (child, url):
        client = Client(url, "/generate_stream", max_new_tokens=300)
        wait(lambda: client.events > 5)
        child.send_signal(signal.SIGTERM)
        statuses = []
        while client.is_alive() and 503 not in statuses:  # the signal may still be on its way
            body = {"inputs": "x", "parameters": {"max_new_tokens": 1}}
            response = httpx.post(f"{url}/generate", json=body, trust_env=False, timeout=30)
            statuses.append(response.status_code)
        last = client.last_event()
        assert statuses[-1] == 503
        assert last["details"]["generated_tokens"] == 300
        assert child.wait(15) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health", trust_env=False)


def serve_here(checkpoint_dir: Path, visitor: Callable[[str], None], **settings: Any) -> str:
    """Run `serve` in this process, and in a thread `visitor`, which must signal it to end.

    Returns what the banner said. An error of the visitor is raised here.
    """
    output = io.StringIO()
    errors: list[BaseException] = []

    def visit() -> None:
        try:
            wait(lambda: url_in(output.getvalue()) is not None)
            wait(lambda: is_up(str(url_in(output.getvalue()))))
            visitor(str(url_in(output.getvalue())))
        except BaseException as error:
            errors.append(error)
            signal_this_process(signal.SIGTERM)
            signal_this_process(signal.SIGTERM)

    thread = threading.Thread(target=visit)
    thread.start()
    serve_process(
        Settings(model=checkpoint_dir, port=0, num_threads=1, kv_cache_bytes=8 << 20, **settings),
        Console(file=output, width=120),
    )
    thread.join(30)
    if errors:
        raise errors[0]
    return output.getvalue()


def signal_this_process(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_the_banner_says_what_is_served(checkpoint_dir: Path) -> None:
    banner = serve_here(checkpoint_dir, lambda _url: signal_this_process(signal.SIGINT))
    for part in (
        *("tiny", " in 2 layers", "8 a layer, 8 neurons each, default top_k:4", "cpu, float32"),
        *("blocks of 16 tokens, at most 8 MiB", "4095 input, 4096 total tokens", "http://127.0."),
        *("verifying and loading ", "packing weights and making the KV cache: ", "KV cache 8 MiB"),
        *("open: no API keys", "600 s, at most 3600 s", "not watched"),
    ):
        assert part in banner


def test_sigterm_ends_what_does_not_finish_in_time(checkpoint_dir: Path) -> None:
    def visit(url: str) -> None:
        client = Client(url, "/generate_stream", max_new_tokens=4000)
        wait(lambda: client.events > 2)
        signal_this_process(signal.SIGTERM)
        assert client.last_event()["error_type"] == "incomplete_generation"

    serve_here(checkpoint_dir, visit, drain_timeout=0.1)


def ends(url: str, number: int) -> str:
    """How a request ended; every second one streams. Asserts that the end is said once."""
    client = Client(url, "/generate_stream" if number % 2 else "/generate", max_new_tokens=600)
    client.join(60)
    assert not client.is_alive()
    if client.status != 200 or number % 2 == 0:
        return json.loads(client.text).get("error_type", "done")
    events = [json.loads(f.removeprefix("data: ")) for f in client.text.split("\n\n") if f]
    said = [e for e in events if "error" in e or e["details"]]
    assert said == events[-1:]
    return said[0].get("error_type", "done")


@pytest.mark.parametrize("drain_timeout", [0.3, 60.0])
def test_sigterm_under_load_leaves_nobody_without_an_answer(
    checkpoint_dir: Path, drain_timeout: float
) -> None:
    """Running and waiting, streaming or not: finished in time or told; new ones are refused."""

    def visit(url: str) -> None:
        with ThreadPoolExecutor(14) as pool:
            early = [pool.submit(ends, url, n) for n in range(10)]
            wait(lambda: "ambidex_http_requests_active 10.0" in text_of(f"{url}/metrics"))
            signal_this_process(signal.SIGTERM)
            wait(lambda: not is_up(url))
            late = [pool.submit(ends, url, n) for n in range(4)]
            assert {answer.result(60) for answer in late} == {"healthcheck"}
            answers = Counter(answer.result(60) for answer in early)
        assert sum(answers.values()) == 10
        if drain_timeout > 1:
            assert answers == {"done": 10}
        else:
            assert answers["incomplete_generation"] >= 5
            assert set(answers) <= {"done", "incomplete_generation"}

    serve_here(checkpoint_dir, visit, drain_timeout=drain_timeout, max_num_seqs=4)


def text_of(url: str) -> str:
    return httpx.get(url, trust_env=False).text


@pytest.mark.filterwarnings("default")
def test_a_process_whose_engine_has_failed_for_good_says_so_and_ends(
    checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For as long as a scrape needs to see it, whatever the supervisor does afterwards."""

    def boom(*_: Any) -> Any:
        raise RuntimeError("the disk is on fire")

    def visit(url: str) -> None:
        monkeypatch.setattr("engine.serving.runner.Runner.run", boom)
        statuses = []
        while httpx.get(f"{url}/health/live", trust_env=False).status_code == 200:
            httpx.post(f"{url}/generate", json={"inputs": "x"}, trust_env=False, timeout=30)
        failed = time.monotonic()
        assert "ambidex_live 0.0" in text_of(f"{url}/metrics")
        with suppress(httpx.TransportError):
            while True:
                body = {"inputs": "x"}
                response = httpx.post(f"{url}/generate", json=body, trust_env=False, timeout=30)
                statuses.append(response.status_code)
        assert set(statuses) == {503}
        assert time.monotonic() - failed > 0.8

    with pytest.raises(SystemExit, match=r"failed for good.*disk is on fire"):
        serve_here(checkpoint_dir, visit, max_restarts=0, exit_delay=1.0)


def test_a_second_signal_does_not_wait(checkpoint_dir: Path) -> None:
    def visit(url: str) -> None:
        client = Client(url, "/generate_stream", max_new_tokens=4000)
        wait(lambda: client.events > 2)
        signal_this_process(signal.SIGTERM)
        wait(lambda: not is_up(url))
        signal_this_process(signal.SIGINT)
        client.join(15)
        assert not client.is_alive()

    started = time.monotonic()
    serve_here(checkpoint_dir, visit, drain_timeout=600)
    assert time.monotonic() - started < 60


def test_connections_send_small_events_at_once() -> None:
    """An event of a stream must not wait until the client has acknowledged the one before."""
    with listen(Settings(port=0)) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"PORT": "99999"}, "AMBIDEX_PORT: "),
        ({"PORT": "tcp://10.0.0.1:8000"}, "enableServiceLinks"),
        ({"MODEL": "/nonexistent"}, "/nonexistent: no such checkpoint directory"),
        ({"MAX_NUM_SEQS": "600"}, "max_num_seqs 600 must not exceed"),
        ({"KV_CACHE_BYTES": "1024"}, "kv_cache_bytes"),
        ({"HOST": "no.such.host.invalid"}, "cannot listen on no.such.host.invalid"),
    ],
)
def test_what_cannot_be_served_ends_with_a_sentence(
    settings: dict[str, str],
    sentence: str,
    checkpoint_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AMBIDEX_MODEL", str(checkpoint_dir))
    for name, value in settings.items():
        monkeypatch.setenv(f"AMBIDEX_{name}", value)
    with pytest.raises(SystemExit) as caught:
        main()
    assert sentence in str(caught.value)
