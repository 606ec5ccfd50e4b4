"""A real Prometheus over running servers: every expression has data, and faults fire their alerts.

The product's own rules, SPEED times faster (tests/deploy/prometheus.py). Three servers are scraped:
a healthy one under load; one that is given a damaged checkpoint, whose engine is killed and which
then stops; one whose queue is filled and whose routers are damaged.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from deploy.grafana.dashboard import FILE
from tests.deploy import prometheus
from tests.deploy.prometheus import Prometheus, rules_of
from tests.waiting import wait_for

if TYPE_CHECKING:
    from tests.server.conftest import Live, Serve

pytestmark = pytest.mark.skipif(None in prometheus.BINARIES, reason=prometheus.WHY_SKIPPED)

ALERTS = {rule["alert"]: rule for rule in rules_of("alerts.yml")}
RECORDED = {rule["record"]: rule for rule in rules_of("recording.yml")}
BOARD: dict[str, Any] = json.loads(FILE.read_text())
TARGETS = {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in BOARD["panels"]
    for target in panel.get("targets", ())
}
# Alone and together, dense, sparse and both: every kind of decoding step.
ROUNDS = [["dense"], ["top_k:2"], ["top_k:2"] * 3, ["dense"] * 3, ["dense", "top_k:2"]]


def promtool(*arguments: str | Path) -> None:
    ran = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_fast_rules_change_times_alone() -> None:
    text = (prometheus.RULES / "alerts.yml").read_text()
    rules, fast = yaml.safe_load(text), prometheus.fast_rules(text)
    assert rules != fast
    for group, fast_group in zip(rules["groups"], fast["groups"], strict=True):
        for rule, fast_rule in zip(group["rules"], fast_group["rules"], strict=True):
            assert ("for" in rule) == ("for" in fast_rule)
            expr = re.sub(r"\[\w+\]", "[]", rule["expr"])
            assert re.sub(r"\[\d+ms\]", "[]", fast_rule["expr"]) == expr
            assert {**rule, "expr": "", "for": ""} == {**fast_rule, "expr": "", "for": ""}
    assert prometheus.faster("5m") == "2000ms"


def test_promtool_accepts_the_configuration() -> None:
    promtool("check", "config", prometheus.CONFIG)
    promtool("check", "rules", *sorted(prometheus.RULES.glob("*.yml")))


def test_promtool_proves_the_rules() -> None:
    promtool("test", "rules", Path(__file__).parent / "rules_test.yml")


@pytest.fixture(scope="module")
def observed(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Start everything, wait for numbers from healthy servers, then inject the faults."""
    folder = tmp_path_factory.mktemp("prometheus")
    with (
        serve(step_seconds=0.01, sample_every=2) as healthy,
        contextlib.ExitStack() as stack,
        serve(step_seconds=0.01, sample_every=1, max_num_seqs=2, max_waiting=6) as crowded,
        load(healthy, ROUNDS),
        load(crowded, [["top_k:4"]]),
    ):
        watched = tmp_path_factory.mktemp("watched")
        killed = stack.enter_context(serve(max_restarts=1, watch=watched, watch_interval=0.1))
        jobs = {"ambidex": healthy, "ambidex-killed": killed, "ambidex-crowded": crowded}
        hosts = {job: live.url.removeprefix("http://") for job, live in jobs.items()}
        with prometheus.running(folder, hosts) as running:
            coverage = "job:ambidex_router_coverage:ratio_rate30m"
            wait_for(lambda: len(running.query(coverage)) == 2)
            time.sleep(5)  # a past to compare with
            publish_damaged_checkpoint(watched)
            kill_engine(killed)
            damage_routers(crowded)
            with load(crowded, [["top_k:4"]], clients=12):
                failed = {"AmbidexErrors", "AmbidexFailed", "AmbidexNotReady"}
                wait_for(lambda: failed <= running.fired("ambidex-killed"))
                stack.close()  # and the process ends
                yield running


@contextmanager
def load(live: Live, rounds: list[list[str]], clients: int = 1) -> Iterator[None]:
    """Clients that send one round after another; a round's requests, by policy, go out together."""
    stop = threading.Event()

    def ask(policy: str) -> None:
        live.post("/generate", "xy" * 20, max_new_tokens=12, experts=policy)

    def client() -> None:
        for policies in itertools.cycle(rounds):
            if stop.is_set():
                return
            list(requests.map(ask, policies))

    together = max(map(len, rounds))
    with ThreadPoolExecutor(clients * together) as requests, ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client) for _ in range(clients)]
        try:
            yield
        finally:
            stop.set()
            for each in running:
                each.result(60)


def kill_engine(live: Live) -> None:
    """No step of this server succeeds any more, whichever engine takes over."""

    def boom(*_: Any) -> Any:
        raise RuntimeError("the disk is on fire")

    live.engine.runner.run = boom  # type: ignore[method-assign, assignment]
    rebuild = live.frontend.fleet._rebuild

    def rebuild_broken(worker: Any) -> Any:
        engine = rebuild(worker)
        engine.runner.run = boom  # type: ignore[method-assign, assignment]
        return engine

    live.frontend.fleet._rebuild = rebuild_broken  # type: ignore[method-assign]
    deadline = time.monotonic() + 120
    while live.frontend.fleet.failure is None:
        live.post("/generate", max_new_tokens=2)
        time.sleep(0.4)  # several scrapes see errors come
        assert time.monotonic() < deadline


def publish_damaged_checkpoint(watched: Path) -> None:
    (watched / "step-1").mkdir()
    (watched / "step-1" / "manifest.json").write_text("{}")


def damage_routers(live: Live) -> None:
    """From now on the experts that hold least are chosen."""
    for ffn in live.engine.checkpoint.model.ffns():
        ffn.router.neg_()


@pytest.mark.parametrize(
    ("job", "alert"),
    [
        ("ambidex-killed", "AmbidexReloadRefused"),
        ("ambidex-killed", "AmbidexEngineRestarted"),
        ("ambidex-killed", "AmbidexErrors"),
        ("ambidex-killed", "AmbidexFailed"),
        ("ambidex-killed", "AmbidexNotReady"),
        ("ambidex-killed", "AmbidexDown"),
        ("ambidex-crowded", "AmbidexQueueGrowing"),
        ("ambidex-crowded", "AmbidexRejecting"),
        ("ambidex-crowded", "AmbidexRouterCoverageFalling"),
    ],
)
def test_faults_fire_their_alerts(observed: Prometheus, job: str, alert: str) -> None:
    wait_for(lambda: alert in observed.fired(job))


def test_the_healthy_server_has_no_alerts(observed: Prometheus) -> None:
    """In 2 s a single late moment of a busy test machine weighs what 5 minutes of them should."""
    wait_for(lambda: "AmbidexRouterCoverageFalling" in observed.fired("ambidex-crowded"))
    assert observed.fired("ambidex") <= {"AmbidexEventLoopLag"}


def in_prometheus(expr: str) -> str:
    """A panel's expression as Grafana would send it, all servers chosen."""
    for name, value in (
        ("$instance", ".*"),
        ("$version", ".*"),
        ("$__rate_interval", prometheus.RATE_INTERVAL),
    ):
        expr = expr.replace(name, value)
    return expr


@pytest.mark.parametrize("name", TARGETS)
def test_every_panel_has_data(observed: Prometheus, name: str) -> None:
    wait_for(lambda: observed.query(in_prometheus(TARGETS[name])))


def test_variables_and_annotations_have_data(observed: Prometheus) -> None:
    for variable in BOARD["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
            assert found
            (sample, *_) = observed.query(in_prometheus(found[1]))
            assert sample["metric"][found[2]]
    (annotation,) = BOARD["annotations"]["list"]
    assert observed.query(in_prometheus(annotation["expr"].removesuffix("> 0")))


@pytest.mark.parametrize("name", RECORDED)
def test_every_recording_rule_has_data(observed: Prometheus, name: str) -> None:
    wait_for(lambda: observed.query(name))
    for sample in observed.query(name):
        assert sample["value"][1] not in ("NaN", "+Inf", "-Inf")


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_is_about_metrics_that_exist(observed: Prometheus, name: str) -> None:
    expr = ALERTS[name]["expr"]
    observed.query(expr)
    used = metrics_in(expr)
    assert used
    assert used <= observed.metric_names()


def metrics_in(expr: str) -> set[str]:
    """Names of the metrics of an expression: what is left without strings and functions."""
    bare = re.sub(r'"[^"]*"', "", expr)
    names = set(re.findall(r"[A-Za-z_:][\w:]*", bare))
    return {name for name in names if "ambidex_" in name or name.startswith(("process_", "up"))}
