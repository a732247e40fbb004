"""The stub of a channel: the methods of all services of the contract, typed for grpc and grpc.aio.

A channel that checks the server's health sends nothing to a server that is not ready. The methods that change models
must reach it, so they have a second channel, which is opened by their first call and checks nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from attnserve.v1 import inference_service_pb2_grpc, model_service_pb2_grpc

if TYPE_CHECKING:

    class AsyncStub(inference_service_pb2_grpc.InferenceServiceAsyncStub, model_service_pb2_grpc.ModelServiceAsyncStub):
        """The methods of a channel of grpc.aio."""

    class Stub(inference_service_pb2_grpc.InferenceServiceStub, model_service_pb2_grpc.ModelServiceStub):
        """The methods of a channel of grpc."""


class _Methods(inference_service_pb2_grpc.InferenceServiceStub):
    """All methods, as attributes."""

    def __init__(self, channel: Any, open_unchecked: Callable[[], Any]) -> None:
        super().__init__(channel)  # type: ignore[call-arg] # the stub file has `__new__` in place of it
        self._open_unchecked = open_unchecked

    @cached_property
    def _admin(self) -> Any:
        return model_service_pb2_grpc.ModelServiceStub(self._open_unchecked())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._admin, name)


def stub_of(channel: Any, open_unchecked: Callable[[], Any]) -> Any:
    """Return the stub of a channel of either library.

    Args:
        channel: for calls to models.
        open_unchecked: opens another channel to the same server, which sends calls also while that is not ready.
    """
    return _Methods(channel, open_unchecked)
