"""The queue: sequences waiting for a run, in the order in which they count as having come. Event loop only."""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

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

    @property
    def key(self) -> tuple[float, int]:
        """Its place in line."""
        return self.view.rank_s, self.number


class Queue:
    """Waiting sequences, oldest first, with running totals. Event loop only; admission keeps it bounded."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._tokens = 0
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def totals(self) -> Demand:
        """Everything that waits, together."""
        return Demand(len(self._entries), self._tokens, self._bytes)

    def push(self, entry: Entry) -> None:
        """Puts a sequence in its place in line."""
        insort(self._entries, entry, key=lambda one: one.key)
        entry.waiting = True
        self._tokens += entry.sequence.tokens
        self._bytes += entry.bytes

    def remove(self, entry: Entry) -> None:
        """Takes out a sequence that waits."""
        at = bisect_left(self._entries, entry.key, key=lambda one: one.key)
        assert self._entries[at] is entry
        del self._entries[at]
        entry.waiting = False
        self._tokens -= entry.sequence.tokens
        self._bytes -= entry.bytes

    def front(self, count: int) -> list[Entry]:
        """The oldest, at most `count`."""
        return list(islice(self._entries, count))
