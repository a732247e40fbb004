"""A caller without the SDK: raw calls on one channel, each of them recorded with what it got."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np
from attnserve.v1 import attention_pb2, model_pb2
from attnserve.v1 import inference_service_pb2 as pb
from google.rpc import error_details_pb2, status_pb2

from faults.bundles import MAP
from faults.history import Answer, End, Recorder, Sink

SERVICE = "/attnserve.v1.InferenceService"
DETAILS_KEY = "grpc-status-details-bin"
OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 500),
]
Metadata = Sequence[tuple[str, str]]


def request_of(model: str, keys: Sequence[str], version: str = "", **fields: Any) -> pb.InferRequest:
    """Return a request for the embeddings of these inputs, with attention if their keys begin with `MAP`."""
    request = pb.InferRequest(model=model, version=version, **fields)
    request.outputs.names.append("embedding")
    for key in keys:
        request.sequences.add().text.text = key.removeprefix(MAP)
    if keys and keys[0].startswith(MAP):
        request.attention.layers.append(-1)
        request.attention.head_reduction = attention_pb2.HEAD_REDUCTION_MEAN
    return request


def answers_of(response: pb.InferResponse) -> tuple[Answer, ...]:
    """Return the values of each sequence by name."""
    found = []
    for result in response.results:
        answer = {one.name: np.frombuffer(one.data, "<f4").reshape(one.shape) for one in result.outputs}
        for one in result.attention.maps:
            answer[f"attention_mean.{one.sites[0]}"] = np.frombuffer(one.weights.data, "<f4").reshape(
                one.weights.shape
            )[0]
        found.append(answer)
    return tuple(found)


def reason_of(details: bytes) -> tuple[str, dict[str, str]]:
    """Return the reason and the metadata of an error's ErrorInfo; empty without one."""
    info = error_details_pb2.ErrorInfo()
    for detail in status_pb2.Status.FromString(details).details:
        if detail.Is(info.DESCRIPTOR):
            detail.Unpack(info)
            return info.reason, dict(info.metadata)
    return "", {}


def fields_of(details: bytes) -> list[str]:
    """Return the fields that an error's BadRequest names."""
    bad = error_details_pb2.BadRequest()
    for detail in status_pb2.Status.FromString(details).details:
        if detail.Is(bad.DESCRIPTOR):
            detail.Unpack(bad)
    return [one.field for one in bad.field_violations]


async def states_of(wire: Wire) -> dict[tuple[str, str], str]:
    """Return the state of each model and version."""
    call = wire.channel.unary_unary(f"{SERVICE}/ListModels")
    # A first connection to a busy machine may take longer than gRPC waits for it.
    answer = pb.ListModelsResponse.FromString(await call(b"", timeout=30, wait_for_ready=True))
    return {(one.name, one.version): model_pb2.ModelState.Name(one.state) for one in answer.models}


class Wire:
    """Calls of one caller. Use `async with`."""

    def __init__(
        self,
        sink: Sink,
        caller: str,
        target: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Metadata = (),
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        """Make a channel, which connects with its first call."""
        self.recorder = Recorder(caller, sink)
        self.metadata = metadata
        self.details = b""
        """The details of the last error."""
        self.queues_s: list[float] = []
        """Seconds that each answered sequence had waited, by its receipt."""
        merged = list({**dict(OPTIONS), **dict(options)}.items())
        if credentials is None:
            self.channel = grpc.aio.insecure_channel(target, merged)
        else:
            self.channel = grpc.aio.secure_channel(target, credentials, merged)

    async def __aenter__(self) -> Wire:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    async def infer(
        self,
        model: str,
        *keys: str,
        version: str = "",
        timeout_s: float = 10.0,
        leave_after_s: float | None = None,
        **fields: Any,
    ) -> End:
        """Run sequences, and return how the call ended. `leave_after_s`: cancel the call after this time."""
        request = request_of(model, keys, version, **fields)
        call = self.recorder.begin(model, version, keys, timeout_s)
        return await self._finish(call, f"{SERVICE}/Infer", request.SerializeToString(), timeout_s, leave_after_s)

    async def send(
        self, data: bytes, *, method: str = f"{SERVICE}/Infer", timeout_s: float = 10.0, metadata: Metadata = ()
    ) -> End:
        """Send bytes to a method, and return how the call ended. Its answer, if there is one, is not checked."""
        call = self.recorder.begin(timeout_s=timeout_s)
        return await self._finish(call, method, data, timeout_s, None, metadata, parse=False)

    async def _finish(
        self,
        call: str,
        method: str,
        data: bytes,
        timeout_s: float,
        leave_after_s: float | None,
        metadata: Metadata = (),
        *,
        parse: bool = True,
    ) -> End:
        sent = self.channel.unary_unary(method)(data, timeout=timeout_s, metadata=(*self.metadata, *metadata))
        waiting = asyncio.ensure_future(_awaited(sent))
        try:
            if leave_after_s is not None:
                done, _ = await asyncio.wait([waiting], timeout=leave_after_s)
                if not done:
                    sent.cancel()
            answer = await waiting
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():  # the caller itself is cancelled
                sent.cancel()
                self.recorder.end(call, "CANCELLED", left=True)
                raise
            return self.recorder.end(call, "CANCELLED", left=True)
        except grpc.aio.AioRpcError as error:
            self.details = next((value for key, value in error.trailing_metadata() or () if key == DETAILS_KEY), b"")
            reason, _ = reason_of(self.details)
            return self.recorder.end(call, error.code().name, reason=reason, message=error.details() or "")
        if not parse:
            return self.recorder.end(call, "OK")
        response = pb.InferResponse.FromString(answer)
        self.queues_s += [one.run.queue_seconds for one in response.results]
        return self.recorder.end(call, "OK", version=response.receipt.version, answers=answers_of(response))


async def _awaited(call: Any) -> Any:
    return await call
