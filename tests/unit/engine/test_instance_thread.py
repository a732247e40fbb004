"""An instance's thread runs calls in order, delivers each result or exception, and ends on `end`.

An instance is one of the threads that run a model. The exception of a call reaches the task that awaits it, and no
other call.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import numpy as np
import pytest
from attnserve_server.engine.instance_thread import InstanceThread


async def test_functions_run_one_after_another_on_one_thread() -> None:
    thread = InstanceThread("tiny-1-0")
    seen: list[tuple[int, str]] = []
    calls = [thread.run(lambda at: seen.append((at, threading.current_thread().name)) or at, at) for at in range(9)]
    assert await asyncio.gather(*calls) == list(range(9))
    assert seen == [(at, "tiny-1-0") for at in range(9)]
    await thread.end()


async def test_exception_of_a_function_reaches_its_awaiting_task_only() -> None:
    thread = InstanceThread("tiny-1-0")
    broken, whole = thread.run(divmod, 1, 0), thread.run(divmod, 7, 2)
    with pytest.raises(ZeroDivisionError):
        await broken
    assert await whole == (3, 1)
    await thread.end()


async def test_result_of_a_cancelled_future_is_dropped() -> None:
    faults: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, fault: faults.append(fault))
    thread = InstanceThread("tiny-1-0")
    go = threading.Event()
    held, gone, failing, last = (thread.run(what) for what in (go.wait, dict, lambda: 1 // 0, list))
    gone.cancel()
    failing.cancel()
    go.set()
    assert await held is True
    assert await last == []
    await thread.end()
    assert not faults


async def test_end_waits_for_queued_calls() -> None:
    thread = InstanceThread("tiny-1-0")
    go = threading.Event()
    held, last = thread.run(go.wait), thread.run(dict)
    ending = asyncio.create_task(thread.end())
    await asyncio.sleep(0.01)
    assert not ending.done()
    go.set()
    await ending
    assert held.result() is True
    assert last.result() == {}


async def test_thread_releases_the_objects_of_a_finished_call() -> None:
    thread = InstanceThread("tiny-1-0")
    array = np.ones(4)
    watched = weakref.ref(array)
    assert await thread.run(np.sum, array) == 4
    del array
    # The thread delivers the result first, and releases the objects then.
    async with asyncio.timeout(5):
        while watched() is not None:
            await asyncio.sleep(0.001)
            gc.collect()
    await thread.end()


def test_thread_ends_after_its_call_if_the_loop_is_closed() -> None:
    go = threading.Event()

    async def left() -> InstanceThread:
        thread = InstanceThread("tiny-1-0")
        thread.run(go.wait)
        return thread

    thread = asyncio.run(left())
    go.set()
    thread._thread.join(5)
    assert not thread._thread.is_alive()
