"""What the routes get from the application."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from server.generation.frontend import Frontend


async def frontend(request: Request) -> Frontend:
    """The frontend of the application that serves `request`.

    It is a coroutine because FastAPI would run a function in a thread, for each request.
    """
    found: Frontend = request.app.state.frontend
    return found


Front = Annotated[Frontend, Depends(frontend)]
