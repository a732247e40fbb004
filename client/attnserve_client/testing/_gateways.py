"""What the fake server answers to gateways: a load, and the tokenizer file that a test sets."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import Any, Protocol

import grpc
from attnserve.v1 import inference_service_pb2 as wire
from attnserve.v1 import inference_service_pb2_grpc, model_pb2

from attnserve_client.testing._answers import Shape


def load_of(model: str) -> wire.ModelLoad:
    """Return the load of an idle model."""
    ready = model_pb2.MODEL_STATE_READY
    return wire.ModelLoad(model=model, version="1", state=ready, instances=1, predicted_wait_seconds=0.0)


def tokenizer_of(model: str, content: bytes, max_length: int) -> wire.GetTokenizerResponse:
    """Return a tokenizer file as one piece."""
    return wire.GetTokenizerResponse(
        model=model,
        version="1",
        digest=f"sha256:{hashlib.sha256(content).hexdigest()}",
        total_bytes=len(content),
        data=content,
        settings=wire.TokenizerSettings(max_tokens=max_length),
    )


class Faked(Protocol):
    """What the methods read of the fake server."""

    model: str
    load: wire.ModelLoad
    tokenizer_file: bytes
    shape: Shape


class GatewayMethods(inference_service_pb2_grpc.InferenceServiceServicer):
    """The methods for gateways."""

    _fake: Faked

    @abstractmethod
    def _note(self, context: Any) -> None:
        """Record a call."""

    def GetLoad(  # noqa: N802 - the contract's name
        self,
        request: wire.GetLoadRequest,  # noqa: ARG002 - the server has one model
        context: Any,
    ) -> wire.GetLoadResponse:
        """Return the load of the fake model."""
        self._note(context)
        return wire.GetLoadResponse(models=[self._fake.load])

    def GetTokenizer(  # noqa: N802 - the contract's name
        self,
        request: wire.GetTokenizerRequest,  # noqa: ARG002 - the file is one piece
        context: Any,
    ) -> wire.GetTokenizerResponse:
        """Return the file that the test has set, or refuse: the fake tokenizer is no file."""
        self._note(context)
        content = self._fake.tokenizer_file
        if not content:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "set `tokenizer_file`: the fake server's tokenizer is no file")
        return tokenizer_of(self._fake.model, content, self._fake.shape.max_length)
