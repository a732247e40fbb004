"""The gRPC server: its port, its limits, and the handlers that it serves. What the methods do is in the servicers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import grpc
from attnserve.oip import open_inference_pb2

from attnserve_server.access.guard import Access
from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import AttnserveError
from attnserve_server.engine.resting import Trimmer
from attnserve_server.observability.metrics import Metrics
from attnserve_server.observability.spec import CONNECTIONS_DROPPED, UNREAD_BYTES
from attnserve_server.transport.admin import ModelServicer
from attnserve_server.transport.dataplane import DataPlane
from attnserve_server.transport.health import Health
from attnserve_server.transport.identity import IdentifiedHandlers
from attnserve_server.transport.oip.servicer import OipServicer
from attnserve_server.transport.oip.stream import OipStream
from attnserve_server.transport.receiving import BoundedHandlers, ReceiveBounds
from attnserve_server.transport.reflection import reflecting
from attnserve_server.transport.rpc import Streams
from attnserve_server.transport.servicer import InferenceServicer
from attnserve_server.transport.sockets import Connections
from attnserve_server.transport.stream import InferStream
from attnserve_server.transport.traced import rpcs_of
from attnserve_server.transport.unread import Unread
from attnserve_server.transport.who import GuardedHandlers, server_credentials

MAX_METADATA_BYTES: Final = 16 * 1024
MAX_PENDING_RPCS: Final = 65_536
"""RPCs that gRPC has received and not yet passed on. At its default of 1,000 it cancels part of a burst without a
reason (findings/grpc_server_pending_limit.sh); admission refuses with a reason and a retry delay."""

HANDSHAKE_MS: Final = 10_000
"""Time that a connection has for its handshakes, those of TLS and HTTP/2. gRPC's default is two minutes."""
PING_TIMEOUT_MS: Final = 5_000
"""Time for the answer to a ping. Beyond it the peer is dead, and its calls end."""


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
        models: ModelServicer | None = None,
    ) -> None:
        """Store the parts.

        Args:
            settings: of the server.
            plane: runs requests.
            health: answers grpc.health.v1.
            metrics: of the server.
            clock: of the server.
            access: who may call.
            shared_port: other processes of this server listen on the port too.
            models: answers ModelService; None: it is not served.
        """
        self._settings = settings
        dropped = metrics.counter(CONNECTIONS_DROPPED)
        self._connections = Connections(lambda cause: dropped.labels(cause).inc())
        self.unread = Unread(settings.max_unread_bytes, settings.unread_timeout_s, clock, self._connections.drop)
        metrics.gauge(UNREAD_BYTES).labels().set_function(lambda: self.unread.bytes)
        self._streams = Streams(InferStream, plane, clock, settings, self.unread)
        self._metrics = rpcs_of(metrics, clock, plane)
        self._servicer = InferenceServicer(
            plane, self._streams.stream_infer, clock, settings.call_timeout_s, self.unread, settings.max_queue_size
        )
        self._oip_streams = Streams(OipStream, plane, clock, settings, self.unread)
        self._oip = OipServicer(
            *(plane, health, self._oip_streams.stream_infer, clock, settings.call_timeout_s, self.unread, models)
        )
        self._handlers: tuple[grpc.GenericRpcHandler, ...] = (
            *(one.handlers(self._metrics) for one in (self._servicer, self._oip, health)),
        )
        if models is not None:
            self._handlers += (models.handlers(self._metrics),)
        if settings.reflection:
            named: Sequence[Any] = self._handlers  # each is of one service
            self._handlers += reflecting(
                [one.service_name() for one in named], self._metrics, [open_inference_pb2.DESCRIPTOR.pool]
            )
        if access.guard is not None:
            self._handlers = (GuardedHandlers(access.guard, self._handlers, self._metrics),)
        self._access = access
        self._shared_port = shared_port
        self._server: grpc.aio.Server | None = None
        self._trimmer = Trimmer(clock)

    async def start(self, bounds: ReceiveBounds) -> int:
        """Listen, and return the port. `bounds`: of the messages that callers send.

        Raises:
            PortUnavailable: The port is taken, or the address is not this machine's.
        """
        host, port = self._settings.host, self._settings.grpc_port
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        credentials = server_credentials(self._access)
        options = _options(self._settings, bounds, shared_port=self._shared_port)
        server = self._server = grpc.aio.server(options=options)
        follow = (self._servicer.follow, self._oip.follow)
        bounded = BoundedHandlers(bounds, self._handlers, self._metrics, follow, self._connections.drop)
        server.add_generic_rpc_handlers((IdentifiedHandlers(bounded),))
        try:
            if credentials is None:
                bound = server.add_insecure_port(address)
            else:
                bound = server.add_secure_port(address, credentials)
        except RuntimeError:
            raise PortUnavailable(host, port) from None
        await server.start()
        self._trimmer.start()
        self._connections.port = bound
        return bound

    def drain(self) -> None:
        """End every stream once its requests have been answered."""
        self._streams.drain()
        self._oip_streams.drain()

    async def stop(self, grace_s: float) -> None:
        """Take no more RPCs, wait `grace_s` for those in progress, and cancel the rest."""
        self._trimmer.close()
        if self._server is not None:
            await self._server.stop(grace_s)
        self.unread.close()


def _options(settings: Settings, bounds: ReceiveBounds, *, shared_port: bool) -> list[tuple[str, int]]:
    # Without these, gRPC expands a message before any limit applies. It refuses others with UNIMPLEMENTED.
    refuse_compression = [("grpc.compression_enabled_algorithms_bitset", 1), ("grpc.per_message_decompression", 0)]
    return [
        *([] if settings.accept_compression else refuse_compression),
        ("grpc.max_receive_message_length", bounds.message),
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.max_concurrent_streams", settings.max_streams_per_connection),
        # With it, gRPC refuses most calls of a client that keeps to the limit (findings/grpc_stream_limit_refuses.sh).
        ("grpc.http.overload_protection", 0),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        # Answers are bounded before they are computed, by `max_response_bytes`.
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.server.max_pending_requests", MAX_PENDING_RPCS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_RPCS),
        ("grpc.keepalive_time_ms", round(settings.keepalive_s * 1000)),
        # gRPC waits ping_timeout for the answer to a ping, and ignores keepalive_timeout
        # (findings/grpc_keepalive_timeout_ignored.sh).
        ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
        # Callers may ping between calls, so that they notice a dead server before the next call.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", round(settings.keepalive_min_interval_s * 1000)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", round(settings.keepalive_min_interval_s * 1000)),
        # A second server on the port must fail to start instead of taking half of the connections.
        ("grpc.so_reuseport", int(shared_port)),
        ("grpc.enable_channelz", int(settings.reflection)),
    ]
