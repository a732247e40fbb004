"""What feeds a stream: inputs become messages, and only as many as may be unanswered at once.

The two classes have the same methods. They are written twice, because threads and an event loop wait in different ways.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any, TypeAlias

from attnserve.v1 import inference_service_pb2 as wire

from attnserve_client._exchange import Exchange, Flow
from attnserve_client._inputs import Input

AsyncInputStream: TypeAlias = "Iterable[Input] | AsyncIterable[Input]"
InputStream: TypeAlias = "Iterable[Input]"


class AsyncFeed:
    """The requests of a stream, for grpc.aio's task to send. Event loop only.

    Args:
        inputs: The inputs, taken one by one.
        sequence: Encodes one input.
        message: Joins encoded inputs to a request.
        exchange: Registers each request before it is sent.
        flow: Limits.
    """

    def __init__(
        self,
        inputs: AsyncInputStream,
        sequence: Callable[[Input], Awaitable[wire.Sequence]],
        message: Callable[[list[wire.Sequence]], wire.InferRequest],
        exchange: Exchange,
        flow: Flow,
    ) -> None:
        self._inputs = inputs
        self._sequence = sequence
        self._message = message
        self._exchange = exchange
        self._per_message = flow.per_message
        self._slots = asyncio.Semaphore(flow.max_in_flight)
        self._task: asyncio.Task[object] | None = None
        self._closed = False
        self.error: Exception | None = None
        """Error that ended the inputs early. The reader raises it after the last answer."""

    async def messages(self) -> AsyncIterator[wire.StreamInferRequest]:
        """Yield requests, each when there is room for its inputs. Inputs before an error are still sent."""
        if self._closed:
            return
        self._task = asyncio.current_task()
        group: list[wire.Sequence] = []
        try:
            async for one in _each(self._inputs):
                group.append(await self._sequence(one))
                await self._slots.acquire()
                if len(group) == self._per_message:
                    full, group = group, []
                    yield self._exchange.open(self._message(full))
        except Exception as error:  # noqa: BLE001 - the boundary to gRPC's task: the reader raises it
            self.error = error
        if not group:
            return
        try:
            rest = self._exchange.open(self._message(group))
        except Exception as error:  # noqa: BLE001 - as above
            self.error = error
        else:
            yield rest

    def answered(self) -> None:
        """Make room for one more input. Called by the reader after each answer."""
        self._slots.release()

    def close(self) -> None:
        """End the feed. Cancels grpc.aio's task, which waits without a limit if the server ended the call."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()


class Feed:
    """The requests of a stream, for gRPC's thread to send. The reader's thread calls `answered` and `close`.

    Args:
        inputs: The inputs, taken one by one.
        sequence: Encodes one input.
        message: Joins encoded inputs to a request.
        exchange: Registers each request before it is sent.
        flow: Limits.
    """

    def __init__(
        self,
        inputs: InputStream,
        sequence: Callable[[Input], wire.Sequence],
        message: Callable[[list[wire.Sequence]], wire.InferRequest],
        exchange: Exchange,
        flow: Flow,
    ) -> None:
        self._inputs = iter(inputs)
        self._sequence = sequence
        self._message = message
        self._exchange = exchange
        self._per_message = flow.per_message
        self._slots = threading.Semaphore(flow.max_in_flight)
        self._closed = threading.Event()
        self.error: Exception | None = None
        """Error that ended the inputs early. The reader raises it after the last answer."""

    def messages(self) -> Iterator[wire.StreamInferRequest]:
        """Yield requests, each when there is room for its inputs. Inputs before an error are still sent."""
        while group := self._group():
            try:
                message = self._exchange.open(self._message(group))
            except Exception as error:  # noqa: BLE001 - the boundary to gRPC's thread: the reader raises it
                self.error = error
                return
            yield message

    def _group(self) -> list[wire.Sequence]:
        """Take the inputs of one message; fewer if the inputs end or fail."""
        group: list[wire.Sequence] = []
        while len(group) < self._per_message and self.error is None:
            self._slots.acquire()
            if self._closed.is_set():
                return []
            try:
                group.append(self._sequence(next(self._inputs)))
            except StopIteration:
                break
            except Exception as error:  # noqa: BLE001 - raised by the inputs, or an input that cannot be sent
                self.error = error
        return group

    def answered(self) -> None:
        """Make room for one more input. Called by the reader after each answer."""
        self._slots.release()

    def close(self) -> None:
        """End the feed, and wake gRPC's thread if it waits for room."""
        self._closed.set()
        self._slots.release()


async def _each(inputs: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(inputs, AsyncIterable):
        async for one in inputs:
            yield one
    else:
        for one in inputs:
            yield one
