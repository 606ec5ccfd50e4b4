"""One server process: load the model, say what it is, serve, drain on SIGTERM, exit.

Shutdown in order: on SIGTERM (or SIGINT) new requests get 503 and `/health` turns 503, so that a
load balancer looks elsewhere, while the socket stays open; what runs may finish within
`drain_timeout`; then the socket closes and the process exits with status 0. A second signal skips
the wait.

An engine that has failed for good ends the process as well, after `exit_delay`: until then health
and metrics say so.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

import uvicorn
from rich.console import Console

from server.app import create_app
from server.engines.fleet import make_worker
from server.engines.reload import first_engine
from server.generation.frontend import Frontend
from server.http import access_log
from server.http.tracing import Tracing, otlp_provider
from server.process.banner import banner, phase
from server.settings import Settings, unknown_variables

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
CLOSE_SECONDS: Final = 5  # the time that connections have to close once their requests have ended
# Load balancers keep idle connections for 60 s. The server must keep them longer, or a request may
# arrive on a connection that it is just closing.
KEEP_ALIVE_SECONDS: Final = 75

logger = logging.getLogger("ambidex.server")


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling, which would close the socket before the drain."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(settings: Settings, console: Console | None = None) -> None:
    """Serve until a signal; returns when everything has ended.

    Raises:
        CheckpointError: the model cannot be loaded.
        ConfigError: the settings do not fit the model.
        SystemExit: the address cannot be used, or the engine has failed for good.
    """
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    if settings.access_log:
        access_log.write_to_stderr()
    console = console or Console()
    tracing = Tracing(otlp_provider()) if settings.traces else None
    # Imported modules live as long as the process. If the garbage collector searched them each
    # time, event loop and engine would stop for a tenth of a second. The engine is made after this,
    # since a reload may replace it.
    gc.collect()
    gc.freeze()
    engine = first_engine(settings, partial(phase, console))
    app = create_app(make_worker(engine, settings), settings, tracing)
    frontend: Frontend = app.state.frontend
    with listen(settings) as listener:
        console.print(banner(frontend, _address(listener), as_table=console.is_terminal))
        _warn_if_open(settings)
        for sentence in unknown_variables(os.environ):
            logger.warning("%s", sentence)
        config = uvicorn.Config(
            app,
            log_config=None,
            log_level=settings.log_level,
            access_log=False,  # the application logs requests itself, with their ids
            lifespan="on",
            server_header=False,
            timeout_graceful_shutdown=CLOSE_SECONDS,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            http="h11",  # even where httptools is installed: h11 bounds a request's head
            h11_max_incomplete_event_size=settings.max_url_bytes + settings.max_header_bytes,
        )
        asyncio.run(_run(_Server(config), frontend, listener))
    failure = frontend.fleet.failure
    if failure is not None and settings.exit_on_failure:
        raise SystemExit(f"the server has failed for good: {failure}")


def listen(settings: Settings) -> socket.socket:
    """A bound socket. It is bound before the banner is printed, which then has the real port.

    Raises:
        SystemExit: the address cannot be used.
    """
    try:
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        address = settings.host, settings.port
        listener = socket.create_server(address, family=family, backlog=2048)
        # Connections inherit this option. asyncio sets it only if the socket names its protocol;
        # without it a stream's first event, its second write, waits 40 ms for a delayed ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        raise SystemExit(
            f"cannot listen on {settings.host} port {settings.port} (AMBIDEX_HOST, AMBIDEX_PORT): "
            f"{error.strerror or error}"
        ) from error


def _warn_if_open(settings: Settings) -> None:
    if not settings.keyring().keys and settings.host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning(
            "listening on %s without API keys: everybody who reaches it may use it "
            "(AMBIDEX_API_KEYS, AMBIDEX_API_KEYS_FILE)",
            settings.host,
        )


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _run(server: _Server, frontend: Frontend, listener: socket.socket) -> None:
    """Serve on `listener` until a signal has been handled."""
    loop = asyncio.get_running_loop()
    stopping: set[asyncio.Task[None]] = set()

    def on_signal() -> None:
        if stopping:  # at the second signal, wait for nothing
            server.force_exit = server.should_exit = True
        else:
            stopping.add(asyncio.create_task(_drain_and_exit(server, frontend)))

    def exit_now() -> None:
        server.should_exit = True

    def on_failure() -> None:
        # The process stays for `exit_delay`, so that Prometheus scrapes the failure: the next
        # process does not know of it.
        loop.call_later(frontend.settings.exit_delay, exit_now)

    if frontend.settings.exit_on_failure:
        frontend.fleet.on_failure = on_failure
    for number in SIGNALS:
        loop.add_signal_handler(number, on_signal)
    await server.serve(sockets=[listener])


async def _drain_and_exit(server: _Server, frontend: Frontend) -> None:
    timeout = frontend.settings.drain_timeout
    logger.info("draining: %d requests have %g seconds to finish", frontend.active, timeout)
    try:
        await frontend.drain(timeout)
    finally:
        server.should_exit = True
