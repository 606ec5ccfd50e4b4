"""The application: routes, errors and limits around one worker, whose life it owns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final

from fastapi import FastAPI

from engine.worker import Worker
from server.errors import install_handlers
from server.generation import Frontend
from server.middleware import BodyLimitMiddleware, RequestIdMiddleware
from server.routes import generate, ops
from server.schemas.tgi import StreamEvent
from server.settings import Settings
from server.version import VERSION

DESCRIPTION: Final = """
Serves a language model whose feed-forward layers run **dense** or as a **mixture of experts**, from
one set of weights, chosen per request by `parameters.experts`.

The generation routes are those of Hugging Face's text-generation-inference: clients of it, such as
`huggingface_hub.InferenceClient`, work unchanged. Every error is
`{"error": sentence, "error_type": kind}`. Every response carries `X-Request-Id`: the client's own,
or a new one.
"""
TAGS: Final = [
    {"name": "generation", "description": "Text in, text out, at once or as a stream."},
    {"name": "operations", "description": "Health, metrics, and what is served here."},
]


class App(FastAPI):
    """FastAPI whose document also describes the events of a stream."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document; made once."""
        if self.openapi_schema is None:
            schemas = super().openapi()["components"]["schemas"]
            event = StreamEvent.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= {**event.pop("$defs"), "StreamEvent": event}
        assert self.openapi_schema is not None
        return self.openapi_schema


def create_app(worker: Worker, settings: Settings) -> FastAPI:
    """The application around `worker`, which it starts, drains and stops.

    Args:
        worker: not started yet.
        settings: limits and timeouts; the engine inside `worker` has its own already.
    """
    app = App(
        title="Ambidex",
        version=VERSION,
        description=DESCRIPTION,
        openapi_tags=TAGS,
        lifespan=_lifespan(worker, settings),
    )
    app.state.frontend = Frontend(worker, settings)
    install_handlers(app)
    app.include_router(generate.router)
    app.include_router(ops.router)
    # The one added last is outermost: a refused body has a request id too.
    app.add_middleware(
        BodyLimitMiddleware, max_bytes=settings.max_body_bytes, timeout=settings.body_timeout
    )
    app.add_middleware(RequestIdMiddleware, access_log=settings.access_log)
    return app


def _lifespan(
    worker: Worker, settings: Settings
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
            await app.state.frontend.drain(settings.drain_timeout)
        finally:
            await asyncio.to_thread(worker.stop)  # it waits for the step under way

    return lifespan
