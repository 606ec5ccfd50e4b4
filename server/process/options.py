"""The settings as command line options, made from the fields of `Settings`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from pydantic.fields import FieldInfo
from rich.markup import escape

from server.settings import GROUPS, REMOVED, Settings

# Keys have no option, because every process of the machine can read command lines.
ENVIRONMENT_ONLY: Final = ("api_keys", "admin_key")
_TYPES: Final = (bool, int, float, Path)  # everything else is text, which the settings read


def with_options(run: Callable[[dict[str, Any]], None], doc: str | None) -> Callable[..., None]:
    """A function for typer that has every setting as an option and calls `run` with those given."""

    def command(**options: Any) -> None:
        run({name: value for name, value in options.items() if value is not None})

    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=_annotation(name, Settings.model_fields[name], group),
        )
        for group, names in GROUPS.items()
        for name in names
        if name not in ENVIRONMENT_ONLY
    ]
    parameters += [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_hidden(name)
        )
        for name in REMOVED
    ]
    command.__doc__ = doc
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _hidden(name: str) -> Any:
    """An option that no help shows: the settings refuse it with a sentence that says why."""
    return Annotated[str | None, typer.Option(f"--{name.replace('_', '-')}", hidden=True)]


def _annotation(name: str, field: FieldInfo, group: str) -> Any:
    description = field.description or ""
    text = f"{description[:1].upper()}{description[1:]}. AMBIDEX_{name.upper()}"
    if field.default not in (None, ()) and not isinstance(field.default, Path):
        text += f" [{field.default}]"
    flag = f"--{name.replace('_', '-')}"
    kind = next((known for known in _TYPES if field.annotation in (known, known | None)), str)
    flags = f"{flag}/--no-{flag.removeprefix('--')}" if kind is bool else flag
    return Annotated[kind | None, typer.Option(flags, help=escape(text), rich_help_panel=group)]
