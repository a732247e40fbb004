"""HTTP beside gRPC, on the same event loop: a bounded server on one port, and the routes of metrics and health."""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, Literal

import msgspec
import uvicorn
from prometheus_client import exposition
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from attnserve_server.access.certificates import Certificates, NewestContext
from attnserve_server.access.guard import Access
from attnserve_server.observability.metrics import Metrics
from attnserve_server.scheduling.catalog import Catalog
from attnserve_server.transport.health import Health
from attnserve_server.transport.server import MAX_METADATA_BYTES, PortUnavailable
from attnserve_server.transport.who import CertifiedProtocol

HEAD_S: Final = 10.0
"""Seconds that the head of a request may take, from the connection or the answer before it."""
MOST_CONNECTIONS: Final = 64
"""Connections to the HTTP port. Scrapes and probes need a handful."""
REST_IDLE_S: Final = 75.0
"""Seconds that a connection to REST may wait for its next request: longer than the 60 s of most load balancers, which
would otherwise send requests into connections that are being closed."""


class _BoundedProtocol(CertifiedProtocol):
    """Ends connections beyond a limit, and those that send no request in time."""

    most: int | None = None
    """The limit; None: `MOST_CONNECTIONS`."""
    idle_s: float | None = None
    """Seconds that a connection may wait for its next request; None: as for the first one, `HEAD_S`."""
    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        """Begin a connection, if there is room."""
        super().connection_made(transport)
        if len(self.connections) > (self.most or MOST_CONNECTIONS):
            transport.abort()
            return
        self.app_state = {**self.app_state, "abort": transport.abort}
        self._expect_head(HEAD_S)

    def handle_events(self) -> None:
        """Take what has arrived."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and self._head is not None:
            self._head.cancel()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._expect_head(self.idle_s or HEAD_S)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection."""
        if self._head is not None:
            self._head.cancel()
        super().connection_lost(exc)

    def _expect_head(self, within_s: float) -> None:
        if self._head is not None:
            self._head.cancel()
        self._head = self.loop.call_later(within_s, self.transport.abort)


class _QuietServer(uvicorn.Server):
    """uvicorn without signal handlers: the application owns the process's signals."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """HTTP on one port. Event loop only."""

    def __init__(
        self, app: ASGIApp, access: Access, *, name: Literal["http", "rest"] = "http", connections: int | None = None
    ) -> None:
        """Store the parts.

        Args:
            app: what serves requests, behind the check of callers.
            access: its certificates; None: no TLS.
            name: of the port, for metrics.
            connections: the most at a time; None: `MOST_CONNECTIONS`.
        """
        idle_s = REST_IDLE_S if name == "rest" else None
        config = uvicorn.Config(
            app,
            http=type("Protocol", (_BoundedProtocol,), {"most": connections, "idle_s": idle_s}),
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            h11_max_incomplete_event_size=MAX_METADATA_BYTES,
            timeout_keep_alive=round(idle_s or HEAD_S),
            timeout_graceful_shutdown=1,
        )
        config.load()
        if access.certificates is not None:
            config.ssl = _newest_context(access, access.certificates, name)
        self._config = config
        self._server = _QuietServer(config)
        self._serving: asyncio.Task[None] | None = None
        self._listener: socket.socket | None = None

    async def start(self, host: str, port: int, *, shared: bool = False) -> int:
        """Listen, and return the port. `shared`: other processes of this server listen on it too.

        Raises:
            PortUnavailable: The port is taken, or the address is not this machine's.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = self._listener = socket.create_server(
                (host, port), family=family, backlog=128, reuse_port=shared
            )
        except OSError:
            raise PortUnavailable(host, port) from None
        bound: int = listener.getsockname()[1]
        self._serving = asyncio.create_task(self._server.serve([listener]), name="http")
        return bound

    async def stop(self, grace_s: float = 1.0) -> None:
        """End, after at most `grace_s` for answers in progress."""
        self._config.timeout_graceful_shutdown = max(1, math.ceil(grace_s))
        self._server.should_exit = True
        if self._serving is not None:
            with suppress(asyncio.CancelledError):
                await self._serving
        for one in getattr(self._server, "servers", ()):  # uvicorn leaves them open if it is ended while it starts
            one.close()
        if self._listener is not None:
            self._listener.close()


def _newest_context(access: Access, first: Certificates, name: str) -> ssl.SSLContext:
    """Return a context that uses the newest certificates for each new connection."""
    used, context = first, first.context()

    def newest() -> ssl.SSLContext:
        nonlocal used, context
        current = access.certificates
        if current is not None and current is not used:
            used, context = current, current.context()
        return context

    return NewestContext(newest, access.handshakes[name].inc)


class Page(msgspec.Struct, frozen=True):
    """An answer of the HTTP port."""

    status: int
    media_type: str
    body: bytes


class Pages:
    """`/metrics`, `/livez` and `/readyz`. Event loop only."""

    def __init__(
        self,
        catalog: Catalog,
        health: Health,
        metrics: Metrics,
        alive: Callable[[], bool],
        collect: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Store the parts.

        Args:
            catalog: its models' states are in the body of `/readyz`.
            health: whether the server as a whole answers, which is the status of `/readyz`.
            metrics: the content of `/metrics`.
            alive: returns whether the server works, the status of `/livez`; an orchestrator restarts it if not.
            collect: updates `metrics` before each page; None: they need no update.
        """
        self._catalog, self._health, self._metrics = catalog, health, metrics
        self._alive, self._collect = alive, collect

    async def page(self, path: str, accept: str) -> Page:
        """Return the page of a path of `PATHS`. `accept`: the header of that name, for `/metrics`."""
        if path == "/livez":
            living = self._alive()
            return _json(200 if living else 503, {"status": "alive" if living else "faulted"})
        if path == "/readyz":
            return self._readiness()
        if self._collect is not None:
            await self._collect()
        encode, content_type = exposition.choose_encoder(accept)
        return Page(200, content_type, encode(self._metrics.registry))

    def _readiness(self) -> Page:
        ready = self._health.serving()
        models = [
            {"name": model.name, "version": model.version, "state": model.state.value, "reason": model.state_reason}
            for model in self._catalog.all()
        ]
        return _json(200 if ready else 503, {"status": "ready" if ready else "not ready", "models": models})


PATHS: Final = ("/metrics", "/livez", "/readyz")


def _json(status: int, content: object) -> Page:
    return Page(status, "application/json", msgspec.json.encode(content))


def routes(page: Callable[[str, str], Awaitable[Page]]) -> list[Route]:
    """Return the routes of `PATHS`. `page`: returns the page of a path for an `accept` header."""

    async def answer(request: Request) -> Response:
        found = await page(request.url.path, request.headers.get("accept", ""))
        return Response(found.body, found.status, media_type=found.media_type)

    return [Route(path, answer) for path in PATHS]
