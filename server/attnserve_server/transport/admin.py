"""The RPC handlers of `attnserve.v1.ModelService`, and the port through which they change models. Event loop only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Protocol

import grpc
from attnserve.v1 import model_service_pb2

from attnserve_server.domain.errors import InvalidRequest
from attnserve_server.scheduling.catalog import ServedModel
from attnserve_server.transport.dataplane import DataPlane
from attnserve_server.transport.rpc import Context
from attnserve_server.transport.servicer import RpcMetrics, parsed
from attnserve_server.transport.validation import check_model_reference

SERVICE: Final = model_service_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name
METHODS: Final = ("LoadModel", "UnloadModel", "ReloadRepository")


class Outcome(StrEnum):
    """What became of one version."""

    LOADED = "loaded"
    REPLACED = "replaced"
    UNLOADED = "unloaded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Change:
    """What became of one version, and why if it failed."""

    name: str
    version: str
    outcome: Outcome
    reason: str = ""


class Lifecycle(Protocol):
    """Loads and unloads models while the server runs.

    A change that has begun goes on if its caller is cancelled. Requests in progress end on the model that they began
    with.
    """

    async def load(self, name: str, version: str = "") -> ServedModel:
        """Return a version that is ready, loaded if it was not; without a version, the highest of the repository.

        Raises:
            ModelNotFound: The repository has none of that name, or not this version.
            ModelFailed: It could not be loaded. If it served before, its earlier files still do.
        """
        ...

    async def unload(self, name: str, version: str) -> None:
        """Take no more requests for a version, wait for those in progress, and free it.

        Raises:
            ModelNotFound: The server does not hold it.
        """
        ...

    async def reload(self) -> Sequence[Change]:
        """Load what is new, changed or failed before, unload what was removed, and return what was changed.

        Raises:
            RepositoryUnusable: It cannot be read, or has no bundle.
        """
        ...


class ModelServicer:
    """`attnserve.v1.ModelService`. Event loop only."""

    def __init__(self, plane: DataPlane, lifecycle: Lifecycle) -> None:
        self._plane = plane
        self.lifecycle = lifecycle

    async def load_model(
        self, request: model_service_pb2.LoadModelRequest, _: Context
    ) -> model_service_pb2.LoadModelResponse:
        """Load a version, and describe it."""
        check_model_reference(request.model, request.version)
        served = await self.lifecycle.load(request.model, request.version)
        return model_service_pb2.LoadModelResponse(model=self._plane.model(served.name, served.version))

    async def unload_model(
        self, request: model_service_pb2.UnloadModelRequest, _: Context
    ) -> model_service_pb2.UnloadModelResponse:
        """Unload a version."""
        check_model_reference(request.model, request.version)
        if not request.version:
            raise InvalidRequest.of("version", "empty; name the version to unload, as `ListModels` returns it")
        await self.lifecycle.unload(request.model, request.version)
        return model_service_pb2.UnloadModelResponse()

    async def reload_repository(
        self, _: model_service_pb2.ReloadRepositoryRequest, __: Context
    ) -> model_service_pb2.ReloadRepositoryResponse:
        """Compare the repository with what is loaded."""
        return model_service_pb2.ReloadRepositoryResponse(
            changes=[
                model_service_pb2.ModelChange(
                    model=change.name, version=change.version, outcome=_OUTCOMES[change.outcome], reason=change.reason
                )
                for change in await self.lifecycle.reload()
            ]
        )

    def handlers(self, metrics: RpcMetrics) -> grpc.GenericRpcHandler:
        """Return the service's methods as gRPC handlers on bytes."""
        calls: Mapping[str, Any] = {
            "LoadModel": parsed(model_service_pb2.LoadModelRequest, self.load_model),
            "UnloadModel": parsed(model_service_pb2.UnloadModelRequest, self.unload_model),
            "ReloadRepository": parsed(model_service_pb2.ReloadRepositoryRequest, self.reload_repository),
        }
        methods: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(metrics.measured("unary", SERVICE, name, call))
            for name, call in calls.items()
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)


_OUTCOMES: Final = {
    Outcome.LOADED: model_service_pb2.MODEL_OUTCOME_LOADED,
    Outcome.REPLACED: model_service_pb2.MODEL_OUTCOME_REPLACED,
    Outcome.UNLOADED: model_service_pb2.MODEL_OUTCOME_UNLOADED,
    Outcome.FAILED: model_service_pb2.MODEL_OUTCOME_FAILED,
}
