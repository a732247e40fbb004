"""What the end of a process means: its cause, the pause before the next start, and which request may have caused it."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from attnserve_server.engine.pulse import Origin, Pulse


def pause_s(failures: int) -> float:
    """Return the seconds before a start: 0, 0, 1, 2, 4 and so on up to 30.

    `failures`: ends in a row without a completed run between them.
    """
    return 0.0 if failures < 2 else min(30.0, 2.0 ** (failures - 2))


@dataclass(frozen=True, slots=True)
class End:
    """How a process ended. `cause`: one of `ENGINE_REASONS`."""

    cause: str
    why: str
    is_from_outside: bool = False
    """Whether it may have been killed by a user or by the kernel, so that the run in it may be innocent."""

    @classmethod
    def of(cls, code: int, process: str) -> End:
        """Return the end of a process that no one ended on purpose. `code`: as subprocess returns it."""
        if code >= 0:
            return cls("crash", f"{process} crashed: exit code {code}")
        return cls("crash", f"{process} crashed: signal {-code}", is_from_outside=-code == signal.SIGKILL)


class Suspects:
    """Finds the request that ends engines: all that were in a run are suspects, and run alone after that."""

    def __init__(self) -> None:
        self._all: dict[Origin, None] = {}
        self._ends: Counter[Origin] = Counter()

    def after(self, pulse: Pulse, end: End) -> Origin | None:
        """Take in the runs of an engine that has ended. Return the culprit, if one is found.

        A suspect that ran alone is the culprit. After SIGKILL, which can come from outside at any moment, it is one the
        second time.
        """
        runs = [pulse.requests(run) for run in pulse.running()]
        found = list(dict.fromkeys(origin for run in runs for origin in run))
        if not pulse.alone:
            self._all = dict.fromkeys(found)
            self._ends = Counter({origin: self._ends[origin] for origin in found if self._ends[origin]})
            return None
        if len(found) != 1 or not all(runs):
            return None
        (origin,) = found
        self._ends[origin] += 1
        if self._ends[origin] < 1 + end.is_from_outside:
            return None
        self._all.pop(origin, None)
        return origin

    def by_front(self, fronts: Iterable[int]) -> dict[int, list[int]]:
        """Return the suspects of these fronts."""
        found: dict[int, list[int]] = {front: [] for front in fronts}
        for front, number in self._all:
            if front in found:
                found[front].append(number)
        return found
