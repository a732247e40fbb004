"""HTTP beside gRPC, on the same event loop: metrics for Prometheus, and liveness and readiness for an orchestrator."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

import uvicorn
from prometheus_client import exposition
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from attnserve_server.access.certificates import Certificates, NewestContext
from attnserve_server.access.guard import Access
from attnserve_server.config import Settings
from attnserve_server.observability.metrics import Metrics
from attnserve_server.scheduling.catalog import Catalog
from attnserve_server.transport.health import Health
from attnserve_server.transport.server import PortUnavailable
from attnserve_server.transport.who import CertifiedProtocol, guarded

HEAD_S: Final = 10.0
"""Seconds that the head of a request may take, from the connection or the answer before it."""
MOST_CONNECTIONS: Final = 256
"""Connections to the HTTP port. Scrapes and probes need a handful."""


class _BoundedProtocol(CertifiedProtocol):
    """Ends connections beyond `MOST_CONNECTIONS`, and those that send no request within `HEAD_S`."""

    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        """Begin a connection, if there is room."""
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
            return
        self._expect_head()

    def handle_events(self) -> None:
        """Take what has arrived."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and self._head is not None:
            self._head.cancel()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._expect_head()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection."""
        if self._head is not None:
            self._head.cancel()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
        self._head = self.loop.call_later(HEAD_S, self.transport.abort)


class _QuietServer(uvicorn.Server):
    """uvicorn without signal handlers: the application owns the process's signals."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """HTTP on one port. Event loop only."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        health: Health,
        metrics: Metrics,
        alive: Callable[[], bool],
        access: Access,
        collect: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Store the parts. `collect`: updates the metrics for each scrape; None: they need no update."""
        self._settings = settings
        config = uvicorn.Config(
            guarded(routes(catalog, health, metrics, alive, collect), access),
            http=_BoundedProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        config.load()
        if access.certificates is not None:
            config.ssl = _newest_context(access, access.certificates)
        self._server = _QuietServer(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listen, and return the port.

        Raises:
            PortUnavailable: The port is taken, or the address is not this machine's.
        """
        host, port = self._settings.host, self._settings.http_port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family, backlog=128)
        except OSError:
            raise PortUnavailable(host, port) from None
        bound: int = listener.getsockname()[1]
        self._serving = asyncio.create_task(self._server.serve([listener]), name="http")
        return bound

    async def stop(self) -> None:
        """End, after at most a second for answers in progress."""
        self._server.should_exit = True
        if self._serving is not None:
            with suppress(asyncio.CancelledError):
                await self._serving


def _newest_context(access: Access, first: Certificates) -> ssl.SSLContext:
    """Return a context that uses the newest certificates for each new connection."""
    used, context = first, first.context()

    def newest() -> ssl.SSLContext:
        nonlocal used, context
        current = access.certificates
        if current is not None and current is not used:
            used, context = current, current.context()
        return context

    return NewestContext(newest, access.handshakes["http"].inc)


def routes(
    catalog: Catalog,
    health: Health,
    metrics: Metrics,
    alive: Callable[[], bool],
    collect: Callable[[], Awaitable[None]] | None = None,
) -> Starlette:
    """Return the application with `/metrics`, `/livez` and `/readyz`.

    Args:
        catalog: its models' states are in the body of `/readyz`.
        health: whether the server as a whole answers, which is the status of `/readyz`.
        metrics: the content of `/metrics`.
        alive: returns whether the server works, which is the status of `/livez`; an orchestrator restarts it if not.
        collect: updates `metrics` before each page; None: they need no update.
    """

    async def metrics_page(request: Request) -> Response:
        if collect is not None:
            await collect()
        encode, content_type = exposition.choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics.registry), media_type=content_type)

    async def livez(_: Request) -> Response:
        living = alive()
        return JSONResponse({"status": "alive" if living else "faulted"}, 200 if living else 503)

    async def readyz(_: Request) -> Response:
        ready = health.serving()
        models = [
            {"name": model.name, "version": model.version, "state": model.state.value, "reason": model.state_reason}
            for model in catalog.all()
        ]
        return JSONResponse({"status": "ready" if ready else "not ready", "models": models}, 200 if ready else 503)

    return Starlette(
        routes=[Route("/metrics", metrics_page), Route("/livez", livez), Route("/readyz", readyz)],
    )
