"""`/admin/...`: what a host asks and orders. Every route needs the admin key."""

from __future__ import annotations

from typing import Annotated, Any, Final

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from server.generation.frontend import Frontend
from server.routes.dependencies import Front
from server.schemas.fields import Strict, Text
from server.schemas.tgi import ErrorResponse

router = APIRouter(prefix="/admin", tags=["administration"])

ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    401: {"model": ErrorResponse, "description": "No key was sent, or an unknown one."},
    403: {"model": ErrorResponse, "description": "Not the admin key, or the server has none."},
}
RELOAD_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    **ERRORS,
    409: {"model": ErrorResponse, "description": "There is no checkpoint that can be loaded."},
    422: {"model": ErrorResponse, "description": "The path is not inside the watched directory."},
    503: {"model": ErrorResponse, "description": "The server is stopping."},
}


class ModelStatus(BaseModel):
    """A checkpoint that serves."""

    model_config = ConfigDict(protected_namespaces=())

    name: str = Field(description="Name of the checkpoint directory.")
    path: str = Field(description="The checkpoint directory.")
    fingerprint: str = Field(description="SHA-256 over the weights.")
    loaded_at: float = Field(description="When they began to serve, Unix time.")


class ServerStatus(BaseModel):
    """The state of the server."""

    ready: bool = Field(description="Whether requests are taken.")
    live: bool = Field(description="Whether the server can become ready by itself.")
    failure: str | None = Field(description="Why the engine has failed for good.")
    draining: bool = Field(description="Whether the server is about to stop.")
    model: ModelStatus = Field(description="The weights that serve.")
    retiring: int = Field(description="Replaced engines that finish what they have.")
    restarts: int = Field(description="Engines that took the place of failed ones.")
    failed_steps: int = Field(description="Steps that raised.")
    reloads: dict[str, int] = Field(description="Reloads by result.")
    last_reload_error: str | None = Field(description="Why the last reload failed, if it did.")
    active: int = Field(description="Generation requests in the server.")
    running: int = Field(description="Requests that own KV blocks.")
    waiting: int = Field(description="Requests in the engine's queue.")
    kv_blocks_used: int = Field(description="KV blocks in use.")
    kv_blocks: int = Field(description="KV blocks that exist.")


class ReloadRequest(Strict):
    """The optional body of `POST /admin/reload`."""

    path: Annotated[Text, Field(min_length=1, max_length=1024)] | None = Field(
        default=None,
        description="Checkpoint directory, relative to the watched one. Default: the newest.",
    )


class Reloaded(BaseModel):
    """The result of a reload."""

    result: str = Field(description="`success`, or `unchanged` if it serves already.")
    model: ModelStatus = Field(description="The weights that serve now.")


@router.get("/status", responses=ERRORS, summary="What the server is doing")
async def status(front: Front) -> ServerStatus:
    """Reports model, queue, cache, failures and reloads."""
    fleet, numbers = front.fleet, front.numbers()
    return ServerStatus(
        ready=front.ready,
        live=fleet.failure is None,
        failure=fleet.failure,
        draining=front.draining,
        model=_model(front),
        retiring=len(fleet.retiring),
        restarts=fleet.restarts,
        failed_steps=fleet.failed_steps,
        reloads=dict(front.reloader.counts),
        last_reload_error=front.reloader.last_error,
        active=front.active,
        running=numbers.running,
        waiting=numbers.waiting,
        kv_blocks_used=numbers.kv_blocks_used,
        kv_blocks=numbers.kv_blocks_total,
    )


@router.post("/reload", responses=RELOAD_ERRORS, summary="Serve another checkpoint")
async def reload(front: Front, body: ReloadRequest | None = None) -> Reloaded:
    """Verify and load a checkpoint and serve it; requests under way finish on the old weights.

    Without a body this is the newest checkpoint of the watched directory, or the model's own
    directory again. A bad checkpoint is refused, and the old one keeps serving.
    """
    result = await front.reloader.reload(body.path if body else None)
    return Reloaded(result=result, model=_model(front))


def _model(front: Frontend) -> ModelStatus:
    checkpoint = front.engine.checkpoint
    return ModelStatus(
        name=checkpoint.path.resolve().name,
        path=str(checkpoint.path),
        fingerprint=checkpoint.fingerprint,
        loaded_at=front.fleet.loaded_at,
    )
