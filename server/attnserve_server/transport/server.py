"""The gRPC server: the methods of the inference service, and the port, limits and handlers that serve them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any, Final
from uuid import uuid4

import grpc
from attnserve.v1 import inference_service_pb2

from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import AttnserveError
from attnserve_server.observability.metrics import Metrics
from attnserve_server.scheduling.queue import Request
from attnserve_server.transport.boundary import Context, Failure, RpcMetrics, parsed, remaining_s
from attnserve_server.transport.dataplane import DataPlane
from attnserve_server.transport.health import Health
from attnserve_server.transport.stream import Streams
from attnserve_server.transport.validation import check_request_id
from attnserve_server.transport.wire import receive

SERVICE: Final = inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
MAX_METADATA_BYTES: Final = 16 * 1024
MAX_PENDING_RPCS: Final = 65_536
"""RPCs that gRPC has received and not yet passed on. At its default of 1,000 it cancels part of a burst without a
reason; admission refuses with a reason and a retry delay."""
_PROCESS: Final = uuid4().hex[:16]
_NUMBERS: Final = count()
"""Requests without an id are named by the process and a number: a random id for each would cost a system call."""


class PortUnavailable(AttnserveError):
    """The address cannot be listened on."""

    reason = "PORT_UNAVAILABLE"

    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"cannot listen on {host}:{port}: the port is taken, or the address is not this machine's")


class InferenceServicer:
    """`attnserve.v1.InferenceService`. Event loop only."""

    def __init__(self, plane: DataPlane, streams: Streams, clock: Clock) -> None:
        self._plane = plane
        self._streams = streams
        self._clock = clock

    async def infer(self, data: bytes, context: Context) -> bytes:
        """Answer one request: an InferRequest and an InferResponse, serialized."""
        received = receive(inference_service_pb2.InferRequest, data)
        remaining = remaining_s(context)
        deadline_s = None if remaining is None else self._clock.now() + remaining
        request_id = received.message.request_id
        if request_id:
            check_request_id(request_id)
        else:
            request_id = f"{_PROCESS}{next(_NUMBERS):016x}"
        try:
            with Request(request_id, deadline_s, received.size) as request:
                prepared = await self._plane.prepare(request, received)
                answer = await self._plane.run(prepared)
            return answer.joined()
        except Exception as error:
            raise Failure(request_id, error) from error

    async def list_models(
        self, _: inference_service_pb2.ListModelsRequest, __: Context
    ) -> inference_service_pb2.ListModelsResponse:
        """Return all models."""
        return inference_service_pb2.ListModelsResponse(models=self._plane.models())

    async def get_model(
        self, request: inference_service_pb2.GetModelRequest, _: Context
    ) -> inference_service_pb2.GetModelResponse:
        """Return one model."""
        return inference_service_pb2.GetModelResponse(model=self._plane.model(request.model, request.version))

    def handlers(self, metrics: RpcMetrics) -> grpc.GenericRpcHandler:
        """Return the service's methods as gRPC handlers on bytes."""
        unary: Mapping[str, Any] = {
            "Infer": self.infer,
            "ListModels": parsed(inference_service_pb2.ListModelsRequest, self.list_models),
            "GetModel": parsed(inference_service_pb2.GetModelRequest, self.get_model),
        }
        methods: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(metrics.measured("unary", SERVICE, name, call))
            for name, call in unary.items()
        }
        methods["StreamInfer"] = grpc.stream_stream_rpc_method_handler(
            metrics.measured("bidi_stream", SERVICE, "StreamInfer", self._streams.stream_infer)
        )
        return grpc.method_handlers_generic_handler(SERVICE, methods)


class GrpcServer:
    """gRPC on one port. Event loop only."""

    def __init__(self, settings: Settings, plane: DataPlane, health: Health, metrics: Metrics, clock: Clock) -> None:
        self._settings = settings
        self._streams = Streams(plane, clock, settings)
        rpc_metrics = RpcMetrics(metrics, clock)
        servicer = InferenceServicer(plane, self._streams, clock)
        self._server = grpc.aio.server(options=_options(settings))
        self._server.add_generic_rpc_handlers((servicer.handlers(rpc_metrics), health.handlers(rpc_metrics)))

    async def start(self) -> int:
        """Listen, and return the port.

        Raises:
            PortUnavailable: The port is taken, or the address is not this machine's.
        """
        host, port = self._settings.host, self._settings.grpc_port
        try:
            bound = self._server.add_insecure_port(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        except RuntimeError:
            raise PortUnavailable(host, port) from None
        await self._server.start()
        return bound

    def drain(self) -> None:
        """End every stream once its requests under way have been answered."""
        self._streams.drain()

    async def stop(self, grace_s: float) -> None:
        """Take no more RPCs, wait `grace_s` for those under way, and cancel the rest."""
        await self._server.stop(grace_s)


def _options(settings: Settings) -> list[tuple[str, int]]:
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
        ("grpc.so_reuseport", 0),
    ]
