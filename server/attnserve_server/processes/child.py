"""The life of a front's or an engine's process: it starts, follows the supervisor, and ends with it.

Its arguments are LINK LOG NAME. LINK and LOG are descriptors: one end of the link to the supervisor, whose first
message states what the process is, and the pipe that takes its log, whose lines have NAME as `process`. It ends at the
message to drain, or with the supervisor.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable
from typing import Protocol, TypeVar

import msgspec
import uvloop

from attnserve_server.config import Settings
from attnserve_server.isolation.link import Link
from attnserve_server.lifetime import EXIT_DRAINED, EXIT_FAULTED
from attnserve_server.observability.logs import logger, serving
from attnserve_server.processes.control import TO_CHILD, EngineStart, FrontStart

Start = TypeVar("Start", FrontStart, EngineStart)

_log = logger(__name__)


class Process(Protocol):
    """What runs in a process."""

    def receive(self, message: msgspec.Struct) -> None:
        """Take a message of the supervisor."""

    async def run(self) -> int:
        """Serve until the supervisor ends it. Return the exit code."""


async def _run(
    kind: type[Start], make: Callable[[Start, Settings, Link], Process], descriptor: int, log: int, name: str
) -> int:
    started: asyncio.Future[msgspec.Struct] = asyncio.get_running_loop().create_future()
    lost = asyncio.Event()
    process: Process | None = None
    early: list[msgspec.Struct] = []

    def receive(data: memoryview) -> None:
        message = TO_CHILD.decode(data)
        if process is not None:
            process.receive(message)
        elif started.done():
            early.append(message)
        else:
            started.set_result(message)

    link = await Link.open(socket.socket(fileno=descriptor), receive, lost.set)
    start = await started
    assert isinstance(start, kind)
    settings = Settings.model_validate_json(start.settings)
    with serving(settings.log_level, name, log):
        process = make(start, settings, link)
        for message in early:
            process.receive(message)
        gone = asyncio.create_task(lost.wait())
        working = asyncio.create_task(process.run())
        await asyncio.wait((gone, working), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            # The supervisor has ended, so no one reads what is left. At once, because the end of the interpreter waits
            # for gRPC's threads and for runs.
            os._exit(EXIT_DRAINED)
        gone.cancel()
        try:
            return working.result()
        except Exception:  # noqa: BLE001 - the boundary of the process
            _log.critical("the process failed", exc_info=True)
            return EXIT_FAULTED


def run(kind: type[Start], make: Callable[[Start, Settings, Link], Process]) -> None:
    """Run a process to its end, and raise SystemExit.

    Args:
        kind: of the message that starts it.
        make: returns the process for that message, its settings and the link to the supervisor. In the event loop.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        raise SystemExit(runner.run(_run(kind, make, int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
