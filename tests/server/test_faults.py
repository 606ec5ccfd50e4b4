"""Injected faults under load: one terminal answer each, a fresh engine, and health that is true."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from engine.serving.worker import MAX_FAILED_STEPS

if TYPE_CHECKING:
    from conftest import Live, Serve

CLIENTS = 12
PARAMETERS = {"max_new_tokens": 40}


def wait(condition: Callable[[], object], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.005)


def outcome(url: str, number: int) -> str:
    """How one request ended: its finish reason or error type; every second one streams.

    Asserts that the end is said exactly once.
    """
    path = "/generate_stream" if number % 2 else "/generate"
    body = {"inputs": "x" * (1 + number), "parameters": {**PARAMETERS, "details": True}}
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
        response = http.post(path, json=body)
    if response.status_code != 200:
        return str(response.json()["error_type"])
    if path == "/generate":
        return str(response.json()["details"]["finish_reason"])
    events = [json.loads(f.removeprefix("data: ")) for f in response.text.split("\n\n") if f]
    ends = [e for e in events if "error" in e or e.get("details")]
    assert ends == events[-1:]
    last = ends[0]
    return str(last.get("error_type") or last["details"]["finish_reason"])


@contextmanager
def load(live: Live) -> Iterator[list[str]]:
    """CLIENTS requests at once; their outcomes are there when the block has ended."""
    outcomes: list[str] = []
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [pool.submit(outcome, live.url, n) for n in range(CLIENTS)]
        wait(lambda: live.metrics()["ambidex_requests_running"] >= 3)
        yield outcomes
        outcomes += [answer.result(60) for answer in answers]


def check_serving_and_clean(live: Live) -> None:
    wait(lambda: live.http.get("/health").status_code == 200)
    assert live.generate(max_new_tokens=3)
    live.frontend.engine.check_integrity()
    wait(lambda: live.metrics()["ambidex_kv_blocks_used"] == 0)
    wait(lambda: live.frontend.active == 0)


def total_ends(live: Live) -> float:
    return sum(v for k, v in live.metrics().items() if k.startswith("ambidex_requests_total"))


def boom(*_: Any) -> Any:
    raise RuntimeError("the disk is on fire")


@pytest.mark.parametrize("where", ["runner", "sampler", "scheduler"])
def test_a_step_that_raises(serve: Serve, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """What was running ends with an error, what waited is served, by the same engine."""
    with serve(step_seconds=0.005, max_num_seqs=4) as live, load(live) as outcomes:
        engine, original = live.engine, live.engine.step

        def fail_once() -> Any:
            engine.step = original  # type: ignore[method-assign]
            with monkeypatch.context() as patch:
                if where == "sampler":
                    patch.setattr("engine.serving.engine.sample", boom)
                elif where == "runner":
                    patch.setattr(engine.runner, "run", boom)
                else:
                    patch.setattr(engine.scheduler, "schedule", boom)
                return original()

        engine.step = fail_once  # type: ignore[method-assign]
    with_errors = outcomes.count("generation")
    assert 1 <= with_errors <= 4
    assert outcomes.count("length") == CLIENTS - with_errors
    # the server is down by now: a last look at its books
    numbers = live.frontend.numbers()
    assert numbers.finished["error"] == with_errors
    assert sum(numbers.finished.values()) == CLIENTS
    assert live.frontend.fleet.failed_steps == 1
    assert live.frontend.fleet.restarts == 0
    assert numbers.kv_blocks_used == 0


def test_a_step_that_hangs_is_left_to_itself(serve: Serve) -> None:
    """Requests end at once, a fresh engine serves, and the late step harms nobody."""
    release = threading.Event()
    with serve(step_seconds=0.005, max_num_seqs=4, step_timeout=0.5) as live:
        try:
            with load(live) as outcomes:
                run = live.engine.runner.run

                def stuck(plan: Any) -> Any:
                    release.wait(60)
                    return run(plan)

                live.engine.runner.run = stuck  # type: ignore[method-assign]
                wait(lambda: live.frontend.fleet.restarts == 1)
            assert outcomes.count("generation") == CLIENTS
            assert live.frontend.engine is not live.engine
            check_serving_and_clean(live)
            before = live.generate(max_new_tokens=20)
            release.set()
            wait(lambda: not live.worker.running)
            assert live.generate(max_new_tokens=20) == before
        finally:
            release.set()
        metrics = live.metrics()
        assert metrics['ambidex_requests_total{reason="error"}'] == CLIENTS
        assert metrics['ambidex_requests_total{reason="length"}'] == 3
        assert metrics["ambidex_engine_restarts_total"] == 1
        assert live.http.get("/health/live").status_code == 200


def test_an_engine_that_keeps_failing_is_replaced(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(step_seconds=0.005, max_num_seqs=1) as live:
        with load_of(live) as outcomes:
            monkeypatch.setattr(live.engine.runner, "run", boom)
        assert set(outcomes) <= {"generation", "healthcheck"}
        assert outcomes.count("generation") >= MAX_FAILED_STEPS + 1
        check_serving_and_clean(live)
        metrics = live.metrics()
        assert metrics["ambidex_engine_restarts_total"] == 1
        assert metrics["ambidex_failed_steps_total"] == MAX_FAILED_STEPS + 1
        accepted = CLIENTS - outcomes.count("healthcheck")
        assert metrics['ambidex_requests_total{reason="error"}'] == accepted


@contextmanager
def load_of(live: Live) -> Iterator[list[str]]:
    """As `load`, from the first moment on."""
    outcomes: list[str] = []
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [pool.submit(outcome, live.url, n) for n in range(CLIENTS)]
        wait(lambda: live.metrics()["ambidex_requests_waiting"] > MAX_FAILED_STEPS)
        yield outcomes
        outcomes += [answer.result(60) for answer in answers]


def test_too_many_restarts_are_the_end(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not ready, not alive, with the reason; requests are refused, not lost."""
    monkeypatch.setattr("engine.serving.runner.Runner.run", boom)
    told = threading.Event()
    with serve(max_restarts=2, restart_window=600) as live:
        live.frontend.fleet.on_failure = told.set
        answers: list[str] = []
        deadline = time.monotonic() + 30
        while live.frontend.fleet.failure is None:
            answers.append(outcome(live.url, len(answers) % 2))
            assert time.monotonic() < deadline
        assert told.wait(10)
        assert answers.count("generation") >= 3 * (MAX_FAILED_STEPS + 1)
        assert set(answers) <= {"generation", "healthcheck"}
        for path in ("/health", "/health/live", "/health/ready"):
            health = live.http.get(path)
            assert health.status_code == 503
            assert "restarted 2 times" in health.json()["error"]
        refused = live.post("/generate")
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        metrics = live.metrics()
        assert metrics["ambidex_ready"] == 0
        assert metrics["ambidex_live"] == 0
        assert metrics["ambidex_engine_restarts_total"] == 2
        assert metrics['ambidex_rejections_total{reason="stopped"}'] >= 1


def test_readiness_follows_progress_and_liveness_does_not(serve: Serve) -> None:
    release = threading.Event()
    with serve(step_timeout=600) as live:
        run = live.engine.runner.run

        def stuck(plan: Any) -> Any:
            release.wait(60)
            return run(plan)

        live.engine.runner.run = stuck  # type: ignore[method-assign]
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(outcome, live.url, 0)
            wait(lambda: live.worker.num_unfinished == 1)
            live.worker.step_timeout = 0.05  # the watchdog has not looked yet
            wait(lambda: live.http.get("/health/ready").status_code == 503)
            live.worker.step_timeout = 600
            assert live.http.get("/health/ready").status_code == 200
            release.set()
            assert answer.result(60) == "length"
        assert live.http.get("/health/live").status_code == 200
