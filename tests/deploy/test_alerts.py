"""Every alert is proven, and has a section in the runbook."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from server.settings import Settings
from tests.deploy.prometheus import CONFIG, ROOT, rules_of

ALERTS = {rule["alert"]: rule for rule in rules_of("alerts.yml")}
UNIT_TESTS = Path(__file__).parent / "rules_test.yml"
DOCS = (ROOT / "docs" / "alerts.md").read_text()


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_is_proven_to_fire_and_to_be_quiet(name: str) -> None:
    tests = yaml.safe_load(UNIT_TESTS.read_text())["tests"]
    asked = [
        case for t in tests for case in t.get("alert_rule_test", ()) if case["alertname"] == name
    ]
    assert sum("exp_alerts" in case for case in asked) == 1
    assert sum("exp_alerts" not in case for case in asked) >= 4  # three when all is well


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_says_what_and_where_to_read_on(name: str) -> None:
    rule = ALERTS[name]
    severity = rule["labels"]["severity"]
    assert severity in {"critical", "warning"}
    assert "$value" in rule["annotations"]["description"]
    assert rule["annotations"]["summary"]
    file, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert file == "docs/alerts.md"
    assert anchor == name.lower()
    assert f"\n## {name}\n\n{severity}. " in DOCS


def test_a_scrape_sees_that_a_server_has_failed() -> None:
    """It stays longer than lie between two scrapes of ours."""
    monitor = ROOT / "deploy/kubernetes/components/monitoring/servicemonitor.yaml"
    (endpoint,) = yaml.safe_load(monitor.read_text())["spec"]["endpoints"]
    composed = yaml.safe_load(CONFIG.read_text())["global"]
    for interval in (endpoint["interval"], composed["scrape_interval"]):
        assert int(interval.removesuffix("s")) + 2 < Settings().exit_delay


def test_the_runbook_has_no_other_alerts() -> None:
    assert set(re.findall(r"^## (Ambidex\w+)$", DOCS, re.MULTILINE)) == set(ALERTS)
