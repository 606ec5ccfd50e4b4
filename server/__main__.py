"""`python -m server`: the command `serve` by itself, for where `ambidex` is not installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pydantic import ValidationError

from engine.errors import AmbidexError
from server.cli import settings_command
from server.process.serve import serve
from server.settings import Settings, explain


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve; a setting or checkpoint that cannot be used ends the process with a sentence.

    `arguments` are those of the process by default.
    """
    command = settings_command(lambda given: serve(Settings(**given)))
    try:
        command.main(arguments, prog_name="python -m server")
    except ValidationError as error:
        sys.exit(explain(error))
    except AmbidexError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
