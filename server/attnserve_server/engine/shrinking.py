"""The memory that bursts leave behind: found by the process's resident memory, and given back while nothing runs.

The arena of a session grows with its largest runs and never shrinks by itself, and the C library's allocator keeps what
the arena frees. One small run with the runtime's option for it frees the unused regions, and `malloc_trim` returns them
to the system: after runs of whole maps, MiniLM falls from 602 to 166 MB in 0.2 s (onnxruntime 1.32). That is too slow
for each run. Only the CPU's arenas are shrunk.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from attnserve_server.domain.clock import Clock
from attnserve_server.domain.machine import resident_bytes, return_freed_memory
from attnserve_server.engine import warmup
from attnserve_server.engine.collation import collate
from attnserve_server.engine.graph import Graph
from attnserve_server.engine.instance_thread import Occupancy

_log = logging.getLogger(__name__)

GROWTH_BYTES: Final = 64 * 2**20
"""Growth of the resident memory from which the arenas are shrunk: usual runs of changing lengths stay below it."""
_EVERY_S: Final = 1.0
_LATEST_S: Final = 30.0
"""Seconds after which they are shrunk although runs follow each other: that takes as long as a few runs."""


def shrink(graphs: Sequence[Graph]) -> None:
    """Shrink the arenas of all sessions, and return unused memory to the system. On an instance's thread."""
    for graph in graphs:
        batch = collate([warmup.synthetic(graph.manifest, 1)], graph.manifest)
        for session in filter(None, (*graph.sessions, graph.wide)):
            session.run(batch.feeds, batch.fetches, shrinks=True, exact_shape=True)
    return_freed_memory()


class Shrinker:
    """Watches the resident memory for one model. Event loop only."""

    def __init__(
        self,
        shrink_now: Callable[[], Awaitable[None]],
        occupancy: Occupancy,
        clock: Clock,
        memory: Callable[[], int] = resident_bytes,
    ) -> None:
        """Begin with the memory of a model that is warm.

        Args:
            shrink_now: shrinks the arenas of the model.
            occupancy: of the process.
            clock: for the latest time.
            memory: returns the resident bytes.
        """
        self._shrink_now, self._occupancy, self._clock, self._memory = shrink_now, occupancy, clock, memory
        self._least = memory()
        self._was_idle = False
        self._grown_s: float | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Watch until `close`."""
        self._task = asyncio.create_task(self._watch(), name="shrinker")

    def close(self) -> None:
        """Watch no more."""
        if self._task is not None:
            self._task.cancel()

    async def look(self) -> bool:
        """Shrink the arenas if they have grown, and nothing runs or it is the latest time; return whether."""
        idle, before = not self._occupancy.busy, self._memory()
        rests, self._was_idle = idle and self._was_idle, idle
        if before < self._least + GROWTH_BYTES:
            self._least, self._grown_s = min(self._least, before), None
            return False
        now = self._clock.now()
        self._grown_s = now if self._grown_s is None else self._grown_s
        if not rests and now - self._grown_s < _LATEST_S:
            return False
        await self._shrink_now()
        # What is left is in use, or another model's.
        self._least, self._grown_s = self._memory(), None
        _log.debug("memory was given back", extra={"bytes": before - self._least})
        return True

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_EVERY_S)
            await self.look()
