"""An instance's thread: runs one function after another, and tells the event loop how each ended.

A ThreadPoolExecutor of one thread does the same for more: a future of its own beside the event loop's, with a lock and
a condition each, on a path that every batch goes twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")


class InstanceThread:
    """One thread, from `__init__` until `end`. Event loop only, but for the functions that it runs."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: SimpleQueue[tuple[asyncio.Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()
        # A daemon: a run that never ends must not keep a process that was told to end.
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def run(self, function: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        """What `function` returns or raises, once those before it have ended. Cancelling the future stops nothing."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._calls.put((future, function, arguments))
        return future

    async def end(self) -> None:
        """Ends the thread, after what it was given."""
        self._calls.put(None)
        await asyncio.to_thread(self._thread.join)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function, arguments = call
            value: Any = None
            fault: BaseException | None = None
            try:
                value = function(*arguments)
            except BaseException as error:  # noqa: BLE001 - whatever it is, whoever waits must hear of it
                fault = error
            try:
                self._loop.call_soon_threadsafe(_tell, future, value, fault)
            except RuntimeError:
                return  # the loop was closed: nobody waits any more
            del call, future, function, arguments, value, fault  # the next call may be long in coming


def _tell(future: asyncio.Future[Any], value: object, fault: BaseException | None) -> None:
    if future.done():
        return  # cancelled
    if fault is None:
        future.set_result(value)
    else:
        future.set_exception(fault)
