"""Spans of calls over gRPC and HTTP, with `--tracing` only; those of their requests are in `traced_plane`.

Each class here wraps one that traces nothing: calls of a server without `--tracing` pass no code of this module.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, TypeVar

import grpc
import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock
from attnserve_server.observability.metrics import RPC_SECONDS, Metrics
from attnserve_server.observability.spec import HTTP_SECONDS
from attnserve_server.observability.trace_context import CALL
from attnserve_server.scheduling.catalog import Catalog
from attnserve_server.transport.audited import AuditedPlane
from attnserve_server.transport.dataplane import DataPlane
from attnserve_server.transport.rpc import Context, remaining_s
from attnserve_server.transport.servicer import Failure, RpcMetrics, aborted_with
from attnserve_server.transport.status import name_of_code
from attnserve_server.transport.traced_plane import SERVER_FAULTS, TRACE, TracedPlane

if TYPE_CHECKING:
    from attnserve_server.observability.audit import Audit
    from attnserve_server.observability.tracing import Trace, Tracing

T = TypeVar("T")

_CODE: Final[ContextVar[str]] = ContextVar("attnserve_code", default="OK")
"""The status of the call whose task this is, once its handler has failed."""
_EMBEDDINGS: Final = "/v1/embeddings"


class TracedRpcs(RpcMetrics):
    """Counts RPCs, and gives each a span, but for those about the server itself, such as health checks."""

    def __init__(self, metrics: Metrics, clock: Clock, tracing: Tracing) -> None:
        """As `RpcMetrics`. `tracing`: takes the spans."""
        super().__init__(metrics, clock)
        self._tracing = tracing

    def measured(
        self, kind: str, service: str, method: str, call: Callable[[Any, Context], Awaitable[Any]]
    ) -> Callable[[Any, Context], Awaitable[Any]]:
        """Return `call` with counters and a span, as `RpcMetrics.measured`."""
        if service.startswith("grpc."):
            return super().measured(kind, service, method, call)

        async def noted(request: Any, context: Context) -> Any:
            try:
                return await call(request, context)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                # Known here only: a call that has ended on the caller's side is not aborted with its code.
                cause = error.error if isinstance(error, Failure) else error
                _CODE.set(name_of_code(cause, remaining_s(context)))
                raise

        plain = super().measured(kind, service, method, noted)
        name = f"{service}/{method}"
        named = {"rpc.system.name": "grpc", "rpc.method": name}
        seconds = self._metrics.histogram(RPC_SECONDS).labels(kind, service, method)
        tracing, clock = self._tracing, self._clock

        async def traced(request: Any, context: Context) -> Any:
            trace = tracing.begin(name, named, CALL.get())
            if trace is None:
                return await plain(request, context)
            _enter(trace)
            trace.streams = kind == "bidi_stream"
            began_s = clock.now()
            code = "CANCELLED"
            try:
                answer = await plain(request, context)
                code = _CODE.get()
                return answer  # noqa: TRY300 - the branches below end otherwise
            except asyncio.CancelledError as error:
                code = name_of_code(error, remaining_s(context))
                raise
            except grpc.aio.AbortError:
                code = aborted_with(context)
                raise
            finally:
                facts = {"rpc.response.status_code": code}
                tracing.end(trace, facts, "" if code == "OK" else code, failed=code in SERVER_FAULTS)
                seconds.exemplify(clock.now() - began_s, trace.trace_id)

        return traced


class TracedEndpoint:
    """An endpoint of REST, with a span for each request. Event loop only."""

    def __init__(
        self, inner: ASGIApp, method: str, path: str, metrics: Metrics, clock: Clock, tracing: Tracing
    ) -> None:
        """Store the parts; `method` and `path` are of the endpoint."""
        self._inner = inner
        self._name = f"{method} {path}"
        self._named = {"http.request.method": method, "http.route": path}
        if path == _EMBEDDINGS:
            self._named["gen_ai.operation.name"] = "embeddings"
        self._seconds = metrics.histogram(HTTP_SECONDS).labels(path)
        self._clock = clock
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        named = {**self._named, "url.scheme": scope["scheme"], "url.path": scope["path"]}
        trace = self._tracing.begin(self._name, named, CALL.get())
        if trace is None:
            await self._inner(scope, receive, send)
            return
        _enter(trace)
        began_s, status = self._clock.now(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._inner(scope, receive, noted)
        finally:
            error = "cancelled" if not status else str(status) if status >= 500 else ""
            facts = {"http.response.status_code": status} if status else {}
            self._tracing.end(trace, facts, error, failed=status >= 500)
            self._seconds.exemplify(self._clock.now() - began_s, trace.trace_id)


def _enter(trace: Trace) -> None:
    """Let a trace hold for this task, and for the lines that it logs."""
    TRACE.set(trace)
    structlog.contextvars.bind_contextvars(trace_id=trace.trace_id)


def plane_of(
    catalog: Catalog, settings: Settings, clock: Clock, tracing: Tracing | None, audit: Audit | None = None
) -> DataPlane:
    """Return the data plane of a process. `tracing`, `audit`: take spans and audit lines; None: there are none."""
    if audit is not None:
        if tracing is not None:
            return AuditedTracedPlane(catalog, settings, clock, tracing, audit=audit)
        return AuditedPlane(catalog, settings, clock, audit=audit)
    return DataPlane(catalog, settings, clock) if tracing is None else TracedPlane(catalog, settings, clock, tracing)


class AuditedTracedPlane(AuditedPlane, TracedPlane):
    """A data plane that writes audit lines, and adds spans."""


def rpcs_of(metrics: Metrics, clock: Clock, plane: DataPlane) -> RpcMetrics:
    """Return what counts the RPCs of a process."""
    return RpcMetrics(metrics, clock) if plane.tracing is None else TracedRpcs(metrics, clock, plane.tracing)


def endpoint_of(inner: ASGIApp, method: str, path: str, metrics: Metrics, clock: Clock, plane: DataPlane) -> ASGIApp:
    """Return an endpoint of REST as it is served."""
    if plane.tracing is None:
        return inner
    return TracedEndpoint(inner, method, path, metrics, clock, plane.tracing)
