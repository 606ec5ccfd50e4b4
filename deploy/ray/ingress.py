"""The ingress between Ray's proxies and the replicas: our bounds and keys, then the forwarder."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.ray.forward import Forwarder
from deploy.ray.reach import Reach, reload_all
from deploy.ray.replica import log
from deploy.ray.wire import merged_metrics, plain_scope
from engine.errors import AmbidexError
from server.app import add_middleware
from server.http.error_responses import error_response
from server.http.middleware import REQUEST_ID
from server.http.ratelimit import RateLimiter
from server.routes.ops import METRICS_TYPE
from server.settings import Settings

Handler = Callable[[Scope, Receive, Send], Coroutine[Any, Any, None]]

COUNTERS: Final = (
    ("retried", "Requests that another replica was asked for."),
    ("broken", "Streams that ended with an error because their replica was lost."),
)


class Ingress:
    """A Serve deployment that answers HTTP.

    Args:
        settings: the settings of the server.
        model: a handle of the replicas.
        rollout: a handle of the deployment that reloads them.
        characters: how many characters of a prompt decide which replica it prefers.
        max_active: how many requests there may be at once.
    """

    def __init__(
        self,
        settings: Settings,
        model: DeploymentHandle[Any],
        rollout: DeploymentHandle[Any],
        characters: int,
        max_active: int,
    ) -> None:
        log(settings)
        self.settings = settings
        self.name = f"ingress-{serve.get_replica_context().replica_id.unique_id}"
        self.reach = Reach(model)
        self.rollout = rollout
        self.forwarder = Forwarder(self.reach, self.settings, characters, max_active)
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(_Own(self))
        self.for_all: dict[tuple[str, str], Handler] = {
            ("GET", "/metrics"): self._metrics,
            ("GET", "/admin/status"): self._status,
            ("POST", "/admin/reload"): self._reload,
        }

    def __serve_build_asgi_app__(self) -> ASGIApp:  # Serve calls it by this name
        app = Starlette(routes=[Mount("/", app=self._answer)])

        def rejected(reason: str) -> None:
            self.forwarder.counts.rejections[reason] += 1

        # The replicas limit the requests of a minute, because they see the tokens as well.
        add_middleware(app, self.settings, RateLimiter(0, 0), rejected, lambda _call: None)
        return _as_on_one_machine(app)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self.for_all.get((scope["method"], scope["path"]))
        if handler is None:
            await self.forwarder(scope, receive, send)
            return
        try:
            await handler(scope, receive, send)
        except AmbidexError as error:
            await error_response(error)(scope, receive, send)

    # What concerns all replicas

    async def _metrics(self, scope: Scope, receive: Receive, send: Send) -> None:
        pages = await self.reach.everybody("metrics")
        pages.append((self.name, generate_latest(self.registry)))
        await Response(merged_metrics(pages), media_type=METRICS_TYPE)(scope, receive, send)

    async def _status(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = dict(await self.reach.everybody("status"))
        await JSONResponse({"replicas": found})(scope, receive, send)

    async def _reload(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive()).get("body", b"")
        for message in await reload_all(self.rollout, plain_scope(scope), body):
            await send(message)


def _as_on_one_machine(app: ASGIApp) -> ASGIApp:
    """Remove what Ray's proxy adds, so that `app` answers as on one machine.

    The proxy puts the route's prefix in front of every path, and a second X-Request-Id into every
    response.
    """

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        prefix = scope.get("root_path", "")
        path, raw_path = scope["path"].removeprefix(prefix), scope.get("raw_path", b"")
        raw_path = raw_path.removeprefix(prefix.encode())
        given = Headers(scope=scope).get(REQUEST_ID)
        scope = {**scope, "root_path": "", "path": path or "/", "raw_path": raw_path or b"/"}

        async def send_one_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if headers.get(REQUEST_ID) == given:
                    del headers[REQUEST_ID]
            await send(message)

        await app(scope, receive, send_one_id)

    return call


class _Own(Collector):
    """Exports what an ingress counts itself."""

    def __init__(self, ingress: Ingress) -> None:
        self.ingress = ingress

    def collect(self) -> list[Metric]:
        counts = self.ingress.forwarder.counts
        active = GaugeMetricFamily("ambidex_ingress_requests", "Requests in an ingress.")
        active.add_metric([], counts.active)
        rejections = CounterMetricFamily(
            "ambidex_ingress_rejections", "Requests that an ingress refused.", labels=["reason"]
        )
        for reason, count in counts.rejections.items():
            rejections.add_metric([reason], count)
        found: list[Metric] = [active, rejections]
        for name, text in COUNTERS:
            family = CounterMetricFamily(f"ambidex_ingress_{name}", text)
            family.add_metric([], getattr(counts, name))
            found.append(family)
        return found
