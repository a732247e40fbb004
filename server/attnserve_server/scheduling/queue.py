"""The queue: sequences waiting for a run, in the order in which they count as having come. Event loop only."""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from attnserve_server.domain.values import PreparedSequence, SequenceResult
from attnserve_server.engine.session import RunHandle
from attnserve_server.scheduling.admission import Demand
from attnserve_server.scheduling.policy import Waiting


@dataclass(slots=True, eq=False)
class Request:
    """One submitted request: its sequences succeed together, or the first error is raised. Event loop only."""

    future: asyncio.Future[list[SequenceResult]]
    arrived_s: float
    deadline_s: float | None
    size: int
    """How many sequences it has."""
    request_id: str = ""
    """Its name, for the log."""
    entries: list[Entry] = field(default_factory=list)
    """Its sequences; emptied at its end, so that nothing is kept alive by a circle of references."""
    results: dict[int, SequenceResult] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Run:
    """One run under way. `present` counts members whose callers still wait for it. Event loop only."""

    handle: RunHandle
    entries: Sequence[Entry]
    present: int
    tokens: int


@dataclass(slots=True, eq=False)
class Entry:
    """One sequence on its way: `waiting` while in the queue, with a `run` while it runs. Event loop only."""

    request: Request
    index: int
    """Its place in the request."""
    number: int
    """Its place in the order of all arrivals: settles ties."""
    sequence: PreparedSequence
    view: Waiting
    bytes: int
    waiting: bool = False
    run: Run | None = None


class Queue:
    """Waiting sequences with running totals, in line and by length. Event loop only; admission keeps it bounded."""

    def __init__(self) -> None:
        self._line: list[Entry] = []  # oldest first
        self._by_length: list[Entry] = []  # shortest first, and apart where axes do not pad
        self._tokens = 0
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._line)

    @property
    def totals(self) -> Demand:
        """Everything that waits, together."""
        return Demand(len(self._line), self._tokens, self._bytes)

    def push(self, entry: Entry) -> None:
        """Puts a sequence in its place."""
        insort(self._line, entry, key=_place_in_line)
        insort(self._by_length, entry, key=_place_by_length)
        entry.waiting = True
        self._tokens += entry.sequence.tokens
        self._bytes += entry.bytes

    def remove(self, entry: Entry) -> None:
        """Takes out a sequence that waits."""
        for entries, place in ((self._line, _place_in_line), (self._by_length, _place_by_length)):
            at = bisect_left(entries, place(entry), key=place)
            assert entries[at] is entry
            del entries[at]
        entry.waiting = False
        self._tokens -= entry.sequence.tokens
        self._bytes -= entry.bytes

    def view(self, count: int) -> list[Entry]:
        """The oldest, first, and of all others the `count` nearest to it in length, half of them on either side.

        The more there is to choose from, the nearer in length they are.
        """
        oldest = self._line[0]
        at = bisect_left(self._by_length, _place_by_length(oldest), key=_place_by_length)
        half = (count + 1) // 2
        return [oldest, *self._by_length[max(0, at - half) : at], *self._by_length[at + 1 : at + 1 + half]]


def _place_in_line(entry: Entry) -> tuple[float, int]:
    return entry.view.rank_s, entry.number


def _place_by_length(entry: Entry) -> tuple[tuple[int, ...], int, int]:
    return entry.view.rigid, entry.view.tokens, entry.number
