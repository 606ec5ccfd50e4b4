"""The server's command. Its options are the settings, which are imported only when it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand


class SettingsCommand(TyperCommand):
    """Stands for the command that has every setting as an option, until that one is called."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        return settings_command(_serve).make_context(*args, **kwargs)


app = typer.Typer()


@app.command(cls=SettingsCommand)
def serve() -> None:
    """Serve a checkpoint over HTTP: POST /generate, /generate_stream, GET /info, /metrics, /docs.

    Every option is also an environment variable, as named; options given here win. Keys are taken
    from the environment or a file alone. SIGTERM finishes what runs, then exits.
    """


def settings_command(run: Callable[[dict[str, Any]], None]) -> Any:
    """A command (of click) with every setting as an option; it calls `run` with those given."""
    from server.process.options import with_options

    complete = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    complete.command("serve")(with_options(run, serve.__doc__))
    return typer.main.get_command(complete)


def _serve(given: dict[str, Any]) -> None:
    from pydantic import ValidationError

    from engine.errors import ConfigError
    from server.process.serve import serve as run_server
    from server.settings import Settings

    try:
        settings = Settings(**given)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"]) or "settings"
        raise ConfigError(f"{name}: {problem['msg']}") from error
    run_server(settings)
