"""Requests, the states that they pass through, and the queue in which their sequences wait. Event loop only.

RECEIVED -> ADMITTED -> RUNNING -> ANSWERED
   |            |          |
   +------------+----------+-----> FAILED        (RECEIVED -> ANSWERED: a request that was only validated)

Any other change of state raises AssertionError.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from operator import attrgetter
from types import TracebackType
from typing import TYPE_CHECKING, Final

from attnserve_server.domain.values import PreparedSequence, SequenceResult
from attnserve_server.engine.cost import CostModel
from attnserve_server.scheduling.admission import Demand
from attnserve_server.scheduling.policy import Candidate
from attnserve_server.scheduling.turns import Turns

if TYPE_CHECKING:  # the engine imports the runtime, which a front process does without; traces need an extra
    from attnserve_server.engine.session import RunHandle
    from attnserve_server.observability.audit import Note
    from attnserve_server.observability.tracing import Trace

_length_key: Final = attrgetter("length_key")


class State(IntEnum):
    """Where a request is, or one of its sequences."""

    RECEIVED = 0
    """Parsed and named; it is being validated, or waits for its share of a stream's allowance."""
    ADMITTED = 1
    """Waits in the queue."""
    RUNNING = 2
    """Of a sequence: in a run. Of a request: one of its sequences has started."""
    ANSWERED = 3
    """Has its results."""
    FAILED = 4
    """Ended by an error, an expired deadline or a cancellation."""


_NEXT: Final = (
    (State.ADMITTED, State.ANSWERED, State.FAILED),
    (State.RUNNING, State.FAILED),
    (State.ANSWERED, State.FAILED),
    (),
    (),
)
"""By state: the states that may follow it."""


def _moved(old: State, new: State) -> State:
    """Return `new`; the only place where a state changes."""
    assert new in _NEXT[old], f"{old.name} cannot become {new.name}"
    return new


class Request:
    """One request, from its arrival to its end. Its sequences succeed together, or the first error fails all.

    As a context manager it fails with the exception that leaves the block, if it has not ended.
    """

    __slots__ = (
        *("_results", "_waiter", "arrived_s", "caller", "deadline_s", "entries", "note", "received_bytes"),
        *("request_id", "state", "trace"),
    )

    def __init__(
        self, request_id: str = "", deadline_s: float | None = None, received_bytes: int = 0, caller: str = ""
    ) -> None:
        """Begin in RECEIVED.

        Args:
            request_id: the request's name, for logs.
            deadline_s: monotonic seconds; None: it never expires.
            received_bytes: of its message. They count as long as it waits, because its tensors keep them in memory.
            caller: who shares turns with other callers: the name of a token, else an address.
        """
        self.caller = caller
        self.request_id = request_id
        self.deadline_s = deadline_s
        self.received_bytes = received_bytes
        self.state = State.RECEIVED
        self.arrived_s = 0.0
        """When it was admitted, in monotonic seconds."""
        self.trace: Trace | None = None
        """Where its spans go; None: it has none."""
        self.note: Note | None = None
        """What the audit log keeps of it until it ends; None without such a log, and afterwards."""
        self.entries: list[Entry] = []
        self._results: dict[int, SequenceResult] = {}
        self._waiter: asyncio.Future[list[SequenceResult]] | None = None

    @property
    def ended(self) -> bool:
        """Whether it is answered or failed.

        A cancelled waiter counts at once: the task that awaits the results withdraws the request one turn of the
        loop later.
        """
        return self.state >= State.ANSWERED or (self._waiter is not None and self._waiter.done())

    def admit(self, now: float) -> None:
        """Enter ADMITTED; the results can be awaited from now on."""
        self.state = _moved(self.state, State.ADMITTED)
        self.arrived_s = now
        self._waiter = asyncio.get_running_loop().create_future()

    @property
    def results(self) -> asyncio.Future[list[SequenceResult]]:
        """The future of the results, in the order of the sequences, or of the error that the request fails with.

        Cancelling it, or the task that awaits it, cancels the request.
        """
        assert self._waiter is not None, "the request was not admitted"
        return self._waiter

    def add_result(self, index: int, result: SequenceResult) -> None:
        """Keep the result of one sequence; the last one answers the request."""
        self._results[index] = result
        if len(self._results) == len(self.entries):
            self.answer()

    def answer(self) -> None:
        """Enter ANSWERED with the results of all sequences."""
        self.state = _moved(self.state, State.ANSWERED)
        if self._waiter is not None:
            self._waiter.set_result([self._results[index] for index in range(len(self._results))])

    def finish(self, results: list[SequenceResult]) -> None:
        """Enter ANSWERED with results that another process computed, unless the request has ended already."""
        if self.state is State.ADMITTED and not self.results.done():
            self.state = _moved(_moved(self.state, State.RUNNING), State.ANSWERED)
            self.results.set_result(results)

    def fail(self, error: BaseException) -> bool:
        """Enter FAILED and raise `error` where the results are awaited; return False if it has ended already."""
        if self.state >= State.ANSWERED:
            return False
        self.state = _moved(self.state, State.FAILED)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)
        return True

    def add_done_callback(self, callback: Callable[[object], None]) -> None:
        """Call `callback` once the request has ended, after the task that awaits the results was woken."""
        self.results.add_done_callback(callback)

    def release(self) -> None:
        """Drop sequences and results, so that neither a circle of references nor an error's traceback keeps them."""
        self.entries.clear()
        self._results = {}
        self._waiter = None

    def __enter__(self) -> Request:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self.fail(error)


@dataclass(slots=True, eq=False)
class Run:
    """One batch that runs."""

    handle: RunHandle
    present: int
    """Sequences whose requests have not ended."""
    tokens: int


@dataclass(slots=True, eq=False)
class Entry:
    """One sequence of an admitted request, in the queue or in a run."""

    request: Request
    index: int
    """Its position in the request."""
    number: int
    """Its position in the order of all arrivals, which settles ties."""
    sequence: PreparedSequence
    candidate: Candidate
    """What the policy knows of it."""
    bytes: int
    state: State = State.ADMITTED
    run: Run | None = None
    arrival_key: tuple[float, int] = field(init=False)
    """Its place in the order of arrivals."""
    length_key: tuple[tuple[int, ...], int, int] = field(init=False)
    """Its place among all lengths, grouped by those along axes that do not pad."""

    def __post_init__(self) -> None:
        candidate, number = self.candidate, self.number
        self.arrival_key = candidate.adjusted_arrival_s, number
        self.length_key = candidate.rigid, candidate.tokens, number

    def start(self, run: Run) -> None:
        """Enter RUNNING; so does the request, with its first sequence."""
        self.state = _moved(self.state, State.RUNNING)
        self.run = run
        if self.request.state is State.ADMITTED:
            self.request.state = _moved(State.ADMITTED, State.RUNNING)

    def answer(self, result: SequenceResult) -> None:
        """Enter ANSWERED; so does the request, with its last sequence."""
        self.state = _moved(self.state, State.ANSWERED)
        self.run = None
        self.request.add_result(self.index, result)

    def fail(self) -> None:
        """Enter FAILED."""
        self.state = _moved(self.state, State.FAILED)
        self.run = None


class Queue:
    """Waiting sequences with running totals, by turns of their callers and by length. Admission keeps it bounded."""

    def __init__(self) -> None:
        self._turns = Turns()
        self._count = 0
        self._by_length: list[Entry] = []  # shortest first, grouped by lengths along axes that do not pad
        self._tokens = 0
        self._bytes = 0
        self._continued = 0  # sequences with a past

    def __len__(self) -> int:
        return self._count

    @property
    def totals(self) -> Demand:
        """The sum of all waiting sequences."""
        return Demand(self._count, self._tokens, self._bytes)

    @property
    def callers(self) -> int:
        """Callers with waiting sequences."""
        return self._turns.callers

    def waiting(self, caller: str) -> Demand:
        """Return what waits of one caller."""
        return self._turns.waiting(caller)

    def push(self, entry: Entry) -> None:
        """Insert a sequence."""
        self._turns.push(entry)
        self._count += 1
        insort(self._by_length, entry, key=_length_key)
        self._tokens += entry.candidate.tokens
        self._bytes += entry.bytes
        self._continued += entry.candidate.past > 0

    def remove(self, entry: Entry) -> None:
        """Remove a sequence that is in the queue."""
        self._turns.remove(entry)
        self._count -= 1
        at = bisect_left(self._by_length, _length_key(entry), key=_length_key)
        assert self._by_length[at] is entry
        del self._by_length[at]
        self._tokens -= entry.candidate.tokens
        self._bytes -= entry.bytes
        self._continued -= entry.candidate.past > 0

    def take(self, entries: list[Entry], cost: CostModel) -> None:
        """Remove the sequences of a run, and count what it takes to their callers."""
        if self._turns.callers > 1:
            common_s = cost.run_s / len(entries)
            self._turns.charge(entries, [common_s + cost.row_s(entry.candidate.tokens) for entry in entries])
        for entry in entries:
            self.remove(entry)

    def candidates(self, count: int) -> list[Entry]:
        """Return the oldest sequence of the caller whose turn it is, and the `count` nearest to it in length.

        Half of these are on either side.

        Sequences with a past and those without one run on different graphs: only those of the oldest's are returned.
        Raise IndexError for an empty queue.
        """
        oldest = self._turns.first()
        at = bisect_left(self._by_length, _length_key(oldest), key=_length_key)
        half = (count + 1) // 2
        near = [*self._by_length[max(0, at - half) : at], *self._by_length[at + 1 : at + 1 + half]]
        if self._continued:
            near = [entry for entry in near if bool(entry.candidate.past) is bool(oldest.candidate.past)]
        return [oldest, *near]
