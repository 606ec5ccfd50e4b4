"""HTML pages from the templates in this folder, and values written as people write them.

Every value is escaped by the templates; only the drawn charts go in as they are. The pages have no
scripts and load nothing.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from training.report.drawing import draw
from training.report.history import number

# A figure of the page's head: its name, its value, and what else is said about it.
Tile = tuple[str, str, str]


class Table(NamedTuple):
    """A table of a page: the words above the columns, and the cells row by row."""

    head: list[str]
    rows: list[list[str]]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("training.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["draw"] = draw
    return environment


def render_page(template: str, **values: Any) -> str:
    """The page that `template` makes of `values`."""
    return _environment().get_template(template).render(values)


def duration(seconds: float | None) -> str:
    """A time for people."""
    if seconds is None:
        return "?"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def items_of(value: object) -> list[tuple[str, Any]]:
    """The pairs of a dictionary; none for anything else."""
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
