"""What routes ask of the application."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from server.generation.frontend import Frontend


def frontend(request: Request) -> Frontend:
    """The frontend of the application that serves `request`."""
    found: Frontend = request.app.state.frontend
    return found


Front = Annotated[Frontend, Depends(frontend)]
