"""The life of a server in its main process: start, serve until a signal or an internal error, drain, end.

The first SIGTERM or SIGINT drains, and a second one ends at once. SIGHUP has the files of TLS and tokens, and the
repository, read again. A thread ends the process where the drain does not: a run inside one long kernel cannot be
stopped, and neither can the event loop be relied on then.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Final, Protocol

from attnserve_server.model.repository import write_atomically
from attnserve_server.observability.logs import flush, last_words, logger

_log = logger(__name__)

EXIT_DRAINED: Final = 0
EXIT_FORCED: Final = 1
EXIT_FAULTED: Final = 70
"""Exit code of an internal error, EX_SOFTWARE of sysexits.h: a supervisor should restart the process."""
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
AFTER_GRACE_S: Final = 1.0
"""Seconds after the grace period, or after the second signal, at which the process ends in any case."""
TEARDOWN_S: Final = 0.3
"""Seconds that the interpreter has to end by itself, after all is closed."""
_FLUSH_S: Final = 0.5
"""Seconds that the last lines of the log have in a hard end."""


class Lifetime(Protocol):
    """What `run` starts and ends."""

    grpc_port: int
    """0 before it listens."""
    fault: asyncio.Event
    """Set by an internal error: the server drains, and ends with `EXIT_FAULTED`."""

    async def start(self) -> None:
        """Start serving. Raises AttnserveError where that cannot be done."""

    def reread(self) -> None:
        """Read all files again that may change while it runs."""

    async def drain(self) -> None:
        """Refuse new requests, and wait for pending ones until the grace period ends."""

    async def aclose(self) -> None:
        """Stop everything at once. Called in every case."""


class HardEnd:
    """Ends the process at a time that can be moved, by a thread. Any thread.

    No cleanup runs: temporary files are removed as soon as they are mapped, and other files are written as a whole.
    """

    def __init__(self, *, armed: bool = True) -> None:
        """Begin without a time. `armed`: false in a process that does other things too, which it then never ends."""
        self._armed = armed
        self._changed = threading.Condition()
        self._at_s: float | None = None
        self._code = EXIT_DRAINED

    def within(self, seconds: float, code: int) -> None:
        """End the process after so many seconds with this exit code, in place of an earlier call's."""
        if not self._armed:
            return
        with self._changed:
            first = self._at_s is None
            self._at_s, self._code = time.monotonic() + seconds, code
            self._changed.notify_all()
        if first:
            threading.Thread(target=self._wait, name="hard-end", daemon=True).start()

    def _wait(self) -> None:
        with self._changed:
            while self._at_s is not None and (left_s := self._at_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
            code = self._code
        last_words("the process ends with work unfinished", code=code)
        end_now(code)


def end_now(code: int) -> None:
    """End the process without waiting for any thread, after the log was written."""
    flush(_FLUSH_S)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


async def run(server: Lifetime, grace_s: float = 0.0, hard: HardEnd | None = None) -> int:
    """Serve until a signal or an internal error.

    Args:
        server: what is run.
        grace_s: seconds of its drain.
        hard: ends the process `AFTER_GRACE_S` after that, or after a second signal; None: only this function returns.

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
        if hard is not None:
            forced_s, code = (0.0, EXIT_FORCED) if stop.is_set() else (grace_s, EXIT_DRAINED)
            hard.within(forced_s + AFTER_GRACE_S, EXIT_FAULTED if server.fault.is_set() else code)
        (force if stop.is_set() else stop).set()

    for number in _SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    loop.add_signal_handler(signal.SIGHUP, server.reread)
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
        if hard is not None and server.fault.is_set():
            hard.within(grace_s + AFTER_GRACE_S, EXIT_FAULTED)
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


def write_ports(path: Path, grpc_port: int, http_port: int, rest_port: int) -> None:
    """Write the ports as JSON. The file is complete as soon as it exists, because programs poll for it."""
    with write_atomically(path) as partial:
        partial.write_text(
            json.dumps({"grpc": grpc_port, "http": http_port, "rest": rest_port}) + "\n", encoding="ascii"
        )


async def _first_of(task: asyncio.Task[None] | None, *events: asyncio.Event) -> None:
    """Wait until `task` is done or one of the events is set."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait([*waits, *([task] if task else [])], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
