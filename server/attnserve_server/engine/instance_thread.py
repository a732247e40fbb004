"""The thread on which an instance runs, with a future on the event loop for each function, and whether any runs now."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any, Final, TypeVar

_log = logging.getLogger(__name__)

LEAVE_S: Final = 0.3
"""Seconds that a terminated run has to stop before its thread is left behind. A node of a large model takes less."""

T = TypeVar("T")
_Call = tuple[asyncio.Future[Any], Callable[..., Any], tuple[Any, ...]]


class InstanceThread:
    """One thread that runs functions one after another, from `__init__` until `end`.

    Event loop only, except for the functions that it runs. A ThreadPoolExecutor of one thread does the same at a higher
    cost: a second future with its own lock and condition per call, twice per batch.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        # A daemon, because a run that never ends must not keep the process alive after shutdown.
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def run(self, function: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        """Queue a call and return the future of its result or exception. Cancelling the future stops nothing."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._calls.put((future, function, arguments))
        return future

    async def end(self, timeout_s: float | None = None) -> bool:
        """End the thread after the queued calls. Return whether it ended within `timeout_s`; None: wait for it.

        A call into native code cannot be stopped. Such a thread ends once the call returns, or with the process.
        """
        self._calls.put(None)
        await asyncio.wait((self._ended,), timeout=timeout_s)
        return self._ended.done()

    def _work(self) -> None:
        self._run_calls()
        with contextlib.suppress(RuntimeError):  # the loop is closed, so no task is waiting
            self._loop.call_soon_threadsafe(_resolve, self._ended, None, None)

    def _run_calls(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function, arguments = call
            value: Any = None
            fault: BaseException | None = None
            try:
                value = function(*arguments)
            except BaseException as error:  # noqa: BLE001 - deliver any exception to the awaiting task
                fault = error
            try:
                self._loop.call_soon_threadsafe(_resolve, future, value, fault)
            except RuntimeError:
                return  # the loop is closed, so no task is waiting
            del call, future, function, arguments, value, fault  # free the batch before waiting for the next call


async def end_all(threads: Sequence[InstanceThread], model: str) -> None:
    """End threads after their calls. One whose call does not end within `LEAVE_S` is left behind, and logged.

    A run stops between two nodes of its graph, so that one long kernel delays it.

    Args:
        threads: of one model.
        model: its name, for the log.
    """
    ended = await asyncio.gather(*(thread.end(LEAVE_S) for thread in threads))
    if not all(ended):
        extra = {"model": model, "threads": len(ended) - sum(ended)}
        _log.warning("runs that cannot be stopped were left behind", extra=extra)


def _resolve(future: asyncio.Future[Any], value: object, fault: BaseException | None) -> None:
    if future.done():
        return  # cancelled
    if fault is None:
        future.set_result(value)
    else:
        future.set_exception(fault)


class Occupancy:
    """Whether runs of any model of the server are in progress. Event loop only."""

    def __init__(self) -> None:
        self._running = 0

    @property
    def busy(self) -> bool:
        """Whether there is such a run."""
        return self._running > 0

    def begin(self) -> None:
        """Count a run that begins."""
        self._running += 1

    def end(self) -> None:
        """Count the end of a run."""
        self._running -= 1


class SharedOccupancy(Occupancy):
    """The runs of all engines of a server, in shared memory: each writes its own number, and reads those of all.

    Two runs that begin at the same moment may both count as the only one; that costs time, and is right again with the
    next.
    """

    SIZE: Final = mmap.PAGESIZE
    MOST: Final = SIZE // 8
    """The most places: engines beyond share the last one."""

    def __init__(self, descriptor: int, place: int) -> None:
        """Map the memory of a descriptor of `SIZE` bytes. `place`: of this engine, from 0."""
        self._numbers = memoryview(mmap.mmap(descriptor, self.SIZE)).cast("q")
        self._place = place % self.MOST

    @property
    def busy(self) -> bool:
        """Whether any engine runs."""
        return any(self._numbers)

    def begin(self) -> None:
        """Count a run that begins."""
        self._numbers[self._place] += 1

    def end(self) -> None:
        """Count the end of a run."""
        self._numbers[self._place] -= 1

    def clear(self) -> None:
        """Forget the runs of an engine that has ended."""
        self._numbers[self._place] = 0


class Places:
    """Gives each engine a place in `SharedOccupancy`, the lowest that is free. Beyond the last, all share that one."""

    def __init__(self, most: int = SharedOccupancy.MOST) -> None:
        self._taken: set[int] = set()
        self._most = most

    def take(self) -> int:
        """Return a place for an engine."""
        place = next((one for one in range(self._most - 1) if one not in self._taken), self._most - 1)
        self._taken.add(place)
        return place

    def free(self, place: int) -> None:
        """Give a place back."""
        self._taken.discard(place)
