"""One model's engine, as the supervisor keeps it: started, connected to the fronts, watched, and replaced at its end.

An engine that ends, hangs or takes too much memory before its model was ready once makes the model FAILED. Later, it is
replaced, and the requests that it has not answered go to the next one.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock
from attnserve_server.domain.machine import resident_bytes
from attnserve_server.engine.instance_thread import SharedOccupancy
from attnserve_server.engine.pulse import Overdue
from attnserve_server.isolation.arena import Arena, LoadBoard, LoadFacts
from attnserve_server.observability.logs import logger
from attnserve_server.observability.metrics import ENGINE_REASONS, ENGINE_RESTARTS, Metrics
from attnserve_server.processes.children import Child, Reserve
from attnserve_server.processes.control import ARENA_BYTES, Attach, Changed, Connect, Culprit, EngineStart, FrontModel
from attnserve_server.processes.ends import End, Suspects, pause_s
from attnserve_server.processes.kept_front import KeptFront
from attnserve_server.scheduling.catalog import ModelState

_log = logger(__name__)

LOAD_LIMIT_S: Final = 900.0
"""Seconds that an engine has to load its model."""
_MEMORY_LOOK_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the engines of a server share.

    Args:
        settings: of the server.
        encoded: the same as JSON, for the processes.
        clock: of the server.
        reserve: gives processes.
        occupancy: descriptor of `SharedOccupancy`.
        metrics: of the supervisor's own process.
        fronts: the fronts that run now.
        changed: called when a model has another state.
    """

    settings: Settings
    encoded: bytes
    clock: Clock
    reserve: Reserve
    occupancy: int
    metrics: Metrics
    fronts: Callable[[], Iterable[KeptFront]]
    changed: Callable[[Changed], None]


class KeptEngine:
    """The engine of one model. Event loop only."""

    def __init__(self, around: Surroundings, name: str, version: str, place: int) -> None:
        self.name, self.version = name, version
        self.ending = False
        """Set before the server ends it."""
        self.child: Child | None = None
        self.is_ready = False
        self.expected_s: float | None = None
        """While it is replaced: seconds from its end to the next one."""
        self._around = around
        self._place = place
        self._load = Arena.create_descriptor(LoadBoard.SIZE)
        self._arenas: dict[int, int] = {}  # of requests, by the number of the front
        self._served = self._isolated = False
        self._end: End | None = None  # that this process has caused
        self._refused = False
        self._suspects = Suspects()
        self._failures = 0
        self._began_s = self._looked_s = around.clock.now()
        self._was_cold = True
        self._load_s = self._import_s = 0.0  # of the last start
        self._restarts = {
            cause: around.metrics.counter(ENGINE_RESTARTS).labels(name, version, cause) for cause in ENGINE_REASONS
        }

    async def run(self) -> None:
        """Keep an engine running until the server ends, or its model has failed."""
        wait_s = 0.0
        while True:
            await asyncio.sleep(wait_s)
            if self._stops():
                return
            self._began_s = self._around.clock.now()
            self._was_cold = not self._around.reserve.is_filled
            try:
                child = await self._around.reserve.take(f"engine {self.name}/{self.version}")
            except OSError as error:
                if not self._served:
                    self._fail(f"no process for its engine could be started: {error.strerror}")
                    return
                wait_s = self._retry(error)
                continue
            self._begin(child)
            code = await asyncio.shield(child.ended)
            self.child, self.is_ready = None, False
            self._clear()
            if self._stops():
                child.pulse.close()
                return
            end = self._end or End.of(code, "engine")
            if not self._served:
                child.pulse.close()
                self._fail(f"{end.why} while it loaded")
                return
            wait_s = self._replace(child, end)

    def front_model(self, front: KeptFront, send: Callable[..., int]) -> FrontModel:
        """Return what a new front needs for this model. `send`: sends descriptors to it, as `DescriptorSender.send`."""
        arena = self._arenas[front.number] = Arena.create_descriptor(ARENA_BYTES)
        return FrontModel(self.name, self.version, send(arena, self._load))

    def attach(self, front: KeptFront) -> None:
        """Connect a front that runs, if the model is ready."""
        child = self.child
        if child is None or front.child is None or not self.is_ready:
            return
        suspects = self._suspects.by_front([front.number])[front.number]
        answers = Arena.create_descriptor(ARENA_BYTES)
        here, there = socket.socketpair()
        with here, there:
            child.send(Attach(front.number, child.packages.send(there.fileno(), self._arenas[front.number], answers)))
            package = front.child.packages.send(here.fileno(), answers)
            front.child.send(Connect(self.name, self.version, package, suspects))
        os.close(answers)

    def detach(self, front: int) -> None:
        """Forget a front that has ended."""
        arena = self._arenas.pop(front, None)
        if arena is not None:
            os.close(arena)

    def watch(self, now: float) -> None:
        """Kill the engine if it hangs, or takes too much memory or time. Call it several times a second."""
        child = self.child
        if child is None or self._end is not None or self.ending:
            return
        if self.is_ready:
            why = self._overdue.look(now)
            if why:
                self._kill(child, End("hang", f"engine hung: {why}"))
        elif now - self._began_s > LOAD_LIMIT_S:
            self._kill(child, End("hang", f"engine hung: its model was not loaded within {LOAD_LIMIT_S:.0f} s"))
        limit = self._around.settings.engine_memory_bytes
        if limit and now - self._looked_s >= _MEMORY_LOOK_S:
            self._looked_s = now
            found = resident_bytes(Path(f"/proc/{child.process.pid}/statm"))
            if found > limit:
                self._kill(child, End("memory", f"engine took {found} bytes; --engine-memory-bytes is {limit}"))

    def _stops(self) -> bool:
        return self.ending or self._refused

    def close(self) -> None:
        """Close its memory. Its process has ended."""
        for front in tuple(self._arenas):
            self.detach(front)
        os.close(self._load)

    def _begin(self, child: Child) -> None:
        around = self._around
        self._end = None
        self._overdue = Overdue(child.pulse, around.settings.watchdog_floor_s)
        child.received = self._receive
        self.child = child
        package = child.first_package(self._load, around.occupancy)
        suspects = self._suspects.by_front(front.number for front in around.fronts())
        child.send(
            EngineStart(
                around.encoded, child.name, self.name, self.version, self._place, package, suspects, self._isolated
            )
        )

    def _receive(self, message: object) -> None:
        assert isinstance(message, Changed)
        if message.state == ModelState.FAILED:
            self._refused = True
            self.expected_s = None
            assert self.child is not None
            self.child.kill()
        else:
            self._isolated = bool(message.reason)
            if not self.is_ready:
                self.is_ready = self._served = True
                self.expected_s = None
                self._load_s = message.load_s
                if self._was_cold:
                    self._import_s = max(0.0, self._around.clock.now() - self._began_s - message.load_s)
                for front in self._around.fronts():
                    self.attach(front)
                self._around.reserve.fill()
        self._around.changed(message)

    def _kill(self, child: Child, end: End) -> None:
        self._end = end
        child.kill()

    def _fail(self, why: str) -> None:
        _log.error("model failed to load", model=self.name, version=self.version, reason=why)
        self._around.changed(Changed(self.name, self.version, ModelState.FAILED.value, why))

    def _replace(self, child: Child, end: End) -> float:
        """Report the end of an engine that served. Return the seconds to wait before the next start."""
        self._restarts[end.cause].inc()
        self._failures = 0 if child.pulse.completed else self._failures + 1
        culprit = self._suspects.after(child.pulse, end)
        child.pulse.close()
        wait_s = pause_s(self._failures)
        self.expected_s = wait_s + self._load_s + (0.0 if self._around.reserve.is_filled else self._import_s)
        _log.critical(
            "an engine is replaced", model=self.name, version=self.version, reason=end.why, restart_in_s=wait_s,
            culprit_found=culprit is not None,
        )  # fmt: skip
        for front in self._around.fronts():
            if culprit is not None and front.number == culprit[0] and front.child is not None:
                front.child.send(Culprit(self.name, self.version, culprit[1]))
        self._around.changed(
            Changed(self.name, self.version, ModelState.LOADING.value, end.why, expected_s=self.expected_s)
        )
        return wait_s

    def _retry(self, error: OSError) -> float:
        """Report that no process could be started. Return the seconds to wait before the next try."""
        self._failures = max(2, self._failures + 1)
        wait_s = pause_s(self._failures)
        _log.critical(
            "no engine could be started", model=self.name, version=self.version, reason=error.strerror,
            restart_in_s=wait_s,
        )  # fmt: skip
        return wait_s

    def _clear(self) -> None:
        """Remove the traces of an engine from shared memory."""
        SharedOccupancy(self._around.occupancy, self._place).clear()
        LoadBoard(self._load).write(LoadFacts(0, 0, 0, 0, 0, 0.0))
