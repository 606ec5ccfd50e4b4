"""`/admin/...`: what a host asks and orders; every route needs the admin key (server.security)."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel, Field

from server.routes.dependencies import Front

router = APIRouter(prefix="/admin", tags=["administration"])


class Status(BaseModel):
    """What happens here now."""

    ready: bool = Field(description="Whether requests are taken.")
    draining: bool = Field(description="Whether the server is about to stop.")
    active: int = Field(description="Generation requests in the server.")
    running: int = Field(description="Requests that own KV blocks.")
    waiting: int = Field(description="Requests in the engine's queue.")
    kv_blocks_used: int = Field(description="KV blocks in use.")
    kv_blocks: int = Field(description="KV blocks that exist.")


@router.get("/status", summary="What the server is doing")
async def status(front: Front) -> Status:
    """The state of the queue and the cache."""
    numbers = front.numbers()
    return Status(
        ready=front.ready,
        draining=front.draining,
        active=front.active,
        running=numbers.running,
        waiting=numbers.waiting,
        kv_blocks_used=numbers.kv_blocks_used,
        kv_blocks=numbers.kv_blocks_total,
    )
