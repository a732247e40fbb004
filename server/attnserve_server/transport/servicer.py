"""The inference service's methods: each names its request, calls the data plane and lets the boundary tell failures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import grpc
from attnserve.v1 import inference_service_pb2

from attnserve_server.domain.clock import Clock
from attnserve_server.transport.boundary import Context, Failure, RpcMetrics, parsed, remaining_s
from attnserve_server.transport.dataplane import DataPlane, name_of
from attnserve_server.transport.stream import Streams
from attnserve_server.transport.wire import parse_in_place

SERVICE: Final = inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name


class InferenceServicer:
    """`attnserve.v1.InferenceService`. Event loop only."""

    def __init__(self, plane: DataPlane, streams: Streams, clock: Clock) -> None:
        self._plane = plane
        self._streams = streams
        self._clock = clock

    async def infer(self, data: bytes, context: Context) -> bytes:
        """One request, one answer: an InferRequest and an InferResponse, serialised."""
        request, blobs = parse_in_place(inference_service_pb2.InferRequest, data)
        remaining = remaining_s(context)
        deadline = None if remaining is None else self._clock.now() + remaining
        request_id = name_of(request.request_id)
        try:
            return (await self._plane.infer(request, request_id, deadline, len(data), blobs)).joined()
        except Exception as error:
            raise Failure(request_id, error) from error

    async def list_models(
        self, _: inference_service_pb2.ListModelsRequest, __: Context
    ) -> inference_service_pb2.ListModelsResponse:
        """All models."""
        return inference_service_pb2.ListModelsResponse(models=self._plane.models())

    async def get_model(
        self, request: inference_service_pb2.GetModelRequest, _: Context
    ) -> inference_service_pb2.GetModelResponse:
        """One model."""
        return inference_service_pb2.GetModelResponse(model=self._plane.model(request.model, request.version))

    def handlers(self, metrics: RpcMetrics) -> grpc.GenericRpcHandler:
        """The service's methods on bytes, as gRPC wants them."""
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
