"""Open streams of both clients, with gRPC's errors mapped to the client's.

Written twice, as the classes of `_connection` are, and for the same reason.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

import grpc

from attnserve_client._exchange import Exchange
from attnserve_client._feeds import AsyncFeed, Feed
from attnserve_client._lanes import Lanes, Turn
from attnserve_client._status import from_rpc_error
from attnserve_client.errors import AttnserveError


class Owner(Protocol):
    """The connections that opened a stream.

    Attributes:
        lanes: The lanes of the connections.
        closed: Whether the connections are closed.
    """

    lanes: Lanes
    closed: bool


class AsyncOwner(Owner, Protocol):
    """The same, in the client for asyncio."""

    def raise_if_ended_by_close(self) -> None:
        """Raise RequestCancelled if the connections were closed and the current task not cancelled."""
        ...


class AsyncStream:
    """One open stream. `async with` gives the received messages, cancels a stalled call, and cancels it at the end.

    A stream is stalled when requests are in flight and the reader has waited `exchange.patience_s` seconds for any
    answer; None: never. The block then raises DeadlineExpired. gRPC's other errors become the client's AttnserveError.
    """

    def __init__(self, connections: AsyncOwner, turn: Turn, call: Any, feed: AsyncFeed, exchange: Exchange) -> None:
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


class Stream:
    """One open stream. `with` gives the received messages, cancels a stalled call, and cancels it at the end.

    A stream is stalled when requests are in flight and the reader has waited `exchange.patience_s` seconds for any
    answer; None: never. The block then raises DeadlineExpired. gRPC's other errors become the client's AttnserveError.
    """

    def __init__(self, connections: Owner, turn: Turn, call: Any, feed: Feed, exchange: Exchange) -> None:
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
