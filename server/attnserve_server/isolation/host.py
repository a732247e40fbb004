"""One model in its engine's process: requests of all fronts go to one scheduler, so that batches stay full.

A request that a front withdraws is cancelled, and so are all of a front that ends.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable
from functools import partial

from attnserve_server.domain.errors import AttnserveError
from attnserve_server.domain.values import Priority, SequenceResult
from attnserve_server.isolation.arena import Arena, LoadBoard, LoadFacts
from attnserve_server.isolation.link import Link
from attnserve_server.isolation.messages import (
    ENCODER,
    TO_ENGINE,
    Ask,
    Inbox,
    Outbox,
    Released,
    Withdraw,
    failure,
)
from attnserve_server.scheduling.queue import Request
from attnserve_server.scheduling.scheduler import Scheduler

Results = asyncio.Future[list[SequenceResult]]


class Host:
    """Serves fronts from one scheduler, and publishes its load. Event loop only."""

    def __init__(self, scheduler: Scheduler, board: LoadBoard) -> None:
        self._scheduler = scheduler
        self._board = board
        self._fronts: set[_Front] = set()
        self._is_due = False

    async def attach(self, end: socket.socket, arenas: tuple[Arena, Arena]) -> None:
        """Serve one front.

        Args:
            end: of the socket pair of the front.
            arenas: of this process, for results, and of the front, for requests.
        """
        front = _Front(self._scheduler, arenas, self._changed, self._fronts.discard)
        await front.open(end)
        self._fronts.add(front)
        self._publish()

    def close(self) -> None:
        """Close all links."""
        for front in tuple(self._fronts):
            front.close()

    def _changed(self) -> None:
        """Publish the load once in this turn of the loop."""
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._publish)

    def _publish(self) -> None:
        self._is_due = False
        load = self._scheduler.load()
        waiting, speed = load.waiting, load.seconds_per_token
        self._board.write(
            LoadFacts(
                waiting.sequences,
                waiting.tokens,
                waiting.bytes,
                load.running_tokens,
                load.instances,
                math.nan if speed is None else speed,
            )
        )


class _Front:
    """The requests of one front."""

    def __init__(
        self,
        scheduler: Scheduler,
        arenas: tuple[Arena, Arena],
        changed: Callable[[], None],
        gone: Callable[[_Front], None],
    ) -> None:
        self._scheduler = scheduler
        own, fronts = arenas
        self._changed, self._on_gone = changed, gone
        self._outbox = Outbox(own)
        self._inbox = Inbox(fronts, self._send)
        self._running: dict[int, Results] = {}
        self._link: Link | None = None

    async def open(self, end: socket.socket) -> None:
        self._link = await Link.open(end, self._receive, self._lost)

    def close(self) -> None:
        if self._link is not None:
            self._link.close()

    def _receive(self, data: memoryview) -> None:
        message = TO_ENGINE.decode(data)
        if isinstance(message, Ask):
            self._start(message)
        elif isinstance(message, Withdraw):
            results = self._running.get(message.number)
            if results is not None:
                results.cancel()
        elif isinstance(message, Released):
            self._outbox.released(message.numbers)

    def _start(self, message: Ask) -> None:
        request = Request(message.request_id, message.deadline_s, message.received_bytes)
        try:
            results = self._scheduler.submit(request, self._inbox.sequences(message), Priority(message.priority))
        except AttnserveError as error:
            self._send(ENCODER.encode(failure(message.number, error)))
            return
        self._running[message.number] = results
        self._changed()
        results.add_done_callback(partial(self._end, message.number))

    def _end(self, number: int, results: Results) -> None:
        del self._running[number]
        self._changed()
        if results.cancelled():
            return  # the front has withdrawn it, or has ended
        error = results.exception()
        if error is not None:
            self._send(ENCODER.encode(failure(number, error)))
        else:
            self._send(self._outbox.answer(number, results.result()))

    def _send(self, data: bytes) -> None:
        if self._link is not None:
            self._link.send(data)

    def _lost(self) -> None:
        self._link = None
        self._on_gone(self)
        for results in tuple(self._running.values()):
            results.cancel()
