"""`python -m server`: serve with the settings of the environment."""

from __future__ import annotations

import sys

from pydantic import ValidationError

from engine.errors import AmbidexError
from server.serve import serve
from server.settings import Settings, explain


def main() -> None:
    """Serve; a setting or checkpoint that cannot be used ends the process with a sentence."""
    try:
        serve(Settings())
    except ValidationError as error:
        sys.exit(explain(error))
    except AmbidexError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
