"""Faults on request, for tests: a request whose id names one makes the process that runs it fail in that way.

Off unless the server is started with ATTNSERVE_FAILPOINTS=1. Then `fail:KIND`, or `fail:KIND:ANYTHING`, is such an id:

    kill    the process kills itself, as the kernel does when memory runs out
    abort   it aborts, as native code does at a broken assertion
    stop    it stops, with all its threads
    hang    the run does not end
    memory  the run takes memory, 32 MiB every 20 ms up to 4 GiB, and then goes on

Other ids do nothing.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Final

from attnserve_server.domain.values import PreparedSequence

VARIABLE: Final = "ATTNSERVE_FAILPOINTS"
PREFIX: Final = "fail:"
_STEP_BYTES: Final = 32 * 2**20
_MOST_BYTES: Final = 4 * 2**30


def enabled() -> bool:
    """Return whether faults on request are on."""
    return os.environ.get(VARIABLE) == "1"


def mark(request_id: str, sequences: Sequence[PreparedSequence]) -> None:
    """Let the sequences of a request cause the fault that its id names."""
    if request_id.startswith(PREFIX) and enabled():
        for one in sequences:
            one.fault = request_id.split(":")[1]


def fault_of(sequences: Sequence[PreparedSequence]) -> Callable[[], None] | None:
    """Return what a run with these sequences must do first, in its thread; None: nothing."""
    return next((_FAULTS[one.fault] for one in sequences if one.fault in _FAULTS), None)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _hang() -> None:
    while True:
        time.sleep(3600)


def _fill() -> None:
    taken: list[bytes] = []
    while len(taken) * _STEP_BYTES < _MOST_BYTES:
        taken.append(b"\x01" * _STEP_BYTES)
        time.sleep(0.02)


_FAULTS: Final = {"kill": _kill, "abort": os.abort, "stop": _stop, "hang": _hang, "memory": _fill}
