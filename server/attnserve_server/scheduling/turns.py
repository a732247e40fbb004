"""Whose turn it is: the callers with waiting sequences, each in order of arrival, and what each has had of late.

The caller that has had least runs next, in seconds as the cost model predicts them. A caller that comes back after a
pause has had as much as the one that was served last, so that nothing is saved up. With one caller, the order is that
of arrival. Each request costs a step in a heap of the callers.

Source: P. Goyal, H. Vin, H. Cheng: Start-time fair queueing, IEEE/ACM Transactions on Networking 5 (1997), section 2.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heappop, heappush
from operator import attrgetter
from typing import TYPE_CHECKING, Final

from attnserve_server.scheduling.admission import Demand

if TYPE_CHECKING:
    from attnserve_server.scheduling.queue import Entry

_arrival_key: Final = attrgetter("arrival_key")
_MOST_KEPT: Final = 1024
"""Callers without waiting sequences that are remembered, because they have had more than others."""


class _Line:
    """The waiting sequences of one caller."""

    __slots__ = ("bytes", "entries", "had_s", "served", "tokens")

    def __init__(self, had_s: float) -> None:
        self.entries: list[Entry] = []  # oldest first
        self.had_s = had_s
        self.served = 0  # the number of the charge that was its last
        self.tokens = self.bytes = 0


class Turns:
    """The lines of all callers. Event loop only."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        self._heap: list[tuple[float, int, int, str]] = []  # those with sequences; an item may be out of date
        self._now_s = 0.0  # what the caller that was served last had had before
        self._charges = 0
        self._pushes = 0
        self._busy = 0

    @property
    def callers(self) -> int:
        """Callers with waiting sequences."""
        return self._busy

    def waiting(self, caller: str) -> Demand:
        """Return what waits of one caller."""
        line = self._lines.get(caller)
        return Demand(0, 0, 0) if line is None else Demand(len(line.entries), line.tokens, line.bytes)

    def push(self, entry: Entry) -> None:
        """Add a sequence."""
        caller = entry.request.caller
        line = self._lines.get(caller)
        if line is None:
            line = self._lines[caller] = _Line(self._now_s)
        if not line.entries:
            self._busy += 1
            line.had_s = max(line.had_s, self._now_s)
            self._queue(caller, line)
        if line.entries and line.entries[-1].arrival_key > entry.arrival_key:
            insort(line.entries, entry, key=_arrival_key)
        else:  # the usual order
            line.entries.append(entry)
        line.tokens += entry.candidate.tokens
        line.bytes += entry.bytes

    def remove(self, entry: Entry) -> None:
        """Remove a sequence that waits."""
        caller = entry.request.caller
        line = self._lines[caller]
        at = bisect_left(line.entries, entry.arrival_key, key=_arrival_key)
        assert line.entries[at] is entry
        del line.entries[at]
        line.tokens -= entry.candidate.tokens
        line.bytes -= entry.bytes
        if not line.entries:
            self._busy -= 1
            if line.had_s <= self._now_s:
                del self._lines[caller]
            elif len(self._lines) > self._busy + _MOST_KEPT:
                self._lines = {name: one for name, one in self._lines.items() if one.entries}

    def first(self) -> Entry:
        """Return the oldest sequence of the caller whose turn it is. Raise IndexError if none waits."""
        while True:
            had_s, served, _, caller = self._heap[0]
            line = self._lines.get(caller)
            if line is not None and line.entries and (line.had_s, line.served) == (had_s, served):
                return line.entries[0]
            heappop(self._heap)

    def charge(self, entries: Sequence[Entry], seconds: Sequence[float]) -> None:
        """Count a run. Call it before its sequences are removed.

        Args:
            entries: the run's sequences; the first is the one whose turn it was.
            seconds: what each takes.
        """
        if self._busy == 1:
            return  # no one to compare with
        self._now_s = max(self._now_s, self._lines[entries[0].request.caller].had_s)
        taken: dict[str, float] = {}
        for entry, cost_s in zip(entries, seconds, strict=True):
            taken[entry.request.caller] = taken.get(entry.request.caller, 0.0) + cost_s
        for caller, cost_s in taken.items():
            line = self._lines[caller]
            self._charges += 1
            line.had_s, line.served = line.had_s + cost_s, self._charges
            self._queue(caller, line)

    def _queue(self, caller: str, line: _Line) -> None:
        self._pushes += 1
        heappush(self._heap, (line.had_s, line.served, self._pushes, caller))
