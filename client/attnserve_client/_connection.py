"""The connections to a server: single attempts of calls, and opened streams, with gRPC's errors mapped to the client's.

The clients in `_async` and `_sync` are one source. These classes are written twice, because grpc and grpc.aio open
channels, cancel calls and report closed channels in different ways. Each pair has the same methods.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import grpc
import grpc.aio

from attnserve_client._channel import check_connections, options_of, targets_of, unchecked
from attnserve_client._credentials import Tls, TokenFile, credentials_of, per_call
from attnserve_client._exchange import Exchange
from attnserve_client._feeds import AsyncFeed, Feed
from attnserve_client._lanes import Lanes, Turn
from attnserve_client._status import closed, from_rpc_error
from attnserve_client._streams import AsyncStream, Stream
from attnserve_client._stubs import stub_of

if TYPE_CHECKING:
    from attnserve_client._stubs import AsyncStub, Stub

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
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
        ValueError: `target` is empty or has an empty member, a member of a list holds several addresses,
            `connections` is out of range, or a file of `credentials` is not PEM.
        OSError: A file of `credentials` cannot be read.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        credentials: grpc.ChannelCredentials | Tls | None,
        token: str | TokenFile | None,
        metadata: Sequence[tuple[str, str | bytes]],
        options: Mapping[str, int | str],
        connections: int = 1,
    ) -> None:
        self.names, self._options = targets_of(target), options_of(options)
        self.lanes = Lanes(len(self.names), check_connections(connections))
        self._count = len(self.names) * connections
        self._credentials = credentials_of(credentials)
        self._metadata = per_call(token, metadata)
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
            return await method(self._stub(turn))(request, timeout=timeout_s, metadata=self._metadata())
        except grpc.RpcError as error:
            raise from_rpc_error(error, request_id, by_server=not self.closed) from error
        except asyncio.CancelledError:
            self.raise_if_ended_by_close()
            raise

    def stream(self, feed: AsyncFeed, exchange: Exchange) -> AsyncStream:
        """Open a stream that sends what `feed` yields."""
        self._raise_if_closed()
        turn = self.lanes.take(stream=True)
        call = self._stub(turn).StreamInfer(feed.messages(), metadata=self._metadata())
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
                name = self.names[number % len(self.names)]
                self._stubs.append(
                    stub_of(self._open(name, self._options), partial(self._open, name, unchecked(self._options)))
                )
        return self._stubs[turn.lane.number]

    def _open(self, name: str, options: Sequence[tuple[str, int | str]]) -> grpc.aio.Channel:
        if self._credentials is None:
            channel = grpc.aio.insecure_channel(name, options)
        else:
            channel = grpc.aio.secure_channel(name, self._credentials, options)
        self._channels.append(channel)
        return channel

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
        ValueError: `target` is empty or has an empty member, a member of a list holds several addresses,
            `connections` is out of range, or a file of `credentials` is not PEM.
        OSError: A file of `credentials` cannot be read.
    """

    def __init__(
        self,
        target: str | Sequence[str],
        credentials: grpc.ChannelCredentials | Tls | None,
        token: str | TokenFile | None,
        metadata: Sequence[tuple[str, str | bytes]],
        options: Mapping[str, int | str],
        connections: int = 1,
    ) -> None:
        self.names, arguments = targets_of(target), options_of(options)
        self.lanes = Lanes(len(self.names), check_connections(connections))
        self._credentials = credentials_of(credentials)
        self._channels: list[grpc.Channel] = []
        self._stubs: list[Stub] = [
            stub_of(self._open(name, arguments), partial(self._open, name, unchecked(arguments)))
            for name in self.names * connections
        ]
        self._metadata = per_call(token, metadata)
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
            return method(self._stub(turn))(request, timeout=timeout_s, metadata=self._metadata())
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
            return method(self._stub(turn)).future(request, timeout=timeout_s, metadata=self._metadata())
        except ValueError:
            self._raise_if_closed()
            raise

    def stream(self, feed: Feed, exchange: Exchange) -> Stream:
        """Open a stream that sends what `feed` yields."""
        self._raise_if_closed()
        turn = self.lanes.take(stream=True)
        call = self._stub(turn).StreamInfer(feed.messages(), metadata=self._metadata())
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

    def _open(self, name: str, options: Sequence[tuple[str, int | str]]) -> grpc.Channel:
        if self._credentials is None:
            channel = grpc.insecure_channel(name, options)
        else:
            channel = grpc.secure_channel(name, self._credentials, options)
        self._channels.append(channel)
        return channel

    def _raise_if_closed(self) -> None:
        if self.closed:
            raise closed() from None
