"""The pieces of a report's page: sections, charts with legends, tables, tiles. No scripts.

Everything that is not a number is escaped here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import Any

from training.report.history import number
from training.report.svg import Chart, Series, line_chart

Tile = tuple[str, str, str]


def page(title: str, name: str, status: str, head: str, sections: Iterable[str]) -> str:
    """A whole page: `head` stands above the sections; both are HTML, the rest is text."""
    style = (
        resources.files("training.report")
        .joinpath("templates/report.css")
        .read_text(encoding="utf-8")
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{escape(name)}</h1>
<p class="muted">{escape(status)}</p>
</header>
{head}
{chr(10).join(sections)}
</body>
</html>
"""


def section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>"


def grid(drawn: Iterable[Chart], *others: str) -> str:
    """Charts side by side where the page is wide enough, and other boxes after them."""
    boxes = [*(figure(chart) for chart in drawn), *others]
    return '<div class="grid">\n' + "\n".join(boxes) + "\n</div>"


def figure(chart: Chart) -> str:
    """A chart with its caption and legend, or a sentence where there is nothing to draw."""
    caption = f"<figcaption>{escape(chart.title)}</figcaption>"
    if not chart.has_points:
        return f'<figure>{caption}<p class="note">Nothing of this has been logged.</p></figure>'
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    return f"<figure>{caption}\n{line_chart(chart)}\n{_legend(chart)}{note}</figure>"


def _legend(chart: Chart) -> str:
    drawn = [s for s in chart.series if any(y is not None for _, y in s.points)]
    items = [legend_item(s.name, s.colour, _line_class(s)) for s in drawn]
    shaded = sorted({band.kind for band in chart.bands} & {"sparse", "mixed"})
    items += [legend_item(f"{kind} phase", f"var(--{kind}-band)", "area") for kind in shaded]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _line_class(series: Series) -> str:
    return " ".join(["dashed"] * series.dashed + ["faint"] * series.faint)


def legend_item(name: str, colour: str, kind: str) -> str:
    return f'<li class="{kind}"><i style="--c:{escape(colour)}"></i>{escape(name)}</li>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "numbers") -> str:
    """A table; every cell is escaped."""
    body = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>\n" for row in rows)
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return (
        f'<div class="table"><table class="{kind}"><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def tile_row(tiles: Iterable[Tile]) -> str:
    """Figures side by side: (name, value, what else to say of it)."""
    boxes = [
        f'<div class="tile"><dt>{escape(name)}</dt>'
        f"<dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for name, value, more in tiles
    ]
    return f'<dl class="tiles">{"".join(boxes)}</dl>' if boxes else ""


def facts(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and values."""
    cells = "".join(f"<tr><th>{escape(n)}</th><td>{escape(v)}</td></tr>\n" for n, v in rows)
    return f'<div class="table"><table class="facts"><tbody>{cells}</tbody></table></div>'


def duration(seconds: float | None) -> str:
    """A time for people."""
    if seconds is None:
        return "?"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def items_of(value: object) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def flat(prefix: str, value: object) -> list[tuple[str, str]]:
    """A nested configuration as dotted names and values."""
    rows = []
    for name, inner in items_of(value):
        if isinstance(inner, dict):
            rows += flat(f"{prefix}{name}.", inner)
        else:
            rows.append((f"{prefix}{name}", plain(inner)))
    return rows


def plain(value: object) -> str:
    """A value as a person writes it."""
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value)
    found = number(value)
    if found is None:
        return str(value)
    return f"{found:,.0f}" if found == int(found) and abs(found) < 1e15 else f"{found:g}"
