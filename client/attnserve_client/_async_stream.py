"""The event loop's side of a stream: what feeds it, and what ends it when nothing comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

from attnserve.v1 import inference_service_pb2 as wire

from attnserve_client._exchange import Exchange, Flow
from attnserve_client._inputs import Input


async def watch(exchange: Exchange, cancel: Callable[[], object]) -> bool:
    """Ends a stream that has stalled; says whether it did."""
    if exchange.patience_s is None:
        return False
    while (left_s := exchange.stalled_in_s(exchange.patience_s)) > 0:  # noqa: ASYNC110 - it waits for time itself
        await asyncio.sleep(left_s)
    cancel()
    return True


class Feed:
    """What the stream's requests come from, taken by gRPC's own task.

    `answered` and `close` are the reader's. Event loop only.
    """

    def __init__(
        self,
        inputs: Iterable[Input] | AsyncIterable[Input],
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
        """Why there were no more inputs, for the reader to raise when what is under way has been answered."""

    async def messages(self) -> AsyncIterator[wire.StreamInferRequest]:
        """The requests, as there is room for them."""
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
        # What came before the end, or before a fault, is sent all the same.
        try:
            rest = self._exchange.open(self._message(group))
        except Exception as error:  # noqa: BLE001 - as above
            self.error = error
        else:
            yield rest

    def answered(self) -> None:
        """There is room for another."""
        self._slots.release()

    def close(self) -> None:
        """Nobody reads any more. Where the server ended the call, gRPC leaves its task waiting for ever."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()


async def _each(inputs: Iterable[Any] | AsyncIterable[Any]) -> AsyncIterator[Any]:
    if isinstance(inputs, AsyncIterable):
        async for one in inputs:
            yield one
    else:
        for one in inputs:
            yield one
