"""The life of a server in its main process: start, serve until a signal or an internal error, drain, end.

The first SIGTERM or SIGINT drains, and a second one ends at once. SIGHUP has the files of TLS and tokens read again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from pathlib import Path
from typing import Final, Protocol

from attnserve_server.access.keeper import Keeper
from attnserve_server.model.repository import write_atomically
from attnserve_server.observability.logs import logger

_log = logger(__name__)

EXIT_DRAINED: Final = 0
EXIT_FORCED: Final = 1
EXIT_FAULTED: Final = 70
"""Exit code of an internal error, EX_SOFTWARE of sysexits.h: a supervisor should restart the process."""
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class Lifetime(Protocol):
    """What `run` starts and ends."""

    grpc_port: int
    """0 before it listens."""
    fault: asyncio.Event
    """Set by an internal error: the server drains, and ends with `EXIT_FAULTED`."""
    keeper: Keeper
    """Reads the files of TLS and tokens."""

    async def start(self) -> None:
        """Start serving. Raises AttnserveError where that cannot be done."""

    async def drain(self) -> None:
        """Refuse new requests, and wait for pending ones until the grace period ends."""

    async def aclose(self) -> None:
        """Stop everything at once. Called in every case."""


async def run(server: Lifetime) -> int:
    """Serve until a signal or an internal error.

    Returns:
        The exit code of the process: `EXIT_DRAINED`, `EXIT_FORCED` or `EXIT_FAULTED`.

    Raises:
        AttnserveError: as `start`.
        OSError: as `start`.
    """
    stop, force = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        _log.info("signal", signal=signal.Signals(number).name, forced=stop.is_set())
        (force if stop.is_set() else stop).set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    loop.add_signal_handler(signal.SIGHUP, server.keeper.hurry)
    starting = asyncio.create_task(server.start(), name="start")
    try:
        await _first_of(starting, stop, server.fault)
        if starting.done():
            starting.result()
            await _first_of(None, stop, server.fault)
        else:
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
        draining = asyncio.create_task(server.drain(), name="drain")
        await _first_of(draining, force)
        if not draining.done():
            draining.cancel()
            return EXIT_FORCED
        draining.result()
        return EXIT_FAULTED if server.fault.is_set() else EXIT_DRAINED
    finally:
        await server.aclose()
        for number in (*_SIGNALS, signal.SIGHUP):
            loop.remove_signal_handler(number)
        if server.grpc_port:
            _log.info("stopped")


def write_ports(path: Path, grpc_port: int, http_port: int) -> None:
    """Write the ports as JSON. The file is complete as soon as it exists, because programs poll for it."""
    with write_atomically(path) as partial:
        partial.write_text(json.dumps({"grpc": grpc_port, "http": http_port}) + "\n", encoding="ascii")


async def _first_of(task: asyncio.Task[None] | None, *events: asyncio.Event) -> None:
    """Wait until `task` is done or one of the events is set."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait([*waits, *([task] if task else [])], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
