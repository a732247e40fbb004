"""The processes that a supervisor has started: each with its link, its pulse and its metrics, and one in reserve."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import sys
from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec

from attnserve_server.engine.pulse import Pulse
from attnserve_server.isolation.arena import Arena
from attnserve_server.isolation.descriptors import DescriptorSender, descriptor_pair
from attnserve_server.isolation.link import Link
from attnserve_server.observability.logs import pipes_of
from attnserve_server.observability.metrics import Metrics
from attnserve_server.processes.control import ENCODER, TO_SUPERVISOR, Scrape, Scraped

_SCRAPE_S: Final = 1.0
"""Seconds that a scrape waits for a process; after that, its last metrics count."""


class Child:
    """One process. `received` is called with each message but metrics; `ended` is the task that returns its code."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, packages: DescriptorSender, memory: int) -> None:
        self.name = name
        self.process = process
        self.packages = packages
        self.received: Callable[[object], None] = _drop
        self.ended: asyncio.Task[int]
        self.metrics: dict[str, list[Any]] = {}
        self.is_started = False
        """Whether its first message is on its way."""
        self.link: Link
        self._pulse_memory = memory
        self.pulse = Pulse(memory)

    def send(self, message: msgspec.Struct) -> None:
        """Send a message. It is dropped if the process has ended."""
        self.link.send(ENCODER.encode(message))

    def first_package(self, *descriptors: int) -> int:
        """Send the pulse's memory and these descriptors, for its first message. Return the number of the package."""
        self.is_started = True
        number = self.packages.send(self._pulse_memory, *descriptors)
        self._close_memory()
        return number

    def kill(self) -> None:
        """End the process at once, also if it is stopped."""
        if self.process.returncode is None:
            self.process.kill()

    def close(self) -> None:
        """Close what leads to the process."""
        self.packages.close()
        self.link.close()
        self._close_memory()

    def _close_memory(self) -> None:
        memory, self._pulse_memory = self._pulse_memory, -1
        if memory >= 0:
            os.close(memory)


def _drop(message: object) -> None:
    """Take a message that nothing waits for."""


class Children:
    """All processes of a server but the supervisor. Event loop only."""

    def __init__(self, metrics: Metrics) -> None:
        """Begin without any. `metrics`: the sum over all processes."""
        self._metrics = metrics
        self._all: set[Child] = set()
        self._scrapes: dict[int, asyncio.Future[None]] = {}
        self._numbers = itertools.count()

    async def spawn(self, role: str, name: str) -> Child:
        """Start a process: `front` or `engine`. It waits for its first message.

        Raises:
            OSError: the system starts no process now.
        """
        made: list[Child] = []
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as others:
            own, theirs = socket.socketpair()
            packages, taken = descriptor_pair()
            memory = Arena.create_descriptor(Pulse.SIZE)
            for end in (theirs, taken):
                others.callback(end.close)
            for end in (own, packages):
                ours.callback(end.close)
            ours.callback(os.close, memory)
            log, native = others.enter_context(pipes_of(name, lambda: made[0].name if made else name))
            passed = (theirs.fileno(), taken.fileno(), log)
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", f"attnserve_server.processes.{role}", *map(str, passed), name,
                pass_fds=passed, stderr=native, start_new_session=True,
            )  # fmt: skip
            ours.pop_all()  # it runs: they stay open
        child = Child(name, process, DescriptorSender(packages), memory)
        made.append(child)
        child.link = await Link.open(own, lambda data: self._receive(child, data), lambda: None)
        self._all.add(child)
        self._metrics.processes.add(name, process.pid)
        child.ended = asyncio.create_task(self._watch(child), name=f"end of {name}")
        return child

    def rename(self, child: Child, name: str) -> None:
        """Give a process another name."""
        self._metrics.processes.remove(child.name, child.process.pid)
        child.name = name
        self._metrics.processes.add(name, child.process.pid)

    async def collect(self, own: dict[str, list[Any]]) -> None:
        """Update the sum for a scrape. `own`: what the supervisor's own process counts."""
        await self.refresh([child for child in self._all if child.is_started])
        self._metrics.merge((own, *(child.metrics for child in self._all)))

    async def refresh(self, children: Iterable[Child]) -> None:
        """Get the newest metrics of processes. Those of one that does not answer stay as they are."""
        loop = asyncio.get_running_loop()
        waits: dict[int, asyncio.Future[None]] = {}
        for child in children:
            number = next(self._numbers)
            waits[number] = self._scrapes[number] = loop.create_future()
            child.send(Scrape(number))
        try:
            if waits:
                await asyncio.wait(waits.values(), timeout=_SCRAPE_S)
        finally:
            for number in waits:
                self._scrapes.pop(number, None)  # of a process that did not answer

    async def aclose(self) -> None:
        """End all processes at once."""
        for child in tuple(self._all):
            child.kill()
        await asyncio.gather(*(child.ended for child in tuple(self._all)))

    async def _watch(self, child: Child) -> int:
        code = await child.process.wait()
        self._all.discard(child)
        self._metrics.keep(child.metrics)
        self._metrics.processes.remove(child.name, child.process.pid)
        child.close()
        return code

    def _receive(self, child: Child, data: memoryview) -> None:
        message = TO_SUPERVISOR.decode(data)
        if isinstance(message, Scraped):
            child.metrics = message.families
            waiting = self._scrapes.pop(message.number, None)
            if waiting is not None:
                waiting.set_result(None)
        else:
            child.received(message)


class Reserve:
    """One engine's process that has imported the runtime and has no model yet. Event loop only."""

    NAME: Final = "engine in reserve"
    DELAY_S: Final = 1.0
    """Seconds from an engine's start to the next process in reserve, so that the two do not share the processor."""

    def __init__(self, children: Children, *, wanted: bool) -> None:
        """Begin without one. `wanted`: whether one is kept."""
        self._children = children
        self._wanted = wanted
        self._child: Child | None = None
        self._task: asyncio.Task[None] | None = None

    async def take(self, name: str) -> Child:
        """Return a process for an engine: the one in reserve, or a new one.

        Raises:
            OSError: the system starts no process now.
        """
        filled, child, self._child = self.is_filled, self._child, None
        if child is None or not filled:
            return await self._children.spawn("engine", name)
        self._children.rename(child, name)
        return child

    @property
    def is_filled(self) -> bool:
        """Whether there is one."""
        return self._child is not None and not self._child.ended.done()

    def fill(self) -> None:
        """Start a process in a moment, if there is none."""
        if self._wanted and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._fill(), name="reserve")

    def close(self) -> None:
        """Start no more."""
        self._wanted = False
        if self._task is not None:
            self._task.cancel()

    async def _fill(self) -> None:
        await asyncio.sleep(self.DELAY_S)
        if not self.is_filled:
            with contextlib.suppress(OSError):  # a later start of an engine tries again
                self._child = await self._children.spawn("engine", self.NAME)
