"""The clock port: where time comes from. Deadlines and durations are monotonic seconds; nothing here is wall time."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Something that tells monotonic time."""

    def now(self) -> float:
        """Monotonic time in seconds, from an arbitrary origin."""
        ...


class MonotonicClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        """Monotonic time in seconds, as `time.monotonic` counts it (also the event loop's origin on Linux)."""
        return time.monotonic()


class ThreadCpuClock:
    """The processor time of the calling thread, which other threads and processes do not add to."""

    def now(self) -> float:
        """Processor seconds of the calling thread, from an arbitrary origin."""
        return time.thread_time()
