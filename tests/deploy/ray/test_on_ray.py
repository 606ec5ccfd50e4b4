"""Two replicas on this machine: what a client sees while they serve, die, scale and reload."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch

from engine import checkpoint as checkpoints
from tests.deploy.ray.load import under_load, wait_for_more
from tests.models import byte_tokenizer, served_model
from tests.waiting import wait_for

if TYPE_CHECKING:
    from tests.deploy.ray.cluster import OnRay, Start

ADMIN = "admin-0123456789abcdef"
AS_ADMIN = {"Authorization": f"Bearer {ADMIN}"}


def statuses(served: OnRay) -> dict[str, dict[str, Any]]:
    return served.http.get("/admin/status", headers=AS_ADMIN).json()["replicas"]


@pytest.fixture(scope="module")
def two(start: Start) -> Iterator[OnRay]:
    """Two replicas whose steps take 10 ms."""
    with start(replicas=2, step_seconds=0.01, admin_key=ADMIN) as served:
        yield served


def test_a_stream_comes_token_by_token(two: OnRay) -> None:
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 50}}
    arrivals: list[float] = []
    with two.http.stream("POST", "/generate_stream", json=body) as response:
        arrivals = [time.monotonic() for line in response.iter_lines() if line]
    assert len(arrivals) == 50
    assert arrivals[-1] - arrivals[0] > 0.3  # not at the end, all together
    assert arrivals[0] < arrivals[9] < arrivals[29] < arrivals[49]


def test_what_a_client_sees_is_as_on_one_machine(two: OnRay) -> None:
    response = two.http.post(
        "/generate",
        json={"inputs": "hello", "parameters": {"max_new_tokens": 3}},
        headers={"X-Request-Id": "mine"},
    )
    assert response.headers.get_list("x-request-id") == ["mine"]
    assert response.headers["x-generated-tokens"] == "3"
    unnamed = two.http.get("/health")
    assert unnamed.json() == {"status": "ok"}
    assert len(unnamed.headers.get_list("x-request-id")) == 1
    missing = two.http.get("/nothing")
    assert missing.status_code == 404
    assert "/nothing;" in missing.json()["error"]
    late = two.http.post(
        "/generate",
        json={"inputs": "hello", "parameters": {"max_new_tokens": 500}},
        headers={"X-Request-Timeout": "0.3"},
    )
    assert (late.status_code, late.json()["error_type"]) == (504, "timeout")
    assert two.http.get("/admin/status").status_code == 401


def test_a_client_that_leaves_ends_its_request(two: OnRay) -> None:
    aborts = two.metrics()["ambidex_aborts_total"]
    body = {"inputs": "hello", "parameters": {"max_new_tokens": 2000}}
    unheard = {"x-request-disconnect-disabled": "true"}  # Ray's own, which any client can send
    for headers in ({}, unheard):
        with two.http.stream("POST", "/generate_stream", json=body, headers=headers) as response:
            next(response.iter_raw())
    wait_for(lambda: two.active() == 0)
    assert two.metrics()["ambidex_aborts_total"] == aborts + 2


def test_metrics_of_all_replicas(two: OnRay) -> None:
    names = set(two.by_replica("ambidex_kv_blocks"))
    assert len(names) == 2
    assert names == set(statuses(two))
    assert len(two.by_replica("ambidex_ingress_requests")) == 1


def test_a_common_beginning_stays_on_one_replica(two: OnRay) -> None:
    before = two.by_replica("ambidex_prompt_tokens_total")
    hits = two.metrics()["ambidex_prefix_cache_hit_tokens_total"]
    for i in range(6):
        two.generate("the same beginning " * 16 + str(i), max_new_tokens=1)
    after = two.by_replica("ambidex_prompt_tokens_total")
    assert sorted(after[name] - before[name] > 0 for name in after) == [False, True]
    found = two.metrics()["ambidex_prefix_cache_hit_tokens_total"] - hits
    assert found >= 5 * 256
    for i in range(30):
        two.generate(f"{i} another one", max_new_tokens=1)
    last = two.by_replica("ambidex_prompt_tokens_total")
    assert all(last[name] > after[name] for name in last)


def test_a_reload_goes_from_replica_to_replica(two: OnRay) -> None:
    response = two.http.post("/admin/reload", headers=AS_ADMIN)
    assert response.json()["result"] == "unchanged"
    assert all(status["reloads"] == {"unchanged": 1} for status in statuses(two).values())
    refused = two.http.post("/admin/reload", headers=AS_ADMIN, json={"path": "x"})
    assert refused.status_code == 422
    assert "AMBIDEX_WATCH" in refused.json()["error"]


def test_a_replica_that_is_killed_under_load(two: OnRay, report: Report) -> None:
    names = set(statuses(two))
    with under_load(two.url, clients=12) as load:
        wait_for_more(load, 24)
        busiest = max(statuses(two).items(), key=lambda each: each[1]["active"])[0]
        two.kill(busiest)
        wait_for_more(load, 12)
        wait_for(lambda: len(ready(two) - names) == 1, 60)  # Serve has put another one there
        wait_for_more(load, 12)
    report("killed under load", dict(load.ends))
    assert not load.details
    assert load.ends["complete"] >= 40
    assert load.ends["refused"] == 0
    counts = two.metrics()  # streams end with an error, whole answers come from the other replica
    assert counts["ambidex_ingress_broken_total"] == load.ends["error"] <= 12
    assert counts["ambidex_ingress_broken_total"] + counts["ambidex_ingress_retried_total"] >= 1
    try:
        wait_for(lambda: two.active() == 0, 20)
    except AssertionError:
        report("left over", statuses(two))
        raise


def test_an_engine_that_failed_for_good_is_replaced(two: OnRay) -> None:
    names = ready(two)
    two.model.fail_for_good.remote().result(timeout_s=10)  # one of them
    wait_for(lambda: len(ready(two) & names) == 1 and len(ready(two)) == 2, 90)


def ready(served: OnRay) -> set[str]:
    """The replicas that take requests."""
    response = served.http.get("/admin/status", headers=AS_ADMIN)
    if response.status_code != 200:
        return set()
    found = response.json()["replicas"].items()
    return {name for name, status in found if status["ready"] and status["live"]}


# New checkpoints


def write(path: Path, seed: int) -> None:
    """A checkpoint with weights of its own."""
    model = served_model()
    with torch.no_grad():
        noise = torch.randn(model.embedding.weight.shape, generator=torch.manual_seed(seed))
        model.embedding.weight[1:] += 0.1 * noise[1:]
    checkpoints.save(path, model, byte_tokenizer(), {"steps": seed})


def test_a_rolling_update_under_load(start: Start, tmp_path: Path, report: Report) -> None:
    write(tmp_path / "step-1", 1)
    with start(
        replicas=2, step_seconds=0.005, admin_key=ADMIN, watch=tmp_path, watch_interval=0.2
    ) as served:
        assert models(served) == {"step-1"}
        with under_load(served.url) as load:
            wait_for_more(load, 8)
            write(tmp_path / "step-2", 2)
            wait_for(lambda: models(served) == {"step-2"}, 60)  # in which order: test_rolling.py
            wait_for_more(load, 8)
            damaged = tmp_path / ".step-3"
            write(damaged, 3)
            (damaged / "tokenizer.json").write_text("{}")
            damaged.rename(tmp_path / "step-3")
            wait_for(lambda: sum(failures(served)) == 1, 30)
            wait_for_more(load, 8)
            write(tmp_path / "step-4", 4)
            wait_for(lambda: models(served) == {"step-4"}, 60)
            back = served.http.post("/admin/reload", headers=AS_ADMIN, json={"path": "step-2"})
            assert back.json()["model"]["name"] == "step-2", back.text
            wait_for_more(load, 8)
            assert models(served) == {"step-2"}  # a choice by hand stays
            missing = served.http.post("/admin/reload", headers=AS_ADMIN, json={"path": "nothing"})
            assert missing.status_code == 409
            with contextlib.suppress(httpx.ReadTimeout):  # a client that does not wait for it
                served.http.post(
                    "/admin/reload", headers=AS_ADMIN, json={"path": "step-4"}, timeout=0.1
                )
            wait_for(lambda: models(served) == {"step-4"}, 30)
        report("rolling updates under load", dict(load.ends))
        assert set(load.ends) == {"complete"}, load.details
        assert sorted(failures(served)) == [0, 2]  # one refusal each, by the first alone


def models(served: OnRay) -> set[str]:
    return {status["model"]["name"] for status in statuses(served).values()}


def failures(served: OnRay) -> list[int]:
    return [status["reloads"].get("failure", 0) for status in statuses(served).values()]


def test_a_queue_brings_a_second_replica(start: Start, report: Report) -> None:
    with start(
        replicas=1, max_replicas=2, step_seconds=0.02, admin_key=ADMIN, max_num_seqs=2
    ) as served:
        assert len(ready(served)) == 1
        with under_load(served.url, clients=6, tokens=60) as load:
            began = time.monotonic()
            wait_for(lambda: len(ready(served)) == 2, 90)
            report("seconds until a queue has a second replica", round(time.monotonic() - began))
            wait_for_more(load, 12)
        assert set(load.ends) == {"complete"}, load.details
        assert all(count > 0 for count in served.by_replica("ambidex_prompt_tokens_total").values())


Report = Callable[[str, Any], None]


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Report:
    """Say what was counted, whatever captures the output."""

    def say(what: str, found: Any) -> None:
        with capsys.disabled():
            print(f"\n{what}: {json.dumps(found)}")

    return say
