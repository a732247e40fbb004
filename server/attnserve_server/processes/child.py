"""The life of a front's or an engine's process: it starts, follows the supervisor, and ends with it.

Its arguments are LINK PACKAGES LOG NAME. The first three are descriptors: one end of the link to the supervisor, whose
first message states what the process is, the socket for further descriptors, and the pipe that takes its log, whose
lines have NAME as `process`. It ends at the message to drain, or with the supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeVar

import msgspec
import uvloop

from attnserve_server.config import Settings
from attnserve_server.domain.clock import MonotonicClock
from attnserve_server.engine.pulse import Pulse
from attnserve_server.isolation.descriptors import DescriptorReceiver
from attnserve_server.isolation.link import Link
from attnserve_server.lifetime import EXIT_DRAINED, EXIT_FAULTED
from attnserve_server.observability.logs import logger, serving
from attnserve_server.processes.control import TO_CHILD, EngineStart, FrontStart

Start = TypeVar("Start", FrontStart, EngineStart)

BEAT_S: Final = 0.2
"""Seconds between two heartbeats."""
_OOM_SCORE: Final = "500"
"""Of engines, out of 1000: where memory runs out, the kernel ends one of them, and not the supervisor."""

_log = logger(__name__)


class Process(Protocol):
    """What runs in a process."""

    def receive(self, message: msgspec.Struct) -> None:
        """Take a message of the supervisor."""

    async def run(self) -> int:
        """Serve until the supervisor ends it. Return the exit code."""


@dataclass(frozen=True, slots=True)
class Parent:
    """What a process has of its supervisor.

    Args:
        link: for messages.
        packages: receives descriptors.
        pulse: of this process, whose heart beats.
        given: the further descriptors of its first package.
    """

    link: Link
    packages: DescriptorReceiver
    pulse: Pulse
    given: list[int]


async def _run(
    kind: type[Start], make: Callable[[Start, Settings, Parent], Process], descriptors: list[int], name: str
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

    own, passed, log = descriptors
    packages = DescriptorReceiver(socket.socket(fileno=passed))
    link = await Link.open(socket.socket(fileno=own), receive, lost.set)
    gone = asyncio.create_task(lost.wait())
    await asyncio.wait((gone, started), return_when=asyncio.FIRST_COMPLETED)
    if not started.done():
        return EXIT_DRAINED
    start = started.result()
    assert isinstance(start, kind)
    settings = Settings.model_validate_json(start.settings)
    with serving(settings.log_level, getattr(start, "process", name), log):
        pulse_memory, *given = await packages.take(start.package)
        pulse = Pulse(pulse_memory)
        os.close(pulse_memory)
        beating = asyncio.create_task(_beat(pulse))
        process = make(start, settings, Parent(link, packages, pulse, given))
        for message in early:
            process.receive(message)
        working = asyncio.create_task(process.run())
        await asyncio.wait((gone, working), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            # The supervisor has ended, so no one reads what is left. At once, because the end of the interpreter waits
            # for gRPC's threads and for runs.
            os._exit(EXIT_DRAINED)
        gone.cancel()
        beating.cancel()
        try:
            return working.result()
        except Exception:  # noqa: BLE001 - the boundary of the process
            _log.critical("the process failed", exc_info=True)
            return EXIT_FAULTED


async def _beat(pulse: Pulse) -> None:
    clock = MonotonicClock()
    while True:
        pulse.beat(clock.now())
        await asyncio.sleep(BEAT_S)


def run(kind: type[Start], make: Callable[[Start, Settings, Parent], Process]) -> None:
    """Run a process to its end, and raise SystemExit.

    Args:
        kind: of the message that starts it.
        make: returns the process for that message, its settings and its supervisor. In the event loop.
    """
    if kind is EngineStart:
        with contextlib.suppress(OSError):  # no such file in some containers
            Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE, encoding="ascii")
    *descriptors, name = sys.argv[1:]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        raise SystemExit(runner.run(_run(kind, make, [int(one) for one in descriptors], name)))
