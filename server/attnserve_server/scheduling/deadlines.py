"""The deadlines of pending requests, with one timer for all of them. Event loop only; nothing fails."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Final

from attnserve_server.domain.clock import Clock
from attnserve_server.scheduling.queue import Request

TICK_S: Final = 0.02
"""Few requests are in their last 20 ms at any time."""
_TOLERANCE_S: Final = 1e-6
"""A loop timer may fire a clock tick early; a deadline that is nearer than this counts as reached."""


class Deadlines:
    """The deadlines of pending requests, with one timer of the loop for all of them.

    Calls back once for each, and not before it is reached, even if the loop's clock is ahead. Most requests end long
    before their deadlines: they wait in sets by tick, which cost an insertion and a removal. In the tick of its
    deadline a request becomes near, and the timer is set for the nearest one.
    """

    def __init__(self, clock: Clock, expire: Callable[[Request], None]) -> None:
        """Begin without requests.

        Args:
            clock: the deadlines are on it.
            expire: called with a request whose deadline is reached; the request is discarded before.
        """
        self._clock = clock
        self._expire = expire
        self._sets: dict[int, set[Request]] = {}  # by tick
        self._ticks: list[int] = []  # a heap of the keys
        self._near: set[Request] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = math.inf  # the time that it is set for

    def add(self, request: Request) -> None:
        """Watch a request that has a deadline."""
        assert request.deadline_s is not None
        tick = int(request.deadline_s // TICK_S)
        waiting = self._sets.get(tick)
        if waiting is None:
            waiting = self._sets[tick] = set()
            heappush(self._ticks, tick)
            if tick * TICK_S < self._timer_s:
                self._arm(tick * TICK_S)
        waiting.add(request)

    def discard(self, request: Request) -> None:
        """Watch a request no more. Nothing happens if it is not watched."""
        if request.deadline_s is not None:
            self._near.discard(request)
            waiting = self._sets.get(int(request.deadline_s // TICK_S))
            if waiting is not None:
                waiting.discard(request)

    def close(self) -> None:
        """Call back no more."""
        self._sets.clear()
        self._ticks.clear()
        self._near.clear()
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self, at_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_s = at_s
        self._timer = asyncio.get_running_loop().call_later(at_s - self._clock.now(), self._fire)

    def _fire(self) -> None:
        now = self._clock.now() + _TOLERANCE_S
        self._timer, self._timer_s = None, math.inf
        while self._ticks and self._ticks[0] * TICK_S <= now:
            self._near |= self._sets.pop(heappop(self._ticks))
        for request in [one for one in self._near if one.deadline_s is None or one.deadline_s <= now]:
            self._near.discard(request)
            self._expire(request)
        next_s = min((one.deadline_s for one in self._near if one.deadline_s is not None), default=math.inf)
        if self._ticks:
            next_s = min(next_s, self._ticks[0] * TICK_S)
        if next_s < self._timer_s:
            self._arm(next_s)
