"""The clock port: where time comes from. Deadlines and durations are monotonic seconds; only `wall_s` is wall time.

The clocks are the functions of the standard library themselves: a request reads the time some ten times. Nothing here
raises.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """A clock that never runs backwards."""

    def now(self) -> float:
        """Return seconds from an arbitrary origin."""
        ...


class MonotonicClock:
    """The machine's monotonic clock; on Linux the event loop has the same origin."""

    now = staticmethod(time.monotonic)


class ThreadCpuClock:
    """The processor time of the calling thread, which other threads and processes do not add to."""

    now = staticmethod(time.thread_time)


def wall_s() -> float:
    """Return seconds of the Unix epoch, for protocols that state when something happened; never for durations."""
    return datetime.now(UTC).timestamp()  # noqa: TID251 - of a protocol
