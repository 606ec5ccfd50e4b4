"""The command `ambidex`: from training and importing models to serving and inspecting them.

Each package has its commands in its `cli.py`, which imports what does the work on demand. This file
says which command is where, so that a command loads no package but its own.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, Final

import typer
from typer.core import TyperGroup

from engine.console import run
from engine.errors import require

# In the order in which the help lists them.
COMMANDS: Final = {
    "train": "training.cli",
    "prepare": "training.cli",
    "import": "training.cli",
    "export": "training.cli",
    "report": "training.cli",
    "serve": "server.cli",
    "generate": "engine.cli",
    "eval": "training.cli",
    "inspect": "training.cli",
    "bench": "benchmarks.cli",
}
CHECKOUT: Final = Path(__file__).parent


class Commands(TyperGroup):
    """The commands above, each imported when it is looked up."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name in COMMANDS if name != "bench" or _has_benchmarks()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        if cmd_name == "bench":
            _find_benchmarks()
        module: Any = importlib.import_module(COMMANDS[cmd_name])
        return typer.main.get_group(module.app).commands[cmd_name]


def _has_benchmarks() -> bool:
    return (CHECKOUT / "benchmarks").is_dir()


def _find_benchmarks() -> None:
    """Make the benchmarks importable, which no installation contains: they lie beside this file."""
    require(
        _has_benchmarks(),
        "the benchmarks are not installed with ambidex; run `ambidex bench` from its repository",
    )
    if str(CHECKOUT) not in sys.path:
        sys.path.append(str(CHECKOUT))


app = typer.Typer(
    cls=Commands,
    name="ambidex",
    help="Language models whose one set of weights runs dense or as a sparse mixture of experts.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    add_completion=False,
)


@app.callback()
def _commands() -> None:
    """Typer refuses an application without a command or a callback of its own."""


def main() -> None:
    """Entry point of the command."""
    run(app)


if __name__ == "__main__":
    main()
