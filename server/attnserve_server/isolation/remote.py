"""A front's stand-in for a model's scheduler: requests go to the engine's process, and results come back.

It refuses requests without a message, by the load that the engine publishes, as the engine's scheduler would. The
engine decides again, because several fronts share it.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Sequence
from functools import partial
from itertools import count

from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import AttnserveError, DeadlineExpired, NotServing, Overloaded
from attnserve_server.domain.values import PreparedSequence, Priority, SequenceResult
from attnserve_server.isolation.arena import Arena, LoadBoard
from attnserve_server.isolation.link import Link
from attnserve_server.isolation.messages import (
    ENCODER,
    TO_FRONT,
    Answer,
    Failed,
    Inbox,
    Outbox,
    Released,
    Withdraw,
    error_of,
)
from attnserve_server.observability.metrics import ModelMetrics
from attnserve_server.scheduling.admission import Demand, Load, refusal
from attnserve_server.scheduling.policy import SchedulingSettings
from attnserve_server.scheduling.queue import Request

_SMALLEST = Demand(1, 1, 0)


class RemoteScheduler:
    """The scheduler of one model in another process. Event loop only."""

    def __init__(
        self,
        model: str,
        arenas: tuple[Arena, Arena],
        board: LoadBoard,
        settings: SchedulingSettings,
        clock: Clock,
        metrics: ModelMetrics,
    ) -> None:
        """Store the parts; `open` connects it.

        Args:
            model: its name, for errors.
            arenas: of this process, for requests, and of the engine, for results.
            board: the engine's load.
            settings: bounds of the queue.
            clock: the monotonic clock, which all processes share.
            metrics: of the model.
        """
        self._model = model
        self._arena, self._engines = arenas
        self._board = board
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._outbox = Outbox(self._arena)
        self._inbox = Inbox(self._engines, self._send)
        self._numbers = count()
        self._pending: dict[int, Request] = {}
        self._link: Link | None = None

    async def open(self, end: socket.socket) -> None:
        """Connect to the engine by one end of a socket pair."""
        self._link = await Link.open(end, self._receive, self._lost)

    def close(self) -> None:
        """Fail all pending requests, and close the link."""
        link, self._link = self._link, None
        if link is not None:
            link.close()
        self._fail_all()

    async def drained(self) -> None:
        """Return when no request is pending."""
        while self._pending:
            await asyncio.wait([request.results for request in self._pending.values()])

    def check_room(self, deadline: float | None) -> None:
        """Raise what `submit` would raise now for the smallest request."""
        self._admit(_SMALLEST, self._serving_at(deadline), deadline)

    def submit(
        self, request: Request, sequences: Sequence[PreparedSequence], priority: Priority = Priority.NORMAL
    ) -> asyncio.Future[list[SequenceResult]]:
        """Send a request to the engine, and return the future of its results. As `Scheduler.submit`.

        Raises:
            NotServing: The engine has ended.
            Overloaded: The queue is full, or the predicted wait exceeds the time to the deadline.
            DeadlineExpired: The deadline has passed.
        """
        now = self._serving_at(request.deadline_s)
        size = sum([one.bytes + one.response_bytes for one in sequences])
        self._admit(Demand(len(sequences), sum([one.tokens for one in sequences]), size), now, request.deadline_s)
        number = next(self._numbers)
        asked = self._outbox.ask(
            number, request.request_id, request.deadline_s, request.received_bytes, priority.value, sequences
        )
        request.admit(now)
        self._pending[number] = request
        assert self._link is not None
        self._link.send(asked)
        results = request.results
        results.add_done_callback(partial(self._end, number, request))
        return results

    def _serving_at(self, deadline: float | None) -> float:
        if self._link is None:
            raise NotServing(self._model, "failed")
        now = self._clock.now()
        if deadline is not None and deadline <= now:
            raise DeadlineExpired(0.0)
        return now

    def _admit(self, demand: Demand, now: float, deadline: float | None) -> None:
        facts = self._board.read()
        if not facts.sequences and (deadline is None or not facts.running_tokens):
            return
        waiting = Demand(facts.sequences, facts.tokens, facts.bytes)
        seconds = None if math.isnan(facts.seconds_per_token) else facts.seconds_per_token
        load = Load(waiting, facts.running_tokens, max(1, facts.instances), seconds)
        refused = refusal(demand, load, None if deadline is None else deadline - now, self._settings)
        if refused is not None:
            raise self._refused(refused)

    def _refused(self, error: Overloaded) -> Overloaded:
        self._metrics.refused(error.cause)
        return error

    def _end(self, number: int, request: Request, results: asyncio.Future[list[SequenceResult]]) -> None:
        """Forget a request that has ended; withdraw it from the engine if that has not answered."""
        if self._pending.pop(number, None) is not None and self._link is not None:
            deadline = request.deadline_s
            expired = results.cancelled() and deadline is not None and self._clock.now() >= deadline
            self._link.send(ENCODER.encode(Withdraw(number, expired)))
        request.release()

    def _receive(self, data: memoryview) -> None:
        message = TO_FRONT.decode(data)
        if isinstance(message, Released):
            self._outbox.released(message.numbers)
            return
        request = self._pending.pop(message.number, None)
        if isinstance(message, Answer):
            results = self._inbox.results(message)  # also of a request that has ended, so that its memory is released
            if request is not None:
                request.finish(results)
        elif isinstance(message, Failed) and request is not None:
            request.fail(error_of(message))

    def _send(self, data: bytes) -> None:
        if self._link is not None:
            self._link.send(data)

    def _lost(self) -> None:
        self._link = None
        self._fail_all()

    def _fail_all(self) -> None:
        pending, self._pending = self._pending, {}
        for request in pending.values():
            error: AttnserveError = NotServing(self._model, "failed")
            request.fail(error)
