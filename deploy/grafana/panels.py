"""Kinds of panels, and the expressions that they share."""

from __future__ import annotations

from typing import Final

from grafana_foundation_sdk.builders import common, heatmap, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as dashboards
from grafana_foundation_sdk.builders import prometheus as queries
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, StackingMode
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE: Final = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
CHOSEN: Final = 'instance=~"$instance"'
JOB: Final = 'job=~".*ambidex.*"'  # of metrics that every process has
Panel = stat.Panel | timeseries.Panel | heatmap.Panel | table.Panel


# Expressions


def chosen(metric: str, *matchers: str) -> str:
    return f"{metric}{{{','.join([CHOSEN, *matchers])}}}"


def rate(metric: str, by: str = "", *matchers: str) -> str:
    """A counter's rate, summed up, or by the labels `by`."""
    summed = f"sum by ({by})" if by else "sum"
    return f"{summed} (rate({chosen(metric, *matchers)}[$__rate_interval]))"


def increase(metric: str, by: str, *matchers: str) -> str:
    return f"sum by ({by}) (increase({chosen(metric, *matchers)}[$__rate_interval]))"


def average(metric: str, by: str, *matchers: str) -> str:
    """A recorded ratio, averaged over the chosen servers."""
    return f"avg by ({by}) ({chosen(metric, *matchers)})"


def mean(histogram: str) -> str:
    """The mean observation; none while there are none."""
    return f"{rate(f'{histogram}_sum')} / ({rate(f'{histogram}_count')} > 0)"


# Panels: what they say, their unit (Grafana's name for it), and expressions by legend


def tile(title: str, text: str, unit: str, expr: str, *, red: float | None = None) -> stat.Panel:
    """The last value in large; red from `red` on."""
    steps = [models.Threshold(None, "text" if red is None else "green")]
    if red is not None:
        steps.append(models.Threshold(red, "red"))
    return (
        stat.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .unit(unit)
        .height(4)
        .span(4)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(dashboards.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
        .with_target(_query("A", expr, title))
    )


def graph(
    title: str, text: str, unit: str, series: dict[str, str], *, stacked: bool = False
) -> timeseries.Panel:
    """Lines over time, a third of the width."""
    legend = (
        common.VizLegendOptions()
        .show_legend(True)
        .display_mode(LegendDisplayMode.LIST)
        .placement(LegendPlacement.BOTTOM)
    )
    panel = (
        timeseries.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .unit(unit)
        .min(0)
        .height(8)
        .span(8)
        .fill_opacity(40 if stacked else 5)
        .legend(legend)
    )
    if stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    for ref, (name, expr) in zip("ABCDEF", series.items(), strict=False):
        panel.with_target(_query(ref, expr, name))
    return panel


def layers(title: str, text: str, expr: str) -> heatmap.Panel:
    """A heat map of shares, a row a layer: Grafana sorts rows whose names are numbers."""
    return (
        heatmap.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .height(9)
        .span(8)
        .calculate(False)
        .color(_colors("Viridis").min(0).max(1))
        .cell_values(heatmap.CellValues().unit("percentunit").decimals(1))
        .with_target(_query("A", expr, "{{layer}}"))
    )


def distribution(title: str, text: str, unit: str, metric: str) -> heatmap.Panel:
    """How a histogram's observations spread, over time."""
    expr = f"sum by (le) (increase({metric}_bucket{{{CHOSEN}}}[$__rate_interval]))"
    return (
        heatmap.Panel()
        .title(title)
        .description(text)
        .datasource(SOURCE)
        .height(8)
        .span(8)
        .calculate(False)
        .color(_colors("Blues"))
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .with_target(_query("A", expr, "{{le}}").format(PromQueryFormat.HEATMAP))
    )


def listing(
    title: str, text: str, columns: dict[str, tuple[str, str]], hidden: list[str], **labels: str
) -> table.Panel:
    """The present values, a row for each combination of labels.

    Args:
        title: of the panel.
        text: its description.
        columns: per name of a column its unit and its expression.
        hidden: columns that are not shown.
        labels: what the label of that name is called.
    """
    panel = table.Panel().title(title).description(text).datasource(SOURCE).height(8).span(12)
    names = dict(labels)
    for ref, (name, (unit, expr)) in zip("ABCDEF", columns.items(), strict=False):
        names[f"Value #{ref}" if len(columns) > 1 else "Value"] = name
        panel.with_target(_query(ref, expr, "").format(PromQueryFormat.TABLE).instant())
        panel.override_by_name(name, [models.DynamicConfigValue("unit", unit)])
    organize = {"excludeByName": dict.fromkeys(["Time", *hidden], True), "renameByName": names}
    panel.with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
    if "batch" in labels:
        number = [{"targetField": "batch", "destinationType": "number"}]
        panel.with_transformation(
            models.DataTransformerConfig(
                id_val="convertFieldType", options={"fields": {}, "conversions": number}
            )
        ).with_transformation(
            models.DataTransformerConfig(
                id_val="sortBy", options={"fields": {}, "sort": [{"field": "batch"}]}
            )
        )
    return panel.with_transformation(
        models.DataTransformerConfig(id_val="organize", options=organize)
    )


def _colors(scheme: str) -> heatmap.HeatmapColorOptions:
    colors = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme(scheme).steps(64)
    return colors.exponent(0.5).fill("dark-orange")  # Grafana's own defaults


def _query(ref: str, expr: str, legend: str) -> queries.Dataquery:
    query = queries.Dataquery().expr(expr).legend_format(legend).ref_id(ref).datasource(SOURCE)
    return query.format(PromQueryFormat.TIME_SERIES)
