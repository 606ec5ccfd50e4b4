"""The autoscaler's metrics: what it asks for, the adapter serves.

That the server exports them, test_training_job.py shows.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from server.settings import Settings
from tests.deploy.kubernetes.manifests import KUBERNETES, SERVERS, environment, one
from tests.deploy.prometheus import BINARIES, WHY_SKIPPED

ADAPTER = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())
both = pytest.mark.parametrize("overlay", SERVERS)


def promtool(*arguments: str | Path) -> None:
    if None in BINARIES:
        pytest.skip(WHY_SKIPPED)
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_adapter_answers_with_each_pods_mean_over_a_minute(tmp_path: Path) -> None:
    """Its query, filled in as the adapter does, in a unit test of Prometheus's own."""
    (rule,) = ADAPTER["rules"]["custom"]
    assert rule["resources"]["overrides"].keys() == {"namespace", "pod"}
    filled = {
        "Series": "ambidex_requests_waiting",
        "LabelMatchers": 'namespace="ambidex",pod=~"a|b"',
        "GroupBy": "pod",
    }
    query = re.sub(r"<<\.(\w+)>>", lambda match: filled[match[1]], rule["metricsQuery"])
    series = 'ambidex_requests_waiting{{namespace="{}",pod="{}",instance="{}:8000"}}'
    values = {("ambidex", "a"): "0 4 8 8 8", ("ambidex", "b"): "0x4", ("other", "a"): "9x4"}
    case = {
        "interval": "15s",
        "input_series": [
            {"series": series.format(*labels, labels[1]), "values": found}
            for labels, found in values.items()
        ],
        "promql_expr_test": [
            {
                "expr": query,
                "eval_time": "1m",
                "exp_samples": [
                    {"labels": '{pod="a"}', "value": 5.6},
                    {"labels": '{pod="b"}', "value": 0},
                ],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"rule_files": [], "tests": [case]}))
    promtool("test", "rules", tmp_path / "test.yml")


def test_the_adapter_serves_what_the_autoscaler_asks_for() -> None:
    (rule,) = ADAPTER["rules"]["custom"]
    pattern = re.search(r'__name__=~"(.*?)"', rule["seriesQuery"])
    assert pattern is not None
    for overlay in SERVERS:
        metrics = one(overlay, "HorizontalPodAutoscaler")["spec"]["metrics"]
        for metric in metrics:
            assert re.fullmatch(pattern[1], metric["pods"]["metric"]["name"])


@both
def test_servers_are_added_before_they_are_full(overlay: str) -> None:
    metrics = one(overlay, "HorizontalPodAutoscaler")["spec"]["metrics"]
    at = {m["pods"]["metric"]["name"]: int(m["pods"]["target"]["averageValue"]) for m in metrics}
    given = environment(overlay)
    seqs = int(given.get("AMBIDEX_MAX_NUM_SEQS", Settings.model_fields["max_num_seqs"].default))
    waiting = Settings.model_fields["max_waiting"].default
    assert seqs / 2 < at["ambidex_requests_running"] < seqs
    assert 0 < at["ambidex_requests_waiting"] < waiting / 10
