"""Faults of loading for tests: a load that crashes, hangs or takes memory without end, in the process of a trial alone.

`ATTNSERVE_FAILPOINTS` holds `load:NAME/VERSION=ACTION` entries, separated by commas; ACTION is `crash`, `hang`, `spin`,
`allocate` or `reserve`. Entries of another form are left to others. Nothing but `trial` imports this module.
"""

from __future__ import annotations

import mmap
import os
import signal
import time
from typing import Any, Final

VARIABLE: Final = "ATTNSERVE_FAILPOINTS"
_STEP: Final = 16 * 2**20


def at_load(name: str, version: str) -> None:
    """Do what the variable states for a bundle, if anything."""
    wanted = f"load:{name}/{version}"
    for entry in os.environ.get(VARIABLE, "").split(","):
        place, _, action = entry.strip().partition("=")
        if place == wanted:
            _ACTIONS[action]()


def _crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _hang() -> None:
    time.sleep(1e9)


def _spin() -> None:
    while True:
        pass


def _allocate() -> None:
    """Write to more and more memory."""
    kept: list[Any] = []
    while True:
        memory = mmap.mmap(-1, _STEP, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.write(b"x" * _STEP)
        kept.append(memory)


def _reserve() -> None:
    """Reserve memory at once, of which nothing is written yet."""
    bytearray(2**46)


_ACTIONS: Final = {"crash": _crash, "hang": _hang, "spin": _spin, "allocate": _allocate, "reserve": _reserve}
