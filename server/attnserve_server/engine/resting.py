"""Memory that the C library's allocator keeps after callers were refused or did not read, given back at rest.

glibc keeps freed memory below the highest block in use of each of its arenas: of 20 callers that left 40 MB of answers
unread, 19 MB. `malloc_trim` returns it in some ten milliseconds, during which other threads may wait for memory, so it
runs only when the process does little. What the runtime's own arenas keep is in `shrinking`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

from attnserve_server.domain.clock import Clock
from attnserve_server.domain.machine import anonymous_bytes, return_freed_memory

GROWTH_BYTES: Final = 2 * 2**20
"""Growth from which memory is given back: usual requests stay below it once their buffers have their size."""
_EVERY_S: Final = 1.0
_REST: Final = 0.25
"""Processor time of all threads, as a share of the time between two looks, up to which the process rests."""


class Trimmer:
    """Watches the memory of one process. Event loop only."""

    def __init__(
        self,
        clock: Clock,
        memory: Callable[[], int] = anonymous_bytes,
        processor: Callable[[], float] = time.process_time,
        give_back: Callable[[], None] = return_freed_memory,
    ) -> None:
        """Begin with the memory of now.

        Args:
            clock: measures the time between looks.
            memory: returns the bytes that the process holds.
            processor: returns the seconds of processor time of all its threads.
            give_back: returns unused memory to the system; called in a thread.
        """
        self._clock, self._memory, self._processor, self._give_back = clock, memory, processor, give_back
        self._least = memory()
        self._looked = clock.now(), processor()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Watch until `close`."""
        self._task = asyncio.create_task(self._watch(), name="trimmer")

    def close(self) -> None:
        """Watch no more."""
        if self._task is not None:
            self._task.cancel()

    async def look(self) -> bool:
        """Give memory back if it has grown and the process rests; return whether."""
        (then, used), self._looked = self._looked, (self._clock.now(), self._processor())
        held = self._memory()
        self._least = min(self._least, held)
        rests = self._looked[1] - used <= _REST * (self._looked[0] - then)
        if held < self._least + GROWTH_BYTES or not rests:
            return False
        await asyncio.to_thread(self._give_back)
        self._least = self._memory()  # what is left is in use
        return True

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_EVERY_S)
            await self.look()
