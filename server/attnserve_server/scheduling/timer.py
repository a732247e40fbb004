"""A deadline on the injected clock, kept by the event loop's timers. Event loop only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from attnserve_server.domain.clock import Clock

_SLACK_S: Final = 1e-6
"""A loop timer may fire a clock tick early; less than this is not worth another timer."""


class DeadlineTimer:
    """Calls back once when the clock reaches the deadline, and not before, even if the loop's own clock runs ahead."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, clock: Clock, deadline_s: float, callback: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._clock = clock
        self._deadline_s = deadline_s
        self._callback = callback
        self._arm()

    def cancel(self) -> None:
        """Calls back no more."""
        self._timer.cancel()

    def _arm(self) -> None:
        self._timer = self._loop.call_later(self._deadline_s - self._clock.now(), self._fire)

    def _fire(self) -> None:
        if self._deadline_s - self._clock.now() > _SLACK_S:
            self._arm()
        else:
            self._callback()
