"""The gRPC methods of `inference.GRPCInferenceService` but its stream, which is in `stream`. Event loop only."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
from attnserve.oip import open_inference_pb2 as oip

from attnserve_server.access.guard import CALLER
from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import InvalidRequest, quoted
from attnserve_server.scheduling.queue import Request
from attnserve_server.transport.admin import ModelServicer
from attnserve_server.transport.dataplane import DataPlane
from attnserve_server.transport.health import Health
from attnserve_server.transport.oip import calls, describe, repository
from attnserve_server.transport.oip.messages import encoded, wanted_of
from attnserve_server.transport.oip.usual import usual_of
from attnserve_server.transport.rpc import Context, UnaryCalls, remaining_s, turns_of
from attnserve_server.transport.servicer import Failure, RpcMetrics, parsed, receive_aside
from attnserve_server.transport.timings import Clocked
from attnserve_server.transport.unread import Unread
from attnserve_server.transport.validation import check_request_id

SERVICE: Final = oip.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
INFER: Final = "ModelInfer"
STREAM: Final = "ModelStreamInfer"
METHODS: Final = tuple(method.name for method in oip.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods)


class OipServicer(UnaryCalls):
    """The protocol over gRPC. `models`: whose lifecycle loads and unloads; None without `--admin`. Event loop only."""

    def __init__(
        self,
        plane: DataPlane,
        health: Health,
        stream_infer: Callable[[object, Context], Awaitable[None]],
        clock: Clock,
        call_timeout_s: float,
        unread: Unread,
        models: ModelServicer | None,
    ) -> None:
        """Store the parts; `stream_infer` serves one stream. `call_timeout_s`: of a call without a deadline."""
        super().__init__(plane, clock, call_timeout_s, unread)
        self._health = health
        self._stream_infer = stream_infer
        self._models = models

    async def _infer(self, data: bytes, context: Context) -> bytes:
        received = await receive_aside(oip.ModelInferRequest, data)
        message = received.message
        own_id = message.id
        if own_id:
            check_request_id(own_id)
        request_id = own_id or calls.new_id()
        remaining = remaining_s(context)
        now = self._clock.now()
        deadline_s = now + (self._call_timeout_s if remaining is None else remaining)
        caller = CALLER.get()
        request = Request(request_id, deadline_s, received.size, turns_of(context, caller))
        try:
            wanted = usual_of(received) or wanted_of(received)
            if wanted.parameters.timeout_s is not None:
                request.deadline_s = min(deadline_s, now + wanted.parameters.timeout_s)
            name, version = message.model_name, message.model_version
            call = await calls.prepare(self._plane, request, caller, wanted, name, version, INFER)
            held = self._hold(context, call.prepared, call.bytes)

            def encode(model: str, version: str, outputs: list[Any], timings: Clocked) -> bytes:
                return encoded(model, version, own_id, outputs, timings).joined()

            answer = await call.run(encode)
            if held is not None:
                held.sent()
            return answer  # noqa: TRY300 - the branches below end otherwise
        except Exception as error:
            request.fail(error)
            raise Failure(request_id, error) from error
        except asyncio.CancelledError as error:
            request.fail(error)
            raise

    async def server_live(self, _: oip.ServerLiveRequest, __: Context) -> oip.ServerLiveResponse:
        """Return that the process answers."""
        return oip.ServerLiveResponse(live=True)

    async def server_ready(self, _: oip.ServerReadyRequest, __: Context) -> oip.ServerReadyResponse:
        """Return whether the server as a whole is ready."""
        return oip.ServerReadyResponse(ready=self._health.serving())

    async def model_ready(self, request: oip.ModelReadyRequest, _: Context) -> oip.ModelReadyResponse:
        """Return whether one model is ready."""
        served, _reader = self._plane.described(request.name, request.version)
        return oip.ModelReadyResponse(ready=describe.is_ready(served))

    async def server_metadata(self, _: oip.ServerMetadataRequest, __: Context) -> oip.ServerMetadataResponse:
        """Name the server and its extensions."""
        return describe.server()

    async def model_metadata(self, request: oip.ModelMetadataRequest, context: Context) -> oip.ModelMetadataResponse:
        """Describe one model's inputs and outputs."""
        return describe.metadata(self._plane, request.name, request.version, virtual=_lists_virtual(context))

    async def model_config(self, request: oip.ModelConfigRequest, context: Context) -> oip.ModelConfigResponse:
        """Describe one model in the form of Triton's configuration."""
        found = describe.config(self._plane, request.name, request.version, virtual=_lists_virtual(context))
        return oip.ModelConfigResponse(config=found)

    async def model_statistics(self, request: oip.ModelStatisticsRequest, _: Context) -> oip.ModelStatisticsResponse:
        """Return counts and times of requests."""
        return describe.statistics(self._plane, request.name, request.version, self._clock.now())

    async def repository_index(self, request: oip.RepositoryIndexRequest, _: Context) -> oip.RepositoryIndexResponse:
        """List the models."""
        _check_repository(request.repository_name)
        return describe.index(self._plane, ready=request.ready)

    async def load(self, request: oip.RepositoryModelLoadRequest, _: Context) -> oip.RepositoryModelLoadResponse:
        """Load the highest version of a model."""
        _check_repository(request.repository_name)
        await repository.load(self._models, request.model_name, request.parameters)
        return oip.RepositoryModelLoadResponse()

    async def unload(self, request: oip.RepositoryModelUnloadRequest, _: Context) -> oip.RepositoryModelUnloadResponse:
        """Unload all versions of a model."""
        _check_repository(request.repository_name)
        await repository.unload(self._models, self._plane, request.model_name, request.parameters)
        return oip.RepositoryModelUnloadResponse()

    def handlers(self, metrics: RpcMetrics) -> grpc.GenericRpcHandler:
        """Return the service's methods as gRPC handlers on bytes."""
        unary: dict[str, Any] = {
            INFER: self.infer,
            "ServerLive": parsed(oip.ServerLiveRequest, self.server_live),
            "ServerReady": parsed(oip.ServerReadyRequest, self.server_ready),
            "ServerMetadata": parsed(oip.ServerMetadataRequest, self.server_metadata),
            "ModelReady": parsed(oip.ModelReadyRequest, self.model_ready),
            "ModelMetadata": parsed(oip.ModelMetadataRequest, self.model_metadata),
            "ModelConfig": parsed(oip.ModelConfigRequest, self.model_config),
            "ModelStatistics": parsed(oip.ModelStatisticsRequest, self.model_statistics),
            "RepositoryIndex": parsed(oip.RepositoryIndexRequest, self.repository_index),
            "RepositoryModelLoad": parsed(oip.RepositoryModelLoadRequest, self.load),
            "RepositoryModelUnload": parsed(oip.RepositoryModelUnloadRequest, self.unload),
        }
        methods: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(metrics.measured("unary", SERVICE, name, call))
            for name, call in unary.items()
        }
        methods[STREAM] = grpc.stream_stream_rpc_method_handler(
            metrics.measured("bidi_stream", SERVICE, STREAM, self._stream_infer)
        )
        return grpc.method_handlers_generic_handler(SERVICE, methods)


def _lists_virtual(context: Context) -> bool:
    return describe.OWN_OUTPUTS not in (context.invocation_metadata() or ())


def _check_repository(name: str) -> None:
    if name:
        raise InvalidRequest.of("repository_name", f"{quoted(name)}; the server has one repository: leave it empty")
