"""A real Prometheus on this machine, with the product's rules made fast."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import yaml

from tests.waiting import wait_for

ROOT: Final = Path(__file__).parents[2]
CONFIG: Final = ROOT / "deploy" / "prometheus" / "prometheus.yml"
RULES: Final = CONFIG.parent / "rules"
BINARIES: Final = [shutil.which(name) for name in ("prometheus", "promtool")]
WHY_SKIPPED: Final = "prometheus and promtool are not installed (Debian's package prometheus)"

SPEED: Final = 150  # a minute of the rules lasts so many times less in a test: 0.4 s
SCRAPE_INTERVAL: Final = "500ms"
RATE_INTERVAL: Final = "2s"  # what Grafana puts in for $__rate_interval: four scrapes
UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def faster(duration: str) -> str:
    """A duration of Prometheus, SPEED times shorter: "5m" is "2000ms"."""
    number, unit = int(duration[:-1]), duration[-1]
    return f"{number * UNITS[unit] * 1000 // SPEED}ms"


def fast_rules(text: str) -> dict[str, Any]:
    """A file of rules whose ranges, and whose patience (`for`), are SPEED times shorter.

    Thresholds, labels and names stay: what fires is what would fire, sooner.
    """
    document: dict[str, Any] = yaml.safe_load(text)
    for group in document["groups"]:
        for rule in group["rules"]:
            rule["expr"] = re.sub(r"\[(\w+)\]", lambda m: f"[{faster(m[1])}]", rule["expr"])
            if "for" in rule:
                rule["for"] = faster(rule["for"])
    return document


def rules_of(name: str) -> list[dict[str, Any]]:
    """The rules of a file, as they are delivered."""
    groups = yaml.safe_load((RULES / name).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@dataclass
class Prometheus:
    """One that runs, and its HTTP API."""

    http: httpx.Client

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The instant vector of an expression; raises on one that is not valid."""
        response = self.http.get("/api/v1/query", params={"query": expr})
        assert response.status_code == 200, f"{expr}: {response.text}"
        result: list[dict[str, Any]] = response.json()["data"]["result"]
        return result

    def metric_names(self) -> set[str]:
        return set(self.http.get("/api/v1/label/__name__/values").json()["data"])

    def fired(self, job: str) -> set[str]:
        """Names of the alerts on a job that have fired since the start."""
        found = self.query(f'max_over_time(ALERTS{{alertstate="firing",job="{job}"}}[10m])')
        return {each["metric"]["alertname"] for each in found}


@contextmanager
def running(folder: Path, jobs: dict[str, str]) -> Iterator[Prometheus]:
    """Start Prometheus with the fast rules.

    Args:
        folder: where its files go.
        jobs: what it scrapes: `host:port` by the job's name.
    """
    for file in RULES.glob("*.yml"):
        (folder / file.name).write_text(yaml.safe_dump(fast_rules(file.read_text())))
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] = {"scrape_interval": SCRAPE_INTERVAL, "evaluation_interval": SCRAPE_INTERVAL}
    config["rule_files"] = ["*.yml"]
    config["scrape_configs"] = [
        {"job_name": name, "scrape_timeout": SCRAPE_INTERVAL}
        | {"static_configs": [{"targets": [target]}]}
        for name, target in jobs.items()
    ]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{_free_port()}"
    log = (folder / "log").open("w")
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={folder / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
            "--log.level=warn",
        ],
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        with httpx.Client(base_url=f"http://{address}", trust_env=False, timeout=30) as http:
            wait_for(lambda: _is_ready(http, process, folder / "log"))
            yield Prometheus(http)
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def _is_ready(http: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    try:
        return http.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
