"""`grpc.health.v1`: what load balancers ask. Which state each service is in is told by the application."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2

from attnserve_server.transport.boundary import Context, RpcMetrics, parsed, send
from attnserve_server.transport.wire import receive

SERVICE: Final = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
OVERALL: Final = ""
"""The service name that stands for the whole server."""
_SERVING: Final = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN: Final = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health:
    """The state of each service. Event loop only.

    It stands in place of grpcio-health-checking's own asyncio servicer, which drops all watchers of a service when one
    of them leaves, and answers malformed requests with UNKNOWN.
    """

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {OVERALL: False}
        self._changed = asyncio.Event()
        self._final = False
        self._closed = False

    def set(self, service: str, *, serving: bool) -> None:
        """Says whether `service` answers. Does nothing once the server drains."""
        if not self._final:
            self._serving[service] = serving
            self._tell()

    def drain(self) -> None:
        """Says of every service, for good, that it does not answer."""
        self._final = True
        self._serving = dict.fromkeys(self._serving, False)
        self._tell()

    def serving(self, service: str = OVERALL) -> bool:
        """Whether `service` answers."""
        return self._serving.get(service, False)

    def close(self) -> None:
        """Ends every watch, so that the server can stop."""
        self._closed = True
        self._tell()

    def _tell(self) -> None:
        # Watchers hold the event that they wait on: setting it wakes them all, and the next change has its own.
        self._changed.set()
        self._changed = asyncio.Event()

    async def check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """The state of one service; NOT_FOUND where there is none, as the health protocol says."""
        if request.service not in self._serving:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def watch(self, data: bytes, context: Context) -> None:
        """The state of one service now and at each change."""
        request = receive(health_pb2.HealthCheckRequest, data).message
        told = None
        while not self._closed:
            changed = self._changed
            status = self._status(request.service)
            if status != told:
                told = status
                if not await send(context, health_pb2.HealthCheckResponse(status=status).SerializeToString()):
                    return
            await changed.wait()

    def _status(self, service: str) -> Any:
        if service not in self._serving:
            return _UNKNOWN
        return _SERVING if self._serving[service] else _NOT_SERVING

    def handlers(self, metrics: RpcMetrics) -> grpc.GenericRpcHandler:
        """The service's methods on bytes, as gRPC wants them."""
        check: Any = metrics.measured("unary", SERVICE, "Check", parsed(health_pb2.HealthCheckRequest, self.check))
        watch: Any = metrics.measured("server_stream", SERVICE, "Watch", self.watch)
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Check": grpc.unary_unary_rpc_method_handler(check),
                "Watch": grpc.unary_stream_rpc_method_handler(watch),
            },
        )
