"""A front's stand-in for a model's scheduler: requests go to the engine's process, and results come back.

It refuses requests without a message, by the load that the engine publishes, as the engine's scheduler would. The
engine decides again, because several fronts share it. While there is no engine, requests wait here, and all that are
not answered go to the next engine.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Final

from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import AttnserveError, DeadlineExpired, EngineCrashed, NotServing, Overloaded
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
    Resent,
    Withdraw,
    error_of,
)
from attnserve_server.observability.logs import logger
from attnserve_server.observability.metrics import ModelMetrics
from attnserve_server.scheduling.admission import Demand, Load, refusal
from attnserve_server.scheduling.deadlines import Deadlines
from attnserve_server.scheduling.policy import SchedulingSettings
from attnserve_server.scheduling.queue import Request

_log = logger(__name__)

_SMALLEST = Demand(1, 1, 0)
MOST_SENDS: Final = 8
"""The most engines that get one request: one that ends them outside of a run is never found as the culprit."""
_NOTHING: Final = Demand(0, 0, 0)
_HOPE: Final = 0.5
"""Share of the expected time to the next engine within which a deadline is hopeless: an estimate may be too long."""


def _changed(held: Demand, demand: Demand, sign: int) -> Demand:
    """Return `held` with a request added, or subtracted."""
    return Demand(
        held.sequences + sign * demand.sequences, held.tokens + sign * demand.tokens, held.bytes + sign * demand.bytes
    )


def _least(one: Demand, other: Demand) -> Demand:
    return Demand(min(one.sequences, other.sequences), min(one.tokens, other.tokens), min(one.bytes, other.bytes))


@dataclass(slots=True)
class _Pending:
    """A request that has no answer. `sent`: number of engines that got it."""

    request: Request
    asked: bytes
    size: Demand
    sent: int = 0


class _Connection:
    """The link to one engine. What arrives from an engine that was replaced is dropped."""

    def __init__(self, answers: Arena) -> None:
        self.link: Link | None = None
        self.inbox = Inbox(answers, self.send)
        self.answers = answers

    def send(self, data: bytes) -> None:
        if self.link is not None:
            self.link.send(data)

    def close(self) -> None:
        link, self.link = self.link, None
        if link is not None:
            link.close()
        self.answers.close()


class RemoteScheduler:
    """The scheduler of one model in another process. Event loop only."""

    def __init__(
        self,
        model: str,
        requests: Arena,
        board: LoadBoard,
        settings: SchedulingSettings,
        clock: Clock,
        metrics: ModelMetrics,
    ) -> None:
        """Store the parts; `connect` gives it an engine. Until then requests wait.

        Args:
            model: its name, for errors.
            requests: arena of this process, for requests.
            board: the engine's load.
            settings: bounds of the queue.
            clock: the monotonic clock, which all processes share.
            metrics: of the model.
        """
        self._model = model
        self._board = board
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._requests = requests
        self._outbox = Outbox(requests)
        self._numbers = count(1)
        self._pending: dict[int, _Pending] = {}
        self._all = _NOTHING  # of those
        self._own: dict[str, Demand] = {}  # by caller
        self._connection: _Connection | None = None
        self._deadlines = Deadlines(clock, self._expire)
        self._ready_s = 0.0  # when the next engine is expected
        self._refuses = ""

    async def connect(self, end: socket.socket, answers: Arena, suspects: Iterable[int] = ()) -> None:
        """Use an engine from now on, and send it all requests that have no answer. Not after `close`.

        Args:
            end: of the socket pair of the engine.
            answers: arena of the engine, for results.
            suspects: requests of this process that were in a run of an engine that crashed; sent first.
        """
        self._disconnect()
        self._outbox.replaced()
        connection = self._connection = _Connection(answers)
        link = await Link.open(end, partial(self._receive, connection), partial(self._lost, connection))
        if self._connection is not connection:
            link.close()
            return
        connection.link = link
        self._refuses = ""
        for number in sorted(self._pending, key=set(suspects).__contains__, reverse=True):
            self._resend(number, connection)
        connection.send(ENCODER.encode(Resent()))

    def expect(self, seconds: float) -> None:
        """Note that there is no engine before about so many seconds. Fail requests whose deadlines pass before."""
        self._ready_s = self._clock.now() + seconds
        for pending in tuple(self._pending.values()):
            deadline = pending.request.deadline_s
            if self._connection is None and deadline is not None and self._is_hopeless(deadline):
                pending.request.fail(self._not_serving())

    def crashed(self, number: int) -> None:
        """Fail a request that ended an engine alone in its run."""
        pending = self._pending.get(number)
        if pending is not None and pending.request.fail(EngineCrashed(self._model)):
            _log.error("a request ended its engine", model=self._model, request_id=pending.request.request_id)

    def refuse(self, state: str) -> None:
        """Fail all pending requests, and refuse others until the next engine: the model has failed."""
        self._refuses = state
        self._fail_all(state)

    def close(self) -> None:
        """Fail all pending requests, and close the link."""
        self._disconnect()
        self.refuse("failed")
        self._deadlines.close()

    async def aclose(self) -> None:
        """Close it, and unmap its memory. It takes no request after that."""
        self.close()
        await self.drained()
        self._requests.close()
        self._board.close()

    async def drained(self) -> None:
        """Return when no request is pending."""
        while self._pending:
            await asyncio.wait([one.request.results for one in self._pending.values()])

    def check_room(self, deadline: float | None, caller: str = "") -> None:
        """Raise what `submit` would raise now for the smallest request."""
        self._admit(_SMALLEST, self._serving_at(deadline), deadline, caller)

    def load(self, caller: str | None = None) -> Load:
        """Return what waits and runs, as a request of `caller` meets it: in the engine, or here if there is none."""
        own = None if caller is None else self._own.get(caller, _NOTHING)
        if self._connection is None:
            # No speed is known without an engine: only the bounds of the queue count.
            return Load(self._all, 0, 1, None, own, len(self._own))
        facts = self._board.read()
        waiting = Demand(facts.sequences, facts.tokens, facts.bytes)
        seconds = None if math.isnan(facts.seconds_per_token) else facts.seconds_per_token
        if own is not None:
            own = _least(own, waiting)  # what runs counts as well, so that the engine may admit more
        return Load(waiting, facts.running_tokens, max(1, facts.instances), seconds, own, facts.callers)

    def submit(
        self, request: Request, sequences: Sequence[PreparedSequence], priority: Priority = Priority.NORMAL
    ) -> asyncio.Future[list[SequenceResult]]:
        """Send a request to the engine, and return the future of its results. As `Scheduler.submit`.

        Raises:
            NotServing: The model has failed, or its next engine is expected after the deadline.
            Overloaded: The queue is full, or the predicted wait exceeds the time to the deadline.
            DeadlineExpired: The deadline has passed.
        """
        now = self._serving_at(request.deadline_s)
        size = sum([one.bytes + one.response_bytes for one in sequences])
        demand = Demand(len(sequences), sum([one.tokens for one in sequences]), size)
        self._admit(demand, now, request.deadline_s, request.caller)
        number = next(self._numbers)
        asked = self._outbox.ask(
            number,
            request.request_id,
            request.deadline_s,
            request.received_bytes,
            priority.value,
            sequences,
            request.caller,
            None if request.trace is None else request.trace.sent,
        )
        request.admit(now)
        pending = self._pending[number] = _Pending(request, asked, demand)
        self._count(request.caller, demand, 1)
        connection = self._connection
        if connection is not None and connection.link is not None:
            pending.sent = 1
            self._outbox.sent(number)
            connection.link.send(asked)
        if request.deadline_s is not None:
            self._deadlines.add(request)
        results = request.results
        results.add_done_callback(partial(self._end, number, request))
        return results

    def _serving_at(self, deadline: float | None) -> float:
        if self._refuses:
            raise NotServing(self._model, self._refuses)
        now = self._clock.now()
        if deadline is not None and deadline <= now:
            raise DeadlineExpired(0.0)
        return now

    def _admit(self, demand: Demand, now: float, deadline: float | None, caller: str) -> None:
        if self._connection is None:
            if deadline is not None and self._is_hopeless(deadline):
                raise self._not_serving()
            deadline = None
        else:
            facts = self._board.read()
            if not facts.sequences and (deadline is None or not facts.running_tokens):
                return  # the usual case
        load = self.load(caller)
        refused = refusal(demand, load, None if deadline is None else deadline - now, self._settings)
        if refused is not None:
            raise self._refused(refused)

    def _refused(self, error: Overloaded) -> Overloaded:
        self._metrics.refused(error.cause)
        return error

    def _is_hopeless(self, deadline: float) -> bool:
        now = self._clock.now()
        return deadline < now + _HOPE * (self._ready_s - now)

    def _not_serving(self) -> NotServing:
        return NotServing(self._model, "loading", max(0.1, self._ready_s - self._clock.now()))

    def _resend(self, number: int, connection: _Connection) -> None:
        pending = self._pending[number]
        if pending.request.ended:
            return
        pending.sent += 1
        if pending.sent <= MOST_SENDS:
            self._outbox.sent(number)
            connection.send(pending.asked)
        else:
            pending.request.fail(NotServing(self._model, "loading"))

    def _end(self, number: int, request: Request, _: asyncio.Future[list[SequenceResult]]) -> None:
        """Forget a request that has ended; withdraw it from the engine if that has not answered."""
        if self._forget(number) is not None and self._connection is not None:
            deadline = request.deadline_s
            expired = deadline is not None and self._clock.now() >= deadline
            self._connection.send(ENCODER.encode(Withdraw(number, expired)))
        self._outbox.ended(number)
        self._deadlines.discard(request)
        request.release()

    def _forget(self, number: int) -> Request | None:
        pending = self._pending.pop(number, None)
        if pending is None:
            return None
        self._count(pending.request.caller, pending.size, -1)
        return pending.request

    def _count(self, caller: str, demand: Demand, sign: int) -> None:
        self._all = _changed(self._all, demand, sign)
        own = _changed(self._own.get(caller, _NOTHING), demand, sign)
        if own.sequences:
            self._own[caller] = own
        else:
            del self._own[caller]

    def _receive(self, connection: _Connection, data: memoryview) -> None:
        if connection is not self._connection:
            return
        message = TO_FRONT.decode(data)
        if isinstance(message, Released):
            self._outbox.released(message.numbers)
            return
        request = self._forget(message.number)
        if isinstance(message, Answer):
            results = connection.inbox.results(message)  # also of one that has ended, so that its memory is released
            if request is not None:
                request.finish(results)
        elif isinstance(message, Failed) and request is not None:
            request.fail(error_of(message))

    def _lost(self, connection: _Connection) -> None:
        if connection is self._connection:
            self._disconnect()

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _expire(self, request: Request) -> None:
        request.fail(DeadlineExpired(self._clock.now() - request.arrived_s))

    def _fail_all(self, state: str) -> None:
        for pending in tuple(self._pending.values()):
            error: AttnserveError = NotServing(self._model, state)
            pending.request.fail(error)
