"""`grpc.health.v1`, which load balancers query. The application sets the state of each service.

Malformed requests raise InvalidRequest, which ends the call with INVALID_ARGUMENT.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2

from attnserve_server.transport.rpc import Context
from attnserve_server.transport.servicer import RpcMetrics, parsed, receive_aside, send

SERVICE: Final = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
OVERALL: Final = ""
"""The service name of the whole server."""
_SERVING: Final = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN: Final = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health:
    """The state of each service. Event loop only.

    It replaces the asyncio servicer of grpcio-health-checking, which drops all watchers of a service when one of them
    leaves, and answers malformed requests with UNKNOWN.
    """

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {OVERALL: False}
        self._changed = asyncio.Event()
        self._final = False
        self._closed = False

    def set(self, service: str, *, serving: bool) -> None:
        """Set whether `service` answers. Has no effect once the server drains."""
        if not self._final:
            self._serving[service] = serving
            self._notify()

    def forget(self, service: str) -> None:
        """Remove a service: it is unknown from now on."""
        self._serving.pop(service, None)
        self._notify()

    def drain(self) -> None:
        """Set every service to not serving, for good."""
        self._final = True
        self._serving = dict.fromkeys(self._serving, False)
        self._notify()

    def serving(self, service: str = OVERALL) -> bool:
        """Return whether `service` answers."""
        return self._serving.get(service, False)

    def close(self) -> None:
        """End every watch, so that the server can stop."""
        self._closed = True
        self._notify()

    def _notify(self) -> None:
        # Setting the event wakes all watchers, which hold it; the next change has a new one.
        self._changed.set()
        self._changed = asyncio.Event()

    async def check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """Return the state of one service; an unknown one is NOT_FOUND, as the health protocol requires."""
        if request.service not in self._serving:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def watch(self, data: bytes, context: Context) -> None:
        """Send the state of one service now and at each change."""
        request = (await receive_aside(health_pb2.HealthCheckRequest, data)).message
        sent = None
        while not self._closed:
            changed = self._changed
            status = self._status(request.service)
            if status != sent:
                sent = status
                if not await send(context, health_pb2.HealthCheckResponse(status=status).SerializeToString()):
                    return
            await changed.wait()

    def _status(self, service: str) -> Any:
        if service not in self._serving:
            return _UNKNOWN
        return _SERVING if self._serving[service] else _NOT_SERVING

    def handlers(self, metrics: RpcMetrics) -> grpc.GenericRpcHandler:
        """Return the service's methods as gRPC handlers on bytes."""
        check: Any = metrics.measured("unary", SERVICE, "Check", parsed(health_pb2.HealthCheckRequest, self.check))
        watch: Any = metrics.measured("server_stream", SERVICE, "Watch", self.watch)
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Check": grpc.unary_unary_rpc_method_handler(check),
                "Watch": grpc.unary_stream_rpc_method_handler(watch),
            },
        )
