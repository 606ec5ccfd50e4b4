"""Train as the Job does, serve as the Deployment does: the checkpoint arrives, no request is hurt.

Both run with the very arguments and variables of the manifests, their paths replaced by directories
that stand for the volumes. `make job-check` trains the Job's own configuration for a minute or two
and keeps what was measured; otherwise a smaller one is trained for seconds.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.records import Record, write_records
from engine import checkpoint as checkpoints
from tests.deploy.kubernetes.manifests import REFERENCES, Volumes, container, one, pod

SERVER, JOB = "overlays/cpu", "training/cpu"
RECORD = os.environ.get("AMBIDEX_JOB_RECORD")  # where `make job-check` wants its numbers
KEY = "fedcba9876543210" * 2
SECRETS = {"api-keys": f"tester:{KEY}\n", "admin-key": REFERENCES["AMBIDEX_ADMIN_KEY"]}
QUIET = {"OMP_WAIT_POLICY": "PASSIVE"}
CLIENTS = 2  # so that one is always under way
SECONDS = 300  # for training
PROMPT, TOKENS = "def read(path):\n", 200
SMALL = """
preset = "smoke"
steps = 8
batch_size = 1
sequence_length = 256
valid_share = 0.1
validate_share = 0
evaluate_tokens = 512
"""


def configuration() -> str:
    own = one(JOB, "ConfigMap")["data"]["run.toml"]
    return f"{own}steps = 16\nevaluate_tokens = 4096\n" if RECORD else SMALL


@dataclass
class Answer:
    began: float
    ended: float
    text: str


@dataclass
class Clients:
    """Ask without a pause until told to stop; every answer must be whole."""

    http: httpx.Client
    answers: list[Answer] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def ask(self, stream: bool) -> None:
        began = time.time()
        try:
            text = self._stream() if stream else self._whole()
        except (httpx.HTTPError, AssertionError, KeyError, ValueError) as error:
            self.failures.append(f"{type(error).__name__}: {error}")
            return
        self.answers.append(Answer(began, time.time(), text))

    def _whole(self) -> str:
        response = self.http.post("/generate", json=body())
        assert response.status_code == 200, response.text
        return response.json()["generated_text"]

    def _stream(self) -> str:
        with self.http.stream("POST", "/generate_stream", json=body()) as response:
            assert response.status_code == 200, response.read()
            lines = [line for line in response.iter_lines() if line]
        last = json.loads(lines[-1].removeprefix("data:"))
        assert len(lines) == last["details"]["generated_tokens"], lines[-1]
        return last["generated_text"]

    @contextmanager
    def asking(self) -> Iterator[None]:
        def client() -> None:
            for stream in itertools.cycle((True, False)):
                if self.stop.is_set() or self.failures:
                    return
                self.ask(stream)

        threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stop.set()
            for thread in threads:
                thread.join(240)


def body() -> dict[str, Any]:
    return {"inputs": PROMPT, "parameters": {"max_new_tokens": TOKENS}}


def wait(condition: Callable[[], object], seconds: float, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the server has ended"
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Nothing is left running, whatever happens."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def text(folder: Path) -> None:
    """A corpus: small packages of Python's library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for package in ("json", "asyncio", "email") if RECORD else ("json",):
        shutil.copytree(library / package, folder / package)


def answers(http: httpx.Client, probe: str) -> bool:
    """As the kubelet asks: without a key."""
    path = container(SERVER)[f"{probe}Probe"]["httpGet"]["path"]
    try:
        return httpx.get(str(http.base_url.join(path)), trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def info(http: httpx.Client) -> dict[str, Any]:
    return http.get("/info").raise_for_status().json()


def test_what_the_job_trains_is_served_and_no_request_is_hurt(tmp_path: Path) -> None:
    volumes = Volumes(tmp_path, SECRETS, configuration())
    text(volumes.mounts(JOB)["/data"])
    port = free_port()
    changed = {"AMBIDEX_HOST": "127.0.0.1", "AMBIDEX_PORT": port}
    with (
        ended(volumes.start(SERVER, **changed, **QUIET)) as server,
        httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": f"Bearer {KEY}"},
            trust_env=False,
            timeout=60,
        ) as http,
    ):
        wait(lambda: answers(http, "startup"), 240, server)
        assert http.get("/info", headers={"Authorization": "Bearer none"}).status_code == 401
        before = info(http)
        assert before["model_id"] == "starter", "the volume is empty"
        clients = Clients(http)
        clients.ask(stream=True)
        with clients.asking():
            began = time.monotonic()
            with ended(volumes.start(JOB, **QUIET)) as job:
                assert job.wait(SECONDS) == 0, volumes.log(JOB).read_text()
            trained = time.monotonic() - began
            wait(lambda: info(http)["model_sha"] != before["model_sha"], 240, server)
            after = info(http)
            arrived = len(clients.answers)
            wait(lambda: clients.failures or len(clients.answers) > arrived + 4, 240, server)
            assert answers(http, "readiness")
            assert answers(http, "liveness")
            check_the_autoscalers_metrics(http.get("/metrics").text)
        written = check_the_checkpoint(volumes, after)
        check_the_answers(clients, after["model_loaded_at"])
        stop_with_a_request_under_way(server, clients)
    if RECORD:
        keep(Path(RECORD), clients, trained, after["model_loaded_at"], written)


def check_the_autoscalers_metrics(exposition: str) -> None:
    """What it scales by is there, once a server: a series each, without labels."""
    for metric in one(SERVER, "HorizontalPodAutoscaler")["spec"]["metrics"]:
        assert exposition.count(f"\n{metric['pods']['metric']['name']} ") == 1


def check_the_checkpoint(volumes: Volumes, served: dict[str, Any]) -> float:
    """It is the run's own, whole, alone in the watched directory; returns when it was written."""
    watched = volumes.mounts(SERVER)["/models"]
    (published,) = watched.iterdir()
    run = volumes.mounts(JOB)["/runs"] / published.name
    assert served["model_id"] == published.name
    assert served["model_sha"] == checkpoints.load(published).fingerprint
    assert checkpoints.content_digest(published) == checkpoints.content_digest(run / "checkpoint")
    assert served["experts"]["quality"], "as the Job measured it"
    return (published / "manifest.json").stat().st_mtime


def check_the_answers(clients: Clients, switched: float) -> None:
    """All are whole, each is one model's own, and some were under way at the switch."""
    assert not clients.failures
    old, new = clients.answers[0].text, clients.answers[-1].text
    assert old != new
    assert {answer.text for answer in clients.answers} == {old, new}
    assert any(a.began < switched < a.ended for a in clients.answers)
    assert all(a.text == old for a in clients.answers if a.ended < switched)


def stop_with_a_request_under_way(server: subprocess.Popen[bytes], clients: Clients) -> None:
    """SIGTERM, as after preStop: what was accepted is answered, then the server exits."""
    already = len(clients.answers)
    asking = threading.Thread(target=clients.ask, args=(True,))
    active = "ambidex_http_requests_active 1.0"
    asking.start()
    wait(lambda: active in clients.http.get("/metrics").text, 30, server)
    server.send_signal(signal.SIGTERM)
    assert server.wait(pod(SERVER)["terminationGracePeriodSeconds"]) == 0
    asking.join(60)
    assert not clients.failures
    assert len(clients.answers) == already + 1


def keep(path: Path, clients: Clients, trained: float, switched: float, written: float) -> None:
    """Write what was measured, and say it."""
    params = {"config": configuration(), "clients": CLIENTS, "tokens": TOKENS}
    durations = sorted(answer.ended - answer.began for answer in clients.answers)
    under_way = [a.ended - a.began for a in clients.answers if a.began < switched < a.ended]
    numbers = [
        ("training job, start to exit", trained, "s"),
        ("checkpoint complete to served", switched - written, "s"),
        ("requests answered", len(durations), "requests"),
        ("requests failed", len(clients.failures), "requests"),
        ("requests under way when the weights changed", len(under_way), "requests"),
        ("slowest of those", max(under_way), "s"),
        ("median request", durations[len(durations) // 2], "s"),
        ("slowest request", durations[-1], "s"),
    ]
    write_records(path, [Record(name, params, round(n, 3), unit) for name, n, unit in numbers])
    for name, number, unit in numbers:
        print(f"{name}: {number:.3g} {unit}")


pytestmark = pytest.mark.timeout(SECONDS + 200)
