"""The thread on which an instance runs: functions one after another, each with a future on the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

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
        # A daemon, because a run that never ends must not keep the process alive after shutdown.
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def run(self, function: Callable[..., T], *arguments: object) -> asyncio.Future[T]:
        """Queue a call and return the future of its result or exception. Cancelling the future stops nothing."""
        future: asyncio.Future[T] = self._loop.create_future()
        self._calls.put((future, function, arguments))
        return future

    async def end(self) -> None:
        """End the thread after the queued calls."""
        self._calls.put(None)
        await asyncio.to_thread(self._thread.join)

    def _work(self) -> None:
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


def _resolve(future: asyncio.Future[Any], value: object, fault: BaseException | None) -> None:
    if future.done():
        return  # cancelled
    if fault is None:
        future.set_result(value)
    else:
        future.set_exception(fault)
