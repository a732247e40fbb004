"""Whether runs of any model of the server are in progress: a run that is alone may use all cores."""

from __future__ import annotations

import mmap
from typing import Final


class Occupancy:
    """Whether runs of any model of the server are in progress. Event loop only."""

    def __init__(self) -> None:
        self._running = 0

    @property
    def busy(self) -> bool:
        """Whether there is such a run."""
        return self._running > 0

    def begin(self) -> None:
        """Count a run that begins."""
        self._running += 1

    def end(self) -> None:
        """Count the end of a run."""
        self._running -= 1


class SharedOccupancy(Occupancy):
    """The runs of all engines of a server, in shared memory: each writes its own number, and reads those of all.

    Two runs that begin at the same moment may both count as the only one; that costs time, and is right again with the
    next.
    """

    SIZE: Final = mmap.PAGESIZE
    MOST: Final = SIZE // 8
    """The most engines; those beyond share numbers."""

    def __init__(self, descriptor: int, place: int) -> None:
        """Map the memory of a descriptor of `SIZE` bytes. `place`: of this engine, from 0."""
        self._numbers = memoryview(mmap.mmap(descriptor, self.SIZE)).cast("q")
        self._place = place % self.MOST

    @property
    def busy(self) -> bool:
        """Whether any engine runs."""
        return any(self._numbers)

    def begin(self) -> None:
        """Count a run that begins."""
        self._numbers[self._place] += 1

    def end(self) -> None:
        """Count the end of a run."""
        self._numbers[self._place] -= 1
