"""Writes dashboards/ambidex.json: `make dashboard`, after each change here.

A page of panels says more to a reader than two thousand lines of JSON. Quantiles and ratios are the
recording rules' (deploy/prometheus/rules/recording.yml), so that a panel and an alert never differ.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models

from deploy.grafana import model_rows, server_rows
from deploy.grafana.panels import SOURCE, chosen

FILE: Final = Path(__file__).parent / "dashboards" / "ambidex.json"
ROWS: Final = {
    "Overview": server_rows.overview,
    "Latency": server_rows.latency,
    "Load": server_rows.load,
    "Experts": model_rows.experts,
    "Checkpoints and restarts": model_rows.changes,
}


def _variable(name: str, label: str, query: str) -> dashboards.QueryVariable:
    return (
        dashboards.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def build() -> models.Dashboard:
    """The dashboard; panels are numbered from the top."""
    new_weights = chosen("ambidex_model_loaded_timestamp_seconds")
    board = (
        dashboards.Dashboard("Ambidex")
        .uid("ambidex")
        .description("Language models that run dense or as a sparse mixture of experts.")
        .tags(["ambidex"])
        .editable()
        .refresh("30s")
        .time("now-1h", "now")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(
            dashboards.DatasourceVariable("datasource").label("Source").type("prometheus")
        )
        .with_variable(_variable("version", "Version", "label_values(ambidex_build_info, version)"))
        .with_variable(
            _variable(
                "instance",
                "Server",
                'label_values(ambidex_build_info{version=~"$version"}, instance)',
            )
        )
        .annotation(
            dashboards.AnnotationQuery()
            .name("New weights")
            .datasource(SOURCE)
            .enable(True)
            .icon_color("blue")
            .expr(f"changes({new_weights}[$__rate_interval]) > 0")
        )
    )
    number = iter(range(1, 1000))
    for title, panels in ROWS.items():
        board.with_row(dashboards.Row(title).id(next(number)))
        for panel in panels():
            board.with_panel(panel.id(next(number)))
    return board.build()


def as_json() -> str:
    return JSONEncoder(sort_keys=True, indent=2).encode(build()) + "\n"


if __name__ == "__main__":
    FILE.write_text(as_json(), encoding="utf-8")
