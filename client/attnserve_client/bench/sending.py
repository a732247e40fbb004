"""How requests are sent: as separate calls, or on streams. Answers are measured and dropped.

A refusal is an `Outcome`, and is raised by `try_each_kind` alone. A wrong target, or a number of connections out of
range, raises ValueError.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import grpc
import grpc.aio
from attnserve.v1 import inference_service_pb2 as wire
from attnserve.v1 import inference_service_pb2_grpc

from attnserve_client._channel import check_connections, options_of, targets_of
from attnserve_client._credentials import Metadata, Tls, TokenFile, credentials_of, per_call
from attnserve_client._status import from_rpc_error, from_status_bytes
from attnserve_client.bench.load import Outcome
from attnserve_client.bench.workload import Workload
from attnserve_client.errors import AttnserveError

if TYPE_CHECKING:
    Stub: TypeAlias = inference_service_pb2_grpc.InferenceServiceAsyncStub


class Sender(Protocol):
    """Sends requests of a workload."""

    async def send(self, index: int) -> Outcome:
        """Send request number `index`, from 0, and return its outcome."""
        ...


@asynccontextmanager
async def connected(
    target: str, connections: int, credentials: Tls | None = None, token: str | TokenFile | None = None
) -> AsyncIterator[list[Stub]]:
    """Open `connections` to each address of the target and yield a stub for each; close them when the block ends.

    Stubs to different addresses alternate. Each call has the token as it is then.
    """
    names, options = targets_of(target) * check_connections(connections), options_of({})
    secure, metadata = credentials_of(credentials), per_call(token, ())

    def opened(name: str) -> grpc.aio.Channel:
        if secure is None:
            return grpc.aio.insecure_channel(name, options)
        return grpc.aio.secure_channel(name, secure, options)

    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(opened(name)) for name in names]
        stubs = [inference_service_pb2_grpc.InferenceServiceStub(channel) for channel in channels]
        if token is not None:
            for stub in stubs:
                for method in ("Infer", "StreamInfer"):
                    setattr(stub, method, _with_metadata(getattr(stub, method), metadata))
        yield stubs


def _with_metadata(method: Callable[..., Any], metadata: Callable[[], Metadata]) -> Callable[..., Any]:
    """Return a method of a stub that sends the metadata of the moment with each call."""
    return lambda *args, **kwargs: method(*args, metadata=metadata(), **kwargs)


async def try_each_kind(stub: Stub, workload: Workload, timeout_s: float) -> None:
    """Send one request without attention and one with it, as far as the workload has them.

    Raises:
        AttnserveError: One of them failed; all requests of its kind would fail.
    """
    kinds = {request.HasField("attention"): request for request in reversed(workload.requests)}
    for request in kinds.values():
        try:
            await stub.Infer(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error


class Calls:
    """A sender that makes one call for each request, over the connections in turn."""

    def __init__(self, stubs: Sequence[Stub], workload: Workload, timeout_s: float) -> None:
        self._stubs = itertools.cycle(stubs)
        self._workload = workload
        self._timeout_s = timeout_s

    async def send(self, index: int) -> Outcome:
        """Send request number `index`, and return its outcome."""
        try:
            answer = await next(self._stubs).Infer(self._workload.request(index), timeout=self._timeout_s)
        except grpc.RpcError as error:
            return refusal_of(from_rpc_error(error))
        return outcome_of(answer)


class Streams:
    """A sender with one stream for each connection.

    A stream that breaks fails its pending requests; the next request opens a new one.
    """

    def __init__(self, stubs: Sequence[Stub], workload: Workload, timeout_s: float) -> None:
        self._workload = workload
        self._timeout_ms = max(1, round(timeout_s * 1000))
        self._lanes = [_Lane(stub) for stub in stubs]
        self._numbers = itertools.count()

    async def send(self, index: int) -> Outcome:
        """Send request number `index`, and return its outcome."""
        number = next(self._numbers)
        request = wire.StreamInferRequest(request=self._workload.request(index), timeout_ms=self._timeout_ms)
        request.request.request_id = str(number)
        return await self._lanes[number % len(self._lanes)].send(request)

    async def aclose(self) -> None:
        """End the streams."""
        for lane in self._lanes:
            await lane.aclose()


class _Lane:
    """One stream. Event loop only."""

    def __init__(self, stub: Stub) -> None:
        self._stub = stub
        self._turn = asyncio.Lock()  # grpc.aio writes one message at a time
        self._waiting: dict[str, asyncio.Future[Outcome]] = {}
        self._received: dict[str, int] = {}
        self._call: grpc.aio.StreamStreamCall[wire.StreamInferRequest, wire.StreamInferResponse] | None = None
        self._reader: asyncio.Task[None] | None = None

    async def send(self, request: wire.StreamInferRequest) -> Outcome:
        if self._call is None:
            self._call = self._stub.StreamInfer()
            self._reader = asyncio.create_task(self._read(self._call))
        call = self._call
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting[request.request.request_id] = future
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):  # the reader resolves the future
            async with self._turn:
                await call.write(request)
        return await future

    async def _read(self, call: grpc.aio.StreamStreamCall[wire.StreamInferRequest, wire.StreamInferResponse]) -> None:
        outcome = Outcome(error="STREAM_ENDED")
        try:
            async for message in call:
                self._take(message)
        except grpc.RpcError as error:
            outcome = refusal_of(from_rpc_error(error))
        finally:
            self._call = None
            broken, self._waiting, self._received = self._waiting, {}, {}
            for future in broken.values():
                if not future.done():
                    future.set_result(outcome)

    def _take(self, message: wire.StreamInferResponse) -> None:
        kind, name = message.WhichOneof("message"), message.request_id
        if kind == "chunk":
            self._received[name] = self._received.get(name, 0) + len(message.chunk.data)
            if message.chunk.index + 1 < message.chunk.count:
                return
            outcome = Outcome(bytes_received=self._received.pop(name))
        elif kind == "status":
            outcome = refusal_of(from_status_bytes(message.status, name))
        else:
            outcome = outcome_of(message.response)
        future = self._waiting.pop(name, None)
        if future is not None and not future.done():
            future.set_result(outcome)

    async def aclose(self) -> None:
        if self._call is not None:
            self._call.cancel()
        if self._reader is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader


def refusal_of(error: AttnserveError) -> Outcome:
    """Return the outcome of a refusal: its reason, or the gRPC code if it has no reason."""
    return Outcome(error=error.reason or error.code)


def outcome_of(answer: wire.InferResponse) -> Outcome:
    """Return the outcome of an answer: its size, and how its first sequence was run."""
    run = answer.results[0].run
    return Outcome(
        bytes_received=answer.ByteSize(),
        batch_size=run.batch_size,
        useful_tokens=run.useful_tokens,
        computed_tokens=run.computed_tokens,
        queue_s=run.queue_seconds,
    )
