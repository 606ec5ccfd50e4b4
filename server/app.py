"""The application: routes, errors and limits around one worker, whose life it owns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware

from engine.serving.worker import Worker
from server import access_log
from server.calls import Call
from server.deadlines import TIMEOUT_HEADER
from server.errors import OPENAI_PATHS, install_handlers
from server.generation import Frontend
from server.middleware import (
    REQUEST_ID,
    BodyLimitMiddleware,
    CallMiddleware,
    HeadLimitMiddleware,
    KeyMiddleware,
)
from server.ratelimit import RateLimiter
from server.routes import admin, chat, completions, generate, models, ops, playground, tokens
from server.schemas.chat import ChatChunk
from server.schemas.tgi import StreamEvent
from server.settings import Settings
from server.tracing import Tracing
from server.version import VERSION

DESCRIPTION: Final = """
Serves a language model whose feed-forward layers run **dense** or as a **mixture of experts**, from
one set of weights, chosen per request by the field `experts`.

`/generate` and its kin are those of Hugging Face's text-generation-inference, the routes below
`/v1` are OpenAI's. Clients of either work unchanged, and send `experts` among the parameters or
beside them. An error is `{"error": sentence, "error_type": kind}`, below `/v1`
`{"error": {"message", "type", "param", "code"}}`. Every response carries `X-Request-Id`: the
client's own, or a new one. `X-Request-Timeout` bounds the seconds that a request may take; then it
ends with an error of code `timeout`. Where the server has API keys, send one as
`Authorization: Bearer KEY`.
"""
TAGS: Final = [
    {"name": "generation", "description": "Text in, text out, at once or as a stream."},
    {"name": "openai", "description": "The same in OpenAI's format."},
    {"name": "tokens", "description": "Text to token ids and back."},
    {"name": "operations", "description": "Health, metrics, and what is served here."},
    {"name": "administration", "description": "For the host, with the admin key."},
]


class App(FastAPI):
    """FastAPI whose document also describes the events of streams."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document; made once."""
        if self.openapi_schema is None:
            document = super().openapi()
            components, schemas = document["components"], document["components"]["schemas"]
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}, {}]  # a server without keys asks for none
            _drop_default_errors(document)
            for kind in (StreamEvent, ChatChunk):
                event = kind.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas |= {**event.pop("$defs"), kind.__name__: event}
        assert self.openapi_schema is not None
        return self.openapi_schema


def _drop_default_errors(document: dict[str, Any]) -> None:
    """Take out FastAPI's own 422, which no route answers: those that have one describe it."""
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if path.startswith(OPENAI_PATHS):
                operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)


def create_app(
    worker: Worker, settings: Settings, tracing: Tracing | None = None, *, watch: bool = True
) -> FastAPI:
    """The application around `worker`, which it starts, drains and stops.

    Args:
        worker: not started yet.
        settings: limits and timeouts; the engine inside `worker` has its own already.
        tracing: makes spans of requests; none are made without.
        watch: look at the watched path by itself; otherwise only when it is told to reload.
    """
    frontend = Frontend(worker, settings)
    app = App(
        title="Ambidex",
        version=VERSION,
        description=DESCRIPTION,
        openapi_tags=TAGS,
        lifespan=_lifespan(frontend, tracing, watch),
    )
    app.state.frontend = frontend
    install_handlers(app)
    for module in (generate, completions, chat, models, tokens):
        app.include_router(module.router)
    app.include_router(ops.router)
    app.include_router(admin.router)
    if settings.playground:
        app.router.routes.extend(playground.routes())

    def ended(call: Call) -> None:
        frontend.count_call(call)
        if settings.access_log:
            access_log.write(call)
        if tracing is not None:
            tracing.record(call)

    add_middleware(app, settings, frontend.limiter, frontend.count_rejection, ended)
    return app


def add_middleware(
    app: Starlette,
    settings: Settings,
    limiter: RateLimiter,
    rejected: Callable[[str], None],
    ended: Callable[[Call], None],
) -> None:
    """Give `app` the bounds of `settings`. From the inside out: the last one sees a request first.

    Args:
        app: what the middleware surrounds.
        settings: the bounds, and the keys.
        limiter: of each key.
        rejected: is called with the reason of a refusal.
        ended: is called with every call that has ended.
    """
    app.add_middleware(
        BodyLimitMiddleware, max_bytes=settings.max_body_bytes, timeout=settings.body_timeout
    )
    app.add_middleware(
        KeyMiddleware, keyring=settings.keyring(), limiter=limiter, rejected=rejected
    )
    app.add_middleware(
        HeadLimitMiddleware,
        max_url_bytes=settings.max_url_bytes,
        max_header_bytes=settings.max_header_bytes,
    )
    if settings.cors_origins:  # outside of keys: a browser asks first without one
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", REQUEST_ID, TIMEOUT_HEADER],
            expose_headers=["*"],
        )
    app.add_middleware(CallMiddleware, ended=ended)


def _lifespan(
    frontend: Frontend, tracing: Tracing | None, watch: bool
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    settings = frontend.settings

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        frontend.fleet.start()
        watching = [asyncio.create_task(frontend.lag.watch())]
        if settings.watch and watch:
            watching.append(asyncio.create_task(frontend.reloader.watch()))
        try:
            yield
            await frontend.drain(settings.drain_timeout)
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
            await frontend.fleet.stop()
            if tracing is not None:
                await asyncio.to_thread(tracing.stop)

    return lifespan
