"""The connections to a server: single attempts of calls, and open streams, with gRPC's errors mapped to the client's.

The clients in `_async` and `_sync` are one source. These classes are written twice, because grpc and grpc.aio open
channels, cancel calls and report closed channels in different ways. Each pair has the same methods.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio
from attnserve.v1 import inference_service_pb2_grpc

from attnserve_client._channel import check_connections, metadata_of, options_of, targets_of
from attnserve_client._exchange import Exchange
from attnserve_client._feeds import AsyncFeed, Feed
from attnserve_client._lanes import Lanes, Turn
from attnserve_client._status import closed, from_rpc_error
from attnserve_client.errors import AttnserveError

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
AsyncStub: TypeAlias = "inference_service_pb2_grpc.InferenceServiceAsyncStub"
Stub: TypeAlias = "inference_service_pb2_grpc.InferenceServiceStub"
AsyncMethod: TypeAlias = "Callable[[AsyncStub], grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT]]"
"""Returns a method of a connection's stub."""
Method: TypeAlias = "Callable[[Stub], grpc.UnaryUnaryMultiCallable[RequestT, ResponseT]]"


class AsyncConnections:
    """The grpc.aio channels to a server, made by the first call in the event loop of that call. Event loop only.

    A channel connects when its first attempt or stream begins.

    Args:
        target: `host:port`, any name of gRPC, or several of them.
        credentials: of TLS; None: the channel is not encrypted.
        token: a bearer token, sent with every call; None: none is.
        metadata: sent with every call too.
        options: channel options of gRPC, which override the client's defaults.
        connections: connections to each address.

    Raises:
        ValueError: `target` is empty or has an empty member, a member of a list holds several addresses, or
            `connections` is out of range.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        credentials: grpc.ChannelCredentials | None,
        token: str | None,
        metadata: Sequence[tuple[str, str | bytes]],
        options: Mapping[str, int | str],
        connections: int = 1,
    ) -> None:
        self._names, self._options = targets_of(target), options_of(options)
        self.lanes = Lanes(len(self._names), check_connections(connections))
        self._count = len(self._names) * connections
        self._credentials = credentials
        self._metadata = metadata_of(token, metadata)
        self._channels: list[grpc.aio.Channel] = []
        self._stubs: list[AsyncStub] = []
        self.closed = False

    async def call(
        self,
        turn: Turn,
        method: AsyncMethod[RequestT, ResponseT],
        request: RequestT,
        timeout_s: float | None,
        request_id: str = "",
    ) -> ResponseT:
        """Send a request once, and end the turn. `timeout_s` is the deadline of the server too; None for no limit.

        Raises:
            AttnserveError: The attempt failed.
        """
        try:
            return await self.send(turn, method, request, timeout_s, request_id)
        finally:
            self.lanes.leave(turn)

    async def send(
        self,
        turn: Turn,
        method: AsyncMethod[RequestT, ResponseT],
        request: RequestT,
        timeout_s: float | None,
        request_id: str,
    ) -> ResponseT:
        """Do what `call` does, but leave the turn to the caller."""
        try:
            return await method(self._stub(turn))(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, request_id, by_server=not self.closed) from error
        except asyncio.CancelledError:
            self.raise_if_ended_by_close()
            raise

    def stream(self, feed: AsyncFeed, exchange: Exchange) -> AsyncStream:
        """Open a stream that sends what `feed` yields."""
        self._raise_if_closed()
        turn = self.lanes.take(stream=True)
        call = self._stub(turn).StreamInfer(feed.messages(), metadata=self._metadata)
        return AsyncStream(self, turn, call, feed, exchange)

    async def close(self) -> None:
        """Cancel all running calls and close the channels."""
        self.closed = True
        for channel in self._channels:
            await channel.close()

    def _stub(self, turn: Turn) -> AsyncStub:
        """Return the stub of a turn's lane. Raise RequestCancelled if the connections are closed."""
        self._raise_if_closed()
        if not self._stubs:
            # Not in the constructor: a channel belongs to the event loop that runs when it is created.
            for number in range(self._count):
                name = self._names[number % len(self._names)]
                if self._credentials is None:
                    channel = grpc.aio.insecure_channel(name, self._options)
                else:
                    channel = grpc.aio.secure_channel(name, self._credentials, self._options)
                self._channels.append(channel)
                self._stubs.append(inference_service_pb2_grpc.InferenceServiceStub(channel))
        return self._stubs[turn.lane.number]

    def raise_if_ended_by_close(self) -> None:
        """Raise RequestCancelled if the channel was closed and the current task not cancelled.

        grpc.aio raises CancelledError in both cases; only a cancelled task may end with it.
        """
        task = asyncio.current_task()
        if task is None or not task.cancelling():
            self._raise_if_closed()

    def _raise_if_closed(self) -> None:
        if self.closed:
            raise closed() from None


class AsyncStream:
    """One open stream. `async with` gives the received messages, cancels a stalled call, and cancels it at the end.

    A stream is stalled when requests are in flight and the reader has waited `exchange.patience_s` seconds for any
    answer; None: never. The block then raises DeadlineExpired. gRPC's other errors become the client's AttnserveError.
    """

    def __init__(
        self, connections: AsyncConnections, turn: Turn, call: Any, feed: AsyncFeed, exchange: Exchange
    ) -> None:
        self._connections = connections
        self._turn = turn
        self._call = call
        self._feed = feed
        self._exchange = exchange
        self._watch = asyncio.create_task(_cancel_if_stalled(exchange, call.cancel))

    async def __aenter__(self) -> Any:
        return self._call

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stalled = self._watch.done() and not self._watch.cancelled() and self._watch.result()
        self._watch.cancel()
        self._call.cancel()
        self._feed.close()
        self._connections.lanes.leave(self._turn)
        if isinstance(error, grpc.RpcError):
            failure = from_rpc_error(error, by_server=not self._connections.closed)
            self._connections.lanes.failed(self._turn, failure)
            raise failure from error
        if error is None or isinstance(error, AttnserveError):
            self._connections.lanes.answered(self._turn)
        if isinstance(error, asyncio.CancelledError):
            if stalled:
                self._connections.lanes.stalled(self._turn)
                raise self._exchange.stalled() from None
            self._connections.raise_if_ended_by_close()


async def _cancel_if_stalled(exchange: Exchange, cancel: Callable[[], object]) -> bool:
    """Cancel the call when the stream has stalled. Return whether it has."""
    if exchange.patience_s is None:
        return False
    while (left_s := exchange.stalled_in_s(exchange.patience_s)) > 0:  # noqa: ASYNC110 - it waits for time itself
        await asyncio.sleep(left_s)
    cancel()
    return True


class Connections:
    """The grpc channels to a server. Threads may share them.

    A channel connects when its first attempt or stream begins.

    Args:
        target: `host:port`, any name of gRPC, or several of them.
        credentials: of TLS; None: the channel is not encrypted.
        token: a bearer token, sent with every call; None: none is.
        metadata: sent with every call too.
        options: channel options of gRPC, which override the client's defaults.
        connections: connections to each address.

    Raises:
        ValueError: `target` is empty or has an empty member, a member of a list holds several addresses, or
            `connections` is out of range.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        credentials: grpc.ChannelCredentials | None,
        token: str | None,
        metadata: Sequence[tuple[str, str | bytes]],
        options: Mapping[str, int | str],
        connections: int = 1,
    ) -> None:
        names, arguments = targets_of(target), options_of(options)
        self.lanes = Lanes(len(names), check_connections(connections))
        self._channels = [
            grpc.insecure_channel(name, arguments)
            if credentials is None
            else grpc.secure_channel(name, credentials, arguments)
            for name in names * connections
        ]
        self._stubs = [inference_service_pb2_grpc.InferenceServiceStub(channel) for channel in self._channels]
        self._metadata = metadata_of(token, metadata)
        self.closed = False

    def call(
        self,
        turn: Turn,
        method: Method[RequestT, ResponseT],
        request: RequestT,
        timeout_s: float | None,
        request_id: str = "",
    ) -> ResponseT:
        """Send a request once, and end the turn. `timeout_s` is the deadline of the server too; None for no limit.

        Raises:
            AttnserveError: The attempt failed.
        """
        try:
            return method(self._stub(turn))(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, request_id, by_server=not self.closed) from error
        except ValueError:
            self._raise_if_closed()  # another thread closed the channel between the check and the call
            raise
        finally:
            self.lanes.leave(turn)

    def send(
        self, turn: Turn, method: Method[RequestT, ResponseT], request: RequestT, timeout_s: float | None
    ) -> grpc.Future[ResponseT]:
        """Start to do what `call` does, and leave the turn to the caller. The future raises gRPC's errors.

        Raises:
            RequestCancelled: The connections are closed.
        """
        try:
            return method(self._stub(turn)).future(request, timeout=timeout_s, metadata=self._metadata)
        except ValueError:
            self._raise_if_closed()
            raise

    def stream(self, feed: Feed, exchange: Exchange) -> Stream:
        """Open a stream that sends what `feed` yields."""
        self._raise_if_closed()
        turn = self.lanes.take(stream=True)
        call = self._stub(turn).StreamInfer(feed.messages(), metadata=self._metadata)
        return Stream(self, turn, call, feed, exchange)

    def close(self) -> None:
        """Cancel all running calls and close the channels."""
        self.closed = True
        for channel in self._channels:
            channel.close()

    def _stub(self, turn: Turn) -> Stub:
        """Return the stub of a turn's lane. Raise RequestCancelled if the connections are closed."""
        self._raise_if_closed()
        return self._stubs[turn.lane.number]

    def _raise_if_closed(self) -> None:
        if self.closed:
            raise closed() from None


class Stream:
    """One open stream. `with` gives the received messages, cancels a stalled call, and cancels it at the end.

    A stream is stalled when requests are in flight and the reader has waited `exchange.patience_s` seconds for any
    answer; None: never. The block then raises DeadlineExpired. gRPC's other errors become the client's AttnserveError.
    """

    def __init__(self, connections: Connections, turn: Turn, call: Any, feed: Feed, exchange: Exchange) -> None:
        self._connections = connections
        self._turn = turn
        self._call = call
        self._feed = feed
        self._exchange = exchange
        self._ended = threading.Event()
        self._stalled = False  # written by the watching thread before it cancels the call, read by the reader after
        if exchange.patience_s is not None:
            watch = threading.Thread(
                target=self._watch, args=(exchange.patience_s,), name="attnserve-watch", daemon=True
            )
            watch.start()

    def __enter__(self) -> Any:
        return self._call

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._feed.close()
        self._call.cancel()
        self._connections.lanes.leave(self._turn)
        lanes = self._connections.lanes
        if isinstance(error, grpc.RpcError) and self._stalled:
            lanes.stalled(self._turn)
            raise self._exchange.stalled() from error
        if isinstance(error, grpc.RpcError):
            failure = from_rpc_error(error, by_server=not self._connections.closed)
            lanes.failed(self._turn, failure)
            raise failure from error
        if error is None or isinstance(error, AttnserveError):
            lanes.answered(self._turn)

    def _watch(self, patience_s: float) -> None:
        """Cancel the call when the stream has stalled."""
        while (left_s := self._exchange.stalled_in_s(patience_s)) > 0:
            if self._ended.wait(left_s):
                return
        self._stalled = True
        self._call.cancel()
