"""Bounds on bytes that are held at a time, granted in order. Raises nothing."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol


class Share(Protocol):
    """What one holder takes of a bound that several share."""

    def take(self, count: int) -> bool:
        """Take `count` bytes, if they are free; return whether they were."""
        ...

    def give(self, count: int) -> None:
        """Give bytes back."""
        ...

    def call_later(self, retry: Callable[[], None]) -> None:
        """Call `retry` once bytes may be free."""
        ...


class Allowance:
    """At most `limit` bytes at a time, granted in order: bounds the answers held for a slow reader. Event loop only.

    With `share`, the bytes are taken from that too, which may make them wait longer.
    """

    def __init__(self, limit: int, share: Share | None = None) -> None:
        self._limit = limit
        self._share = share
        self._taken = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._will_retry = False

    def take_now(self, count: int) -> bool:
        """Take `count` bytes if they are free and no one waits; return whether they were."""
        return not self._waiting and self._take(count)

    async def take(self, count: int) -> None:
        """Wait for `count` bytes. More than the limit is granted once nothing else is taken."""
        if self.take_now(count):
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, granted))
        self._retry_later()
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
        if self._share is not None and count:
            self._share.give(count)
        self._grant()

    def _grant(self) -> None:
        while self._waiting:
            wanted, granted = self._waiting[0]
            if not granted.done():
                if not self._take(wanted):
                    self._retry_later()
                    return
                granted.set_result(None)
            self._waiting.popleft()

    def _take(self, count: int) -> bool:
        if self._taken and self._taken + count > self._limit:
            return False
        if self._share is not None and not self._share.take(count):
            return False
        self._taken += count
        return True

    def _retry_later(self) -> None:
        if self._share is not None and not self._will_retry:
            self._will_retry = True
            self._share.call_later(self._retry)

    def _retry(self) -> None:
        self._will_retry = False
        self._grant()
