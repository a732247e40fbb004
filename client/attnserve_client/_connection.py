"""Connections to a server: single attempts of calls, and open streams, with gRPC's errors mapped to the client's.

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

from attnserve_client._channel import metadata_of, options_of, target_of
from attnserve_client._exchange import Exchange
from attnserve_client._feeds import AsyncFeed, Feed
from attnserve_client._status import closed, from_rpc_error

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
AsyncMethod: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT]"
Method: TypeAlias = "grpc.UnaryUnaryMultiCallable[RequestT, ResponseT]"


class AsyncConnection:
    """A grpc.aio channel, opened by the first call in the event loop of that call. Event loop only.

    Args:
        target: `host:port`, any name of gRPC, or a list of `address:port`.
        credentials: of TLS; None: the channel is not encrypted.
        token: a bearer token, sent with every call; None: none is.
        metadata: sent with every call too.
        options: channel options of gRPC, which override the client's defaults.

    Raises:
        ValueError: `target` is empty or has an empty member, a member holds several addresses, or several members are
            not all `address:port` of one IP version.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        credentials: grpc.ChannelCredentials | None,
        token: str | None,
        metadata: Sequence[tuple[str, str | bytes]],
        options: Mapping[str, int | str],
    ) -> None:
        self._target, self._options = target_of(target), options_of(options)
        self._credentials = credentials
        self._metadata = metadata_of(token, metadata)
        self._channel: grpc.aio.Channel | None = None
        self._stub: inference_service_pb2_grpc.InferenceServiceAsyncStub | None = None
        self._closed = False

    @property
    def stub(self) -> inference_service_pb2_grpc.InferenceServiceAsyncStub:
        """The service's methods. Raises RequestCancelled if the connection is closed."""
        self._raise_if_closed()
        if self._stub is None:
            # Not in the constructor: a channel belongs to the event loop that runs when it is created.
            if self._credentials is None:
                self._channel = grpc.aio.insecure_channel(self._target, self._options)
            else:
                self._channel = grpc.aio.secure_channel(self._target, self._credentials, self._options)
            self._stub = inference_service_pb2_grpc.InferenceServiceStub(self._channel)
        return self._stub

    async def call(
        self, method: AsyncMethod[RequestT, ResponseT], request: RequestT, timeout_s: float | None, request_id: str = ""
    ) -> ResponseT:
        """Send a request once, with `timeout_s` as the deadline of the server too; None for no limit.

        Raises:
            AttnserveError: The attempt failed.
        """
        self._raise_if_closed()
        try:
            return await method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, request_id) from error
        except asyncio.CancelledError:
            self.raise_if_ended_by_close()
            raise

    def stream(self, feed: AsyncFeed, exchange: Exchange) -> AsyncStream:
        """Open a stream that sends what `feed` yields."""
        return AsyncStream(self, self.stub.StreamInfer(feed.messages(), metadata=self._metadata), feed, exchange)

    async def close(self) -> None:
        """Cancel all running calls and close the channel."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    def raise_if_ended_by_close(self) -> None:
        """Raise RequestCancelled if the channel was closed and the current task not cancelled.

        grpc.aio raises CancelledError in both cases; only a cancelled task may end with it.
        """
        task = asyncio.current_task()
        if task is None or not task.cancelling():
            self._raise_if_closed()

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise closed() from None


class AsyncStream:
    """One open stream. `async with` gives the received messages, cancels a stalled call, and cancels it at the end.

    A stream is stalled when requests are in flight and the reader has waited `exchange.patience_s` seconds for any
    answer; None: never. The block then raises DeadlineExpired. gRPC's other errors become the client's AttnserveError.
    """

    def __init__(self, connection: AsyncConnection, call: Any, feed: AsyncFeed, exchange: Exchange) -> None:
        self._connection = connection
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
        if isinstance(error, grpc.RpcError):
            raise from_rpc_error(error) from error
        if isinstance(error, asyncio.CancelledError):
            if stalled:
                raise self._exchange.stalled() from None
            self._connection.raise_if_ended_by_close()


async def _cancel_if_stalled(exchange: Exchange, cancel: Callable[[], object]) -> bool:
    """Cancel the call when the stream has stalled. Return whether it has."""
    if exchange.patience_s is None:
        return False
    while (left_s := exchange.stalled_in_s(exchange.patience_s)) > 0:  # noqa: ASYNC110 - it waits for time itself
        await asyncio.sleep(left_s)
    cancel()
    return True


class Connection:
    """A grpc channel. Threads may share it.

    Args:
        target: `host:port`, any name of gRPC, or a list of `address:port`.
        credentials: of TLS; None: the channel is not encrypted.
        token: a bearer token, sent with every call; None: none is.
        metadata: sent with every call too.
        options: channel options of gRPC, which override the client's defaults.

    Raises:
        ValueError: `target` is empty or has an empty member, a member holds several addresses, or several members are
            not all `address:port` of one IP version.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        credentials: grpc.ChannelCredentials | None,
        token: str | None,
        metadata: Sequence[tuple[str, str | bytes]],
        options: Mapping[str, int | str],
    ) -> None:
        name, arguments = target_of(target), options_of(options)
        if credentials is None:
            self._channel = grpc.insecure_channel(name, arguments)
        else:
            self._channel = grpc.secure_channel(name, credentials, arguments)
        self._stub = inference_service_pb2_grpc.InferenceServiceStub(self._channel)
        self._metadata = metadata_of(token, metadata)
        self._closed = False

    @property
    def stub(self) -> inference_service_pb2_grpc.InferenceServiceStub:
        """The service's methods. Raises RequestCancelled if the connection is closed."""
        self._raise_if_closed()
        return self._stub

    def call(
        self, method: Method[RequestT, ResponseT], request: RequestT, timeout_s: float | None, request_id: str = ""
    ) -> ResponseT:
        """Send a request once, with `timeout_s` as the deadline of the server too; None for no limit.

        Raises:
            AttnserveError: The attempt failed.
        """
        self._raise_if_closed()
        try:
            return method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, request_id) from error
        except ValueError:
            self._raise_if_closed()  # another thread closed the channel between the check above and the call
            raise

    def stream(self, feed: Feed, exchange: Exchange) -> Stream:
        """Open a stream that sends what `feed` yields."""
        return Stream(self.stub.StreamInfer(feed.messages(), metadata=self._metadata), feed, exchange)

    def close(self) -> None:
        """Cancel all running calls and close the channel."""
        self._closed = True
        self._channel.close()

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise closed() from None


class Stream:
    """One open stream. `with` gives the received messages, cancels a stalled call, and cancels it at the end.

    A stream is stalled when requests are in flight and the reader has waited `exchange.patience_s` seconds for any
    answer; None: never. The block then raises DeadlineExpired. gRPC's other errors become the client's AttnserveError.
    """

    def __init__(self, call: Any, feed: Feed, exchange: Exchange) -> None:
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
        if isinstance(error, grpc.RpcError):
            raise (self._exchange.stalled() if self._stalled else from_rpc_error(error)) from error

    def _watch(self, patience_s: float) -> None:
        """Cancel the call when the stream has stalled."""
        while (left_s := self._exchange.stalled_in_s(patience_s)) > 0:
            if self._ended.wait(left_s):
                return
        self._stalled = True
        self._call.cancel()
