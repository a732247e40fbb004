"""The gRPC server: its port, its limits, and the handlers that it serves. What the methods do is in the servicers."""

from __future__ import annotations

from typing import Final

import grpc

from attnserve_server.access.guard import Access
from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import AttnserveError
from attnserve_server.observability.metrics import Metrics
from attnserve_server.transport.dataplane import DataPlane
from attnserve_server.transport.health import Health
from attnserve_server.transport.servicer import InferenceServicer, RpcMetrics
from attnserve_server.transport.stream import Streams
from attnserve_server.transport.who import GuardedHandlers, server_credentials

MAX_METADATA_BYTES: Final = 16 * 1024
MAX_PENDING_RPCS: Final = 65_536
"""RPCs that gRPC has received and not yet passed on. At its default of 1,000 it cancels part of a burst without a
reason (findings/grpc_server_pending_limit.sh); admission refuses with a reason and a retry delay."""


class PortUnavailable(AttnserveError):
    """The address cannot be listened on."""

    reason = "PORT_UNAVAILABLE"

    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"cannot listen on {host}:{port}: the port is taken, or the address is not this machine's")


class GrpcServer:
    """gRPC on one port: `plane` runs requests, and `health` answers grpc.health.v1. Event loop only."""

    def __init__(
        self,
        settings: Settings,
        plane: DataPlane,
        health: Health,
        metrics: Metrics,
        clock: Clock,
        access: Access,
        *,
        shared_port: bool = False,
    ) -> None:
        """Store the parts. `shared_port`: other processes of this server listen on the port too."""
        self._settings = settings
        self._streams = Streams(plane, clock, settings)
        rpc_metrics = RpcMetrics(metrics, clock)
        servicer = InferenceServicer(plane, self._streams.stream_infer, clock)
        self._server = grpc.aio.server(options=_options(settings, shared_port=shared_port))
        handlers: tuple[grpc.GenericRpcHandler, ...] = servicer.handlers(rpc_metrics), health.handlers(rpc_metrics)
        if access.guard is not None:
            handlers = (GuardedHandlers(access.guard, handlers, rpc_metrics),)
        self._server.add_generic_rpc_handlers(handlers)
        self._access = access

    async def start(self) -> int:
        """Listen, and return the port.

        Raises:
            PortUnavailable: The port is taken, or the address is not this machine's.
        """
        host, port = self._settings.host, self._settings.grpc_port
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        credentials = server_credentials(self._access)
        try:
            if credentials is None:
                bound = self._server.add_insecure_port(address)
            else:
                bound = self._server.add_secure_port(address, credentials)
        except RuntimeError:
            raise PortUnavailable(host, port) from None
        await self._server.start()
        return bound

    def drain(self) -> None:
        """End every stream once its requests have been answered."""
        self._streams.drain()

    async def stop(self, grace_s: float) -> None:
        """Take no more RPCs, wait `grace_s` for those in progress, and cancel the rest."""
        await self._server.stop(grace_s)


def _options(settings: Settings, *, shared_port: bool) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", settings.max_request_bytes),
        # Answers are bounded before they are computed, by `max_response_bytes`.
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.server.max_pending_requests", MAX_PENDING_RPCS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_RPCS),
        ("grpc.keepalive_time_ms", round(settings.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", 20_000),
        # Callers may ping between calls, so that they notice a dead server before the next call.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", round(settings.keepalive_min_interval_s * 1000)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", round(settings.keepalive_min_interval_s * 1000)),
        # A second server on the port must fail to start instead of taking half of the connections.
        ("grpc.so_reuseport", int(shared_port)),
    ]
