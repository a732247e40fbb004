"""A bound on bytes that are held at a time, granted in order. Raises nothing."""

from __future__ import annotations

import asyncio
from collections import deque


class Allowance:
    """At most `limit` bytes at a time, granted in order: bounds the answers held for a slow reader. Event loop only."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def take_now(self, count: int) -> bool:
        """Take `count` bytes if they are free and no one waits; return whether they were."""
        if self._waiting or not self._fits(count):
            return False
        self._taken += count
        return True

    async def take(self, count: int) -> None:
        """Wait for `count` bytes. More than the limit is granted once nothing else is taken."""
        if self.take_now(count):
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, granted))
        try:
            await granted
        except asyncio.CancelledError:
            # Granted and cancelled in the same turn of the loop: give the bytes back. Otherwise let the next ones
            # go on, which may fit where this one did not.
            self.give(0 if granted.cancelled() else count)
            raise

    def give(self, count: int) -> None:
        """Give bytes back, and grant what fits to those that wait."""
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
