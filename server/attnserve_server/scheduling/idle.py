"""Idle instances: which one is woken, and when a cheap run waits for batch neighbours. Event loop only; nothing fails.

To start a run costs two changes of threads, and a plan. A run that takes about as long is cheaper for several
sequences at once. Where several requests are usually in flight, such a run waits for half of them, and at most
a millisecond.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

CHEAP_S: Final = 5e-4
"""Predicted seconds of a run below which it may wait for neighbours: it then costs less than a few starts."""
MOST_WAIT_S: Final = 1e-3
_LONE: Final = 1.2
"""Usual requests in flight below which a request counts as the only one: less than one in five comes beside another."""
_MEMORY: Final = 0.98
"""Weight that the usual number of requests in flight keeps after each request."""


class IdleInstances:
    """The instances without a run, of which the last one is woken first: its memory is in the processor's caches."""

    def __init__(self) -> None:
        self._woken: list[asyncio.Future[None]] = []

    def enter(self) -> asyncio.Future[None]:
        """Return the future that an instance awaits; pass it to `leave` afterwards."""
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._woken.append(woken)
        return woken

    def leave(self, woken: asyncio.Future[None]) -> None:
        """Take back a future, whether it is done or not."""
        if woken in self._woken:
            self._woken.remove(woken)

    def wake(self) -> None:
        """Wake one instance, if any is idle."""
        while self._woken:
            woken = self._woken.pop()
            if not woken.done():
                woken.set_result(None)
                return

    def wake_all(self) -> None:
        """Wake all that are idle."""
        while self._woken:
            self.wake()


class Gathering:
    """Decides whether the next run waits for more sequences."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """Store `wake`, which is called when a wait is over."""
        self._wake = wake
        self._usual = 0.0  # requests in flight, of late
        self._timer: asyncio.TimerHandle | None = None
        self._over = False

    def arrived(self, in_flight: int) -> None:
        """Note how many requests are in flight, with a new one."""
        self._usual = max(float(in_flight), _MEMORY * self._usual + (1 - _MEMORY) * in_flight)

    @property
    def lone(self) -> bool:
        """Whether requests come one at a time of late."""
        return self._usual < _LONE

    def waits(self, waiting: int, run_s: float) -> bool:
        """Return whether a run waits for neighbours; if so, `wake` is called within `MOST_WAIT_S`.

        Args:
            waiting: sequences that it would take now, one or more.
            run_s: predicted seconds of that run.
        """
        if self._over or run_s >= CHEAP_S or 2 * waiting >= self._usual:
            return False
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(MOST_WAIT_S, self._end)
        return True

    def started(self) -> None:
        """Note that a run started: the next one may wait again."""
        self._over = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self) -> None:
        self._timer, self._over = None, True
        self._wake()
