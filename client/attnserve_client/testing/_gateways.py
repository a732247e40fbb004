"""What the fake server answers to gateways: a load, and no tokenizer, because it has no file of one."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import grpc
from attnserve.v1 import inference_service_pb2 as wire
from attnserve.v1 import inference_service_pb2_grpc, model_pb2


def load_of(model: str) -> wire.ModelLoad:
    """Return the load of an idle model."""
    ready = model_pb2.MODEL_STATE_READY
    return wire.ModelLoad(model=model, version="1", state=ready, instances=1, predicted_wait_seconds=0.0)


class GatewayMethods(inference_service_pb2_grpc.InferenceServiceServicer):
    """The methods for gateways."""

    @abstractmethod
    def load(self) -> wire.ModelLoad:
        """Return the load to answer with."""

    def GetLoad(  # noqa: N802 - the contract's name
        self,
        request: wire.GetLoadRequest,  # noqa: ARG002 - the server has one model
        context: Any,  # noqa: ARG002 - gRPC's shape
    ) -> wire.GetLoadResponse:
        """Return the load of the fake model."""
        return wire.GetLoadResponse(models=[self.load()])

    def GetTokenizer(  # noqa: N802 - the contract's name
        self,
        request: wire.GetTokenizerRequest,  # noqa: ARG002 - no model has one
        context: Any,
    ) -> wire.GetTokenizerResponse:
        """Refuse: the fake tokenizer is no file."""
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "the fake server has no tokenizer file")
        raise AssertionError("abort raises")
