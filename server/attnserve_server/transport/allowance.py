"""A byte budget that callers wait for in turn: it bounds what one slow reader can make the server hold."""

from __future__ import annotations

import asyncio
from collections import deque


class Allowance:
    """At most `limit` bytes taken at a time, first come first served. Event loop only."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, count: int) -> None:
        """Waits for `count` bytes. More than the limit is granted once nothing else is taken, or it would never be."""
        if not self._waiting and self._fits(count):
            self._taken += count
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, granted))
        try:
            await granted
        except asyncio.CancelledError:
            # Granted and cancelled in the same turn of the loop: nobody else would give these bytes back. Otherwise
            # those behind may fit where this one did not.
            self.give(0 if granted.cancelled() else count)
            raise

    def give(self, count: int) -> None:
        """Gives back what was taken, and lets those in front go on."""
        self._taken -= count
        while self._waiting:
            wanted, granted = self._waiting[0]
            if not granted.done():
                if not self._fits(wanted):
                    return
                self._taken += wanted
                granted.set_result(None)
            self._waiting.popleft()

    def _fits(self, count: int) -> bool:
        return self._taken == 0 or self._taken + count <= self._limit
