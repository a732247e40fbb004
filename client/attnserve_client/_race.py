"""The attempts of one call that run at the same time, for a policy that limits or hedges them.

Written twice, as the classes of `_connection` are, and for the same reason.
"""

from __future__ import annotations

import asyncio
import queue
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self

import grpc

from attnserve_client._connection import AsyncConnections, AsyncMethod, Connections, Method, RequestT, ResponseT
from attnserve_client._lanes import Turn
from attnserve_client._status import from_rpc_error
from attnserve_client.errors import AttnserveError


@dataclass(frozen=True, slots=True)
class Ended(Generic[ResponseT]):
    """An attempt that has ended: `outcome` is the response or the error."""

    turn: Turn
    outcome: ResponseT | AttnserveError


class AsyncRace(Generic[RequestT, ResponseT]):
    """Attempts of one call in the client for asyncio. `async with` cancels those that still run at its end."""

    def __init__(
        self,
        connections: AsyncConnections,
        method: AsyncMethod[RequestT, ResponseT],
        request: RequestT,
        request_id: str,
    ) -> None:
        self._connections = connections
        self._method = method
        self._request = request
        self._request_id = request_id
        self._running: dict[asyncio.Task[ResponseT], Turn] = {}

    @property
    def running(self) -> int:
        """Number of attempts whose end has not been returned, cancelled ones excluded."""
        return len(self._running)

    def start(self, turn: Turn, timeout_s: float | None) -> None:
        """Start an attempt. Its turn ends with it."""
        sending = self._connections.send(turn, self._method, self._request, timeout_s, self._request_id)
        task = asyncio.create_task(sending)
        self._running[task] = turn
        task.add_done_callback(lambda _: self._connections.lanes.leave(turn))

    def cancel(self, turn: Turn) -> None:
        """Cancel an attempt."""
        for task in [task for task, each in self._running.items() if each is turn]:
            del self._running[task]
            task.cancel()

    async def ended(self, patience_s: float | None) -> Ended[ResponseT] | None:
        """Return the next attempt that ends; None if none does for `patience_s` seconds."""
        done, _ = await asyncio.wait(self._running, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            turn = self._running.pop(task)
            error = task.exception()
            if error is None:
                return Ended(turn, task.result())
            if not isinstance(error, AttnserveError):
                raise error
            return Ended(turn, error)
        return None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        left, self._running = list(self._running), {}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left)


class Race(Generic[RequestT, ResponseT]):
    """Attempts of one call in the client for threads. `with` cancels those that still run at its end."""

    def __init__(
        self, connections: Connections, method: Method[RequestT, ResponseT], request: RequestT, request_id: str
    ) -> None:
        self._connections = connections
        self._method = method
        self._request = request
        self._request_id = request_id
        self._running: dict[grpc.Future[ResponseT], Turn] = {}
        self._ended: queue.SimpleQueue[grpc.Future[ResponseT]] = queue.SimpleQueue()

    @property
    def running(self) -> int:
        """Number of attempts whose end has not been returned, cancelled ones excluded."""
        return len(self._running)

    def start(self, turn: Turn, timeout_s: float | None) -> None:
        """Start an attempt. Its turn ends with it."""
        try:
            future = self._connections.send(turn, self._method, self._request, timeout_s)
        except BaseException:
            self._connections.lanes.leave(turn)
            raise
        self._running[future] = turn
        future.add_done_callback(lambda _: self._connections.lanes.leave(turn))
        future.add_done_callback(self._ended.put)

    def cancel(self, turn: Turn) -> None:
        """Cancel an attempt."""
        for future in [future for future, each in self._running.items() if each is turn]:
            del self._running[future]
            future.cancel()

    def ended(self, patience_s: float | None) -> Ended[ResponseT] | None:
        """Return the next attempt that ends; None if none does for `patience_s` seconds, or a cancelled one did."""
        try:
            future = self._ended.get(timeout=patience_s)
        except queue.Empty:
            return None
        turn = self._running.pop(future, None)
        if turn is None:
            return None
        try:
            return Ended(turn, future.result())
        except grpc.RpcError as error:
            failure = from_rpc_error(error, self._request_id, by_server=not self._connections.closed)
            failure.__cause__ = error
            return Ended(turn, failure)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        left, self._running = list(self._running), {}
        for future in left:
            future.cancel()
