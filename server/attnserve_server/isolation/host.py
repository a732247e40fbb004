"""One model in its engine's process: requests of all fronts go to one scheduler, so that batches stay full.

A request that a front withdraws is cancelled, and so are all of a front that ends. After a crash, the requests that
were in a run are suspects: they run first, one at a time and with nothing beside them, so that another crash names the
request that causes it. All others wait until then.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections import deque
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Final

from attnserve_server.domain.errors import AttnserveError
from attnserve_server.domain.values import Priority, SequenceResult
from attnserve_server.engine.pulse import Origin, Pulse
from attnserve_server.isolation.arena import Arena, LoadBoard, LoadFacts
from attnserve_server.isolation.link import Link
from attnserve_server.isolation.messages import (
    ENCODER,
    TO_ENGINE,
    Ask,
    Inbox,
    Outbox,
    Released,
    Resent,
    Withdraw,
    failure,
)
from attnserve_server.scheduling.queue import Request
from attnserve_server.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from attnserve_server.observability.tracing import Tracing

Results = asyncio.Future[list[SequenceResult]]

_RESEND_S: Final = 5.0
"""Seconds that fronts have to send their suspects again."""


class Host:
    """Serves fronts from one scheduler, and publishes its load. Event loop only."""

    def __init__(
        self,
        scheduler: Scheduler,
        board: LoadBoard,
        pulse: Pulse | None = None,
        suspects: Mapping[int, Iterable[int]] | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """Begin without fronts.

        Args:
            scheduler: of the model.
            board: for its load.
            pulse: of the process; states while suspects run.
            suspects: numbers of requests, by that of their front. A front that has nothing of them sends `Resent`.
            tracing: takes the spans of requests whose front traces them; None: they have none here.
        """
        self.tracing = tracing
        self._scheduler = scheduler
        self._board = board
        self._fronts: set[_Front] = set()
        self._is_due = False
        self._gate = Gate({front: set(numbers) for front, numbers in (suspects or {}).items()}, pulse or Pulse())

    async def attach(self, end: socket.socket, arenas: tuple[Arena, Arena], number: int = 0) -> None:
        """Serve one front.

        Args:
            end: of the socket pair of the front.
            arenas: of this process, for results, and of the front, for requests.
            number: of the front.
        """
        front = _Front(self, arenas, number)
        await front.open(end)
        self._fronts.add(front)
        self._publish()

    def close(self) -> None:
        """Close all links."""
        for front in tuple(self._fronts):
            front.close()

    @property
    def gate(self) -> Gate:
        """Decides when a request goes to the scheduler."""
        return self._gate

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler of the model."""
        return self._scheduler

    def forget(self, front: _Front) -> None:
        """Serve a front no more, which has ended."""
        self._fronts.discard(front)

    def changed(self) -> None:
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
                load.callers,
            )
        )


class Gate:
    """Lets requests through: suspects one at a time, and all others once no suspect is left. Event loop only."""

    def __init__(self, suspects: dict[int, set[int]], pulse: Pulse) -> None:
        self._expected = {front: numbers for front, numbers in suspects.items() if numbers}
        self._pulse = pulse
        self._suspects: deque[tuple[_Front, Ask]] = deque()
        self._others: deque[tuple[_Front, Ask]] = deque()
        self._running: Origin | None = None
        self._is_open = not self._expected
        pulse.alone = not self._is_open
        if not self._is_open:
            self._timer = asyncio.get_running_loop().call_later(_RESEND_S, self._expect_no_more)

    def take(self, front: _Front, message: Ask) -> None:
        """Start a request, now or later."""
        if self._is_open:
            front.start(message)
            return
        expected = self._expected.get(front.number, set())
        if message.number in expected:
            expected.discard(message.number)
            self._suspects.append((front, message))
            self._proceed()
        else:
            self._others.append((front, message))

    def resent(self, front: _Front) -> None:
        """Note that a front has sent all suspects that it has."""
        if self._expected.pop(front.number, None) is not None:
            self._proceed()

    def withdraw(self, front: _Front, number: int | None = None) -> bool:
        """Drop a request that waits here, or all of a front. Return whether there was one."""
        if self._is_open:
            return False
        before = len(self._suspects) + len(self._others)
        for waiting in (self._suspects, self._others):
            kept = [one for one in waiting if one[0] is not front or number not in (None, one[1].number)]
            waiting.clear()
            waiting.extend(kept)
        return len(self._suspects) + len(self._others) < before

    def ended(self, front: _Front, number: int) -> None:
        """Note that a request has ended."""
        if (front.number, number) == self._running:
            self._running = None
            self._proceed()

    def _expect_no_more(self) -> None:
        self._expected.clear()
        self._proceed()

    def _proceed(self) -> None:
        while self._running is None and self._suspects:
            front, message = self._suspects.popleft()
            self._running = front.number, message.number
            if not front.start(message):
                self._running = None
        if self._is_open or self._running is not None or any(self._expected.values()):
            return
        self._is_open, self._pulse.alone = True, False
        self._timer.cancel()
        while self._others:
            front, message = self._others.popleft()
            front.start(message)


class _Front:
    """The requests of one front."""

    def __init__(self, host: Host, arenas: tuple[Arena, Arena], number: int) -> None:
        self.number = number
        self._host = host
        self._gate = host.gate
        own, fronts = arenas
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
            self._gate.take(self, message)
        elif isinstance(message, Withdraw):
            results = self._running.get(message.number)
            if results is not None:
                results.cancel()
            elif self._gate.withdraw(self, message.number):
                self._send(ENCODER.encode(Released([message.number])))  # its arrays were never read
        elif isinstance(message, Released):
            self._outbox.released(message.numbers)
        elif isinstance(message, Resent):
            self._gate.resent(self)

    def start(self, message: Ask) -> bool:
        """Submit a request. Return False if it was refused."""
        request = Request(message.request_id, message.deadline_s, message.received_bytes, message.caller)
        if message.trace is not None and self._host.tracing is not None:
            request.trace = self._host.tracing.remote(*message.trace)
        sequences = self._inbox.sequences(message)
        for one in sequences:
            one.origin = self.number, message.number
        try:
            results = self._host.scheduler.submit(request, sequences, Priority(message.priority))
        except AttnserveError as error:
            self._send(ENCODER.encode(failure(message.number, error)))
            return False
        self._running[message.number] = results
        self._host.changed()
        results.add_done_callback(partial(self._end, message.number))
        return True

    def _end(self, number: int, results: Results) -> None:
        del self._running[number]
        self._host.changed()
        # After this turn's messages, so that they are out before the next suspect runs.
        asyncio.get_running_loop().call_soon(self._gate.ended, self, number)
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
        self._host.forget(self)
        self._gate.withdraw(self)
        self._gate.resent(self)
        for results in tuple(self._running.values()):
            results.cancel()
