"""The dashboard is what its script writes, and keeps Grafana's rules as far as JSON shows them."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.dashboard import FILE, as_json
from tests.deploy.prometheus import rules_of

BOARD: dict[str, Any] = json.loads(FILE.read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
# Those of Grafana's unit ids that are in use.
UNITS = {"none", "short", "percentunit", "s", "bytes", "reqps", "dtdurations"}
TYPES = {"stat", "timeseries", "heatmap", "table"}


def test_the_file_is_what_the_script_writes() -> None:
    assert FILE.read_text() == as_json(), "run make dashboard"


def test_every_key_is_known_to_the_schema() -> None:
    """Read into the types of Grafana's own SDK and written again, nothing is lost."""
    typed = Dashboard.from_json(json.loads(FILE.read_text()))
    assert json.loads(JSONEncoder().encode(typed)) == BOARD


def test_ids_and_titles_are_unique() -> None:
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(ids) == len(set(ids))
    assert [
        t for t, n in Counter(panel["title"] for panel in BOARD["panels"]).items() if n > 1
    ] == []


def test_panels_fill_the_grid_without_overlap() -> None:
    taken: Counter[tuple[int, int]] = Counter()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        columns = range(at["x"], at["x"] + at["w"])
        taken.update(itertools.product(columns, range(at["y"], at["y"] + at["h"])))
    assert max(taken.values()) == 1
    rows = {y for _, y in taken}
    assert len(taken) == 24 * len(rows)
    assert rows == set(range(len(rows)))


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panels(panel: dict[str, Any]) -> None:
    """Each says what it shows, in a known unit, from the chosen source and servers."""
    assert panel["type"] in TYPES
    assert len(panel["description"]) > 20
    assert panel["description"].endswith(".")
    refs = [target["refId"] for target in panel["targets"]]
    assert refs == list("ABCDEF"[: len(refs)])
    for target in panel["targets"]:
        assert target["datasource"]["uid"] == "${datasource}"
        assert re.search(r"\$instance|job:|ALERTS", target["expr"]), target["expr"]
        assert target["expr"].count("(") == target["expr"].count(")")
    assert units(panel) <= UNITS
    assert units(panel)


def test_alerts_that_panels_name() -> None:
    """They exist, and a number turns red where its alert fires."""
    alerts = {rule["alert"]: rule for rule in rules_of("alerts.yml")}
    red = 0
    for panel in PANELS:
        named = re.findall(r"Ambidex[A-Z]\w+", panel["description"])
        assert set(named) <= set(alerts)
        thresholds = panel.get("fieldConfig", {}).get("defaults", {}).get("thresholds", {})
        for step in thresholds.get("steps", ()):
            if step["color"] == "red":
                red += 1
                assert alerts[named[0]]["expr"].endswith(f" > {step['value']:g}")
    assert red == 2


def units(panel: dict[str, Any]) -> set[str]:
    config, options = panel.get("fieldConfig", {}), panel.get("options") or {}
    found = {config.get("defaults", {}).get("unit")}
    for override in config.get("overrides", ()):
        found |= {p["value"] for p in override["properties"] if p["id"] == "unit"}
    found |= {options.get(part, {}).get("unit") for part in ("cellValues", "yAxis")}
    return found - {None}


def test_variables() -> None:
    names = [variable["name"] for variable in BOARD["templating"]["list"]]
    assert names == ["datasource", "version", "instance"]
    used = set(re.findall(r"\$\{?(\w+)", FILE.read_text()))
    assert used <= {*names, "__rate_interval", "__all"}


def test_grafana_finds_the_dashboard_and_its_source() -> None:
    folder = FILE.parents[1] / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yaml").read_text())["datasources"]
    assert source["type"] == "prometheus"
    (provider,) = yaml.safe_load((folder / "dashboards/ambidex.yaml").read_text())["providers"]
    compose = yaml.safe_load((FILE.parents[2] / "compose.yaml").read_text())
    mounts = [volume.split(":")[:2] for volume in compose["services"]["grafana"]["volumes"]]
    places = {inside: Path(outside) for outside, inside in mounts if outside.startswith(".")}
    assert FILE.parents[2] / places[provider["options"]["path"]] == FILE.parent
    assert FILE.parents[2] / places["/etc/grafana/provisioning"] == folder
