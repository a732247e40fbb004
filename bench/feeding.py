"""What one engine process takes a call: it is fed by as many fronts as it should feed, without their gRPC.

The fronts are links of one process, each with a fixed number of requests in flight, which are encoded as a front
encodes them. So the engine, and not gRPC, limits the rate, as it would behind that many real fronts. `bench.calls`
prints the result. An engine that ends, or has not loaded its model after a minute, raises RuntimeError or TimeoutError.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from attnserve_server.config import Settings
from attnserve_server.domain.values import PreparedSequence, Priority
from attnserve_server.engine.instance_thread import SharedOccupancy
from attnserve_server.engine.pulse import Pulse
from attnserve_server.isolation.arena import Arena, LoadBoard
from attnserve_server.isolation.descriptors import descriptor_pair
from attnserve_server.isolation.link import Link
from attnserve_server.isolation.messages import TO_FRONT, Answer, Outbox
from attnserve_server.model.repository import Repository
from attnserve_server.processes.control import ARENA_BYTES, ENCODER, TO_SUPERVISOR, Attach, EngineStart, Loaded

FRONTS = 6
IN_FLIGHT = 11
"""Requests of each front: 66 in all, as many as the 64 callers of `bench.calls`."""
_START_S = 60.0


class Fed:
    """A front's end of the link to the engine, which sends the next request after each answer."""

    def __init__(self, sequence: PreparedSequence, asked: Arena, left: Iterator[int]) -> None:
        self._sequence = sequence
        self._outbox = Outbox(asked)
        self._left = left
        self._waiting = 0
        self.done = asyncio.Event()
        self.link: Link

    def ask(self) -> None:
        """Send one request, if there are any left."""
        number = next(self._left, None)
        if number is not None:
            self._waiting += 1
            self.link.send(self._outbox.ask(number, "", None, 1100, Priority.NORMAL.value, [self._sequence]))
        elif not self._waiting:
            self.done.set()

    def receive(self, data: memoryview) -> None:
        """Take an answer, and send the next request."""
        message = TO_FRONT.decode(data)
        assert isinstance(message, Answer), message
        self._waiting -= 1
        self.ask()


@dataclass(frozen=True, slots=True)
class Ends:
    """This side of an engine: its supervisor's link and packages, and of each front a link and the arena it writes."""

    link: socket.socket
    packages: socket.socket
    fronts: list[tuple[socket.socket, int]]


def _give(ends: Ends, number: int, *descriptors: int) -> None:
    socket.send_fds(ends.packages, [number.to_bytes(8, "little")], list(descriptors))


def _tell(ends: Ends, message: EngineStart | Attach) -> None:
    encoded = ENCODER.encode(message)
    ends.link.sendall(len(encoded).to_bytes(4, "little") + encoded)


@contextmanager
def engine(repository: Path, name: str) -> Iterator[tuple[psutil.Process, Ends]]:
    """Start the engine of a model until the block ends: its process, and the ends that a supervisor and fronts have."""
    settings = Settings(repository=repository, log_level="warning").model_dump_json().encode()
    with ExitStack() as stack:
        own, end = (stack.enter_context(one) for one in socket.socketpair())
        packages, taken = (stack.enter_context(one) for one in descriptor_pair())
        line = [sys.executable, "-P", "-m", "attnserve_server.processes.engine"]
        line += [str(end.fileno()), str(taken.fileno()), "2", "engine"]
        process = subprocess.Popen(line, pass_fds=[end.fileno(), taken.fileno()])
        end.close()
        taken.close()
        ends = Ends(own, packages, [])
        memory = [Arena.create_descriptor(one.SIZE) for one in (Pulse, LoadBoard, SharedOccupancy)]
        _give(ends, 1, *memory)
        bundle = Repository(repository).bundle(name, "1")
        manifest = bundle.manifest.model_dump_json().encode()
        _tell(ends, EngineStart(settings, "engine", 0, 1, str(bundle.path), manifest))
        try:
            yield psutil.Process(process.pid), ends
        finally:
            own.close()
            process.terminate()
            process.wait(30)
            for descriptor in (*memory, *(asked for _, asked in ends.fronts)):
                os.close(descriptor)


def _attach(ends: Ends) -> None:
    """Connect the fronts to an engine that is ready."""
    for number in range(FRONTS):
        here, there = socket.socketpair()
        asked, answered = (Arena.create_descriptor(ARENA_BYTES) for _ in range(2))
        _give(ends, 2 + number, there.fileno(), asked, answered)
        _tell(ends, Attach(number, 2 + number))
        there.close()
        os.close(answered)
        ends.fronts.append((here, asked))


async def _feed(ends: Ends, process: psutil.Process, calls: int) -> dict[str, float]:
    ready = asyncio.Event()

    def told(data: memoryview) -> None:
        message = TO_SUPERVISOR.decode(data)
        assert isinstance(message, Loaded), message
        assert message.state == "ready", message.reason
        ready.set()

    supervisor = await Link.open(ends.link.dup(), told, lambda: None)
    async with asyncio.timeout(_START_S):
        await ready.wait()
    _attach(ends)
    ids = np.arange(128, dtype="<i8")
    sequence = PreparedSequence({"ids": ids}, {}, ("same",), response_bytes=1024, is_whole_request=True)
    left = iter(range(2 * calls))
    fronts = [Fed(sequence, Arena(asked, ARENA_BYTES), left) for _, asked in ends.fronts]
    for front, (end, _) in zip(fronts, ends.fronts, strict=True):
        front.link = await Link.open(end, front.receive, lambda: None)
        for _ in range(IN_FLIGHT):
            front.ask()
    while next(left) < calls:  # noqa: ASYNC110 - the first half is the warm-up, which nothing ends
        await asyncio.sleep(0.01)
    before, begun = _times(process), next(left)
    await asyncio.gather(*(front.done.wait() for front in fronts))
    after = _times(process)
    for link in (supervisor, *(front.link for front in fronts)):
        link.close()
    await asyncio.sleep(0.01)  # until their sockets are closed
    calls = 2 * calls - begun
    return {part: 1e3 * (seconds - before[part]) / calls for part, seconds in after.items()}


def _times(process: psutil.Process) -> dict[str, float]:
    times = process.cpu_times()
    threads = {one.id: one.user_time + one.system_time for one in process.threads()}
    return {"all": times.user + times.system, "main thread": threads[process.pid]}


def measure(repository: Path, name: str, calls: int) -> dict[str, float]:
    """Return the milliseconds of processor time a call of the engine of a model, and of its main thread."""
    with engine(repository, name) as (process, ends):
        return asyncio.run(_feed(ends, process, calls))
