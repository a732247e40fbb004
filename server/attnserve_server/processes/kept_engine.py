"""One model's engine, as the supervisor keeps it: started, connected to the fronts, watched, and replaced at its end.

An engine that ends, hangs or takes too much memory before its model was ready once has failed to load it. Later, it is
replaced, and the requests that it has not answered go to the next one, which loads the same files.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock
from attnserve_server.engine.instance_thread import Places, SharedOccupancy
from attnserve_server.engine.pulse import Overdue
from attnserve_server.isolation import descriptors
from attnserve_server.isolation.arena import Arena, LoadBoard, LoadFacts
from attnserve_server.load_limits import MemoryLimit, all_bytes
from attnserve_server.model.repository import Bundle
from attnserve_server.observability.logs import logger
from attnserve_server.observability.metrics import ENGINE_REASONS, ENGINE_RESTARTS, Metrics
from attnserve_server.processes.children import Child, Children, Reserve
from attnserve_server.processes.control import (
    ARENA_BYTES,
    Attach,
    Changed,
    Connect,
    Culprit,
    Drain,
    EngineStart,
    Loaded,
)
from attnserve_server.processes.ends import End, Suspects, pause_s
from attnserve_server.processes.kept_front import KeptFront
from attnserve_server.scheduling.catalog import ModelState

_log = logger(__name__)

LOAD_LIMIT_S: Final = 900.0
"""Seconds that an engine has to load its model."""
_MEMORY_LOOK_S: Final = 1.0
_END_S: Final = 5.0
"""Seconds that an engine without requests has to end by itself."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the engines of a server share.

    Args:
        settings: of the server.
        clock: of the server.
        children: all processes.
        reserve: gives processes.
        occupancy: descriptor of `SharedOccupancy`.
        places: in that.
        metrics: of the supervisor's own process.
        fronts: the fronts that have been started.
    """

    settings: Settings
    clock: Clock
    children: Children
    reserve: Reserve
    occupancy: int
    places: Places
    metrics: Metrics
    fronts: Callable[[], Iterable[KeptFront]]


class KeptEngine:
    """The engine of one model. Event loop only."""

    def __init__(self, around: Surroundings, serial: int, bundle: Bundle, changed: Callable[[Changed], None]) -> None:
        """Begin without a process.

        Args:
            around: of all engines.
            serial: of the model, as fronts know it.
            bundle: with descriptors of its files, which stay open until `close`.
            changed: called with each state of the model, once it has been ready.
        """
        self.name, self.version = bundle.manifest.name, bundle.manifest.version
        self.ending = False
        """Set before the server ends it."""
        self.child: Child | None = None
        self.is_ready = False
        self.expected_s: float | None = None
        """While it is replaced: seconds from its end to the next one."""
        self.loaded: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Why its model could not be loaded; empty: it is ready. Set once."""
        self.provider = self.precision = ""
        self._around = around
        self._serial = serial
        self._bundle = bundle
        self._manifest = bundle.manifest.model_dump_json().encode()
        self._changed = changed
        self._load = Arena.create_descriptor(LoadBoard.SIZE)
        self._place = around.places.take()
        self._arenas: dict[int, int] = {}  # of requests, by the number of the front
        self._stopped = asyncio.Event()
        self._ended = asyncio.Event()
        self._isolated = False
        self._end: End | None = None  # that this process has caused
        self._refused = False
        self._suspects = Suspects()
        self._failures = 0
        self._began_s = around.clock.now()
        self._was_cold = True
        self._load_s = self._import_s = 0.0  # of the last start
        self._restarts = {
            cause: around.metrics.counter(ENGINE_RESTARTS).labels(self.name, self.version, cause)
            for cause in ENGINE_REASONS
        }

    async def run(self) -> None:
        """Keep an engine running until `end` is called, the server ends, or its model has failed."""
        try:
            await self._run()
        finally:
            self._fail("it was ended")  # has no effect after it was ready
            self._ended.set()

    async def _run(self) -> None:
        wait_s = 0.0
        while True:
            await self._pause(wait_s)
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
            if self._stops():
                child.kill()
            else:
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

    async def end(self, *, at_once: bool = False) -> None:
        """End the engine, which has no request any more, with all that it counted. `at_once`: without that.

        Its `run` must have been started.
        """
        child, served = self.child, self.is_ready
        if child is not None and served and not at_once:
            await self._around.children.refresh([child])
        self.ending = True
        self._stopped.set()
        child = self.child
        if child is not None and served and not at_once:
            child.send(Drain())
            await asyncio.wait([child.ended], timeout=_END_S)
        if child is not None:
            child.kill()
        await self._ended.wait()

    @property
    def _served(self) -> bool:
        """Whether its model has been ready once."""
        return self.loaded.done() and not self.loaded.result()

    def equip(self, front: KeptFront, tokenizer: str) -> int:
        """Send a front what it needs to serve this model. Return the number of the package.

        `tokenizer`: name of its tokenizer's file; empty: it has none.
        """
        assert front.child is not None
        arena = self._arenas[front.number] = Arena.create_descriptor(ARENA_BYTES)
        files = [self._bundle.descriptors[tokenizer]] if tokenizer else []
        return front.child.packages.send(arena, self._load, *files)

    def attach(self, front: KeptFront) -> None:
        """Connect a front that runs, if the model is ready."""
        child = self.child
        if child is None or front.child is None or not self.is_ready or front.number not in self._arenas:
            return
        suspects = self._suspects.by_front([front.number])[front.number]
        answers = Arena.create_descriptor(ARENA_BYTES)
        here, there = socket.socketpair()
        with here, there:
            child.send(Attach(front.number, child.packages.send(there.fileno(), self._arenas[front.number], answers)))
            package = front.child.packages.send(here.fileno(), answers)
            front.child.send(Connect(self._serial, package, suspects))
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
        found = self._memory.look(now)
        if found:
            limit = self._memory.limit_bytes
            self._kill(child, End("memory", f"engine took {found} bytes; --engine-memory-bytes is {limit}"))

    def _stops(self) -> bool:
        return self.ending or self._refused

    async def _pause(self, seconds: float) -> None:
        if seconds:
            try:
                async with asyncio.timeout(seconds):
                    await self._stopped.wait()
            except TimeoutError:
                pass

    def close(self) -> None:
        """Close its memory. Its process has ended."""
        for front in tuple(self._arenas):
            self.detach(front)
        os.close(self._load)
        self._around.places.free(self._place)

    def _begin(self, child: Child) -> None:
        around = self._around
        self._end = None
        self._overdue = Overdue(child.pulse, around.settings.watchdog_floor_s)
        self._memory = MemoryLimit(child.process.pid, around.settings.engine_memory_bytes, all_bytes, _MEMORY_LOOK_S)
        child.received = self._receive
        self.child = child
        package = child.first_package(self._load, around.occupancy)
        files = [list(names) for names in _chunks(tuple(self._bundle.descriptors), descriptors.MOST)]
        packages = [child.packages.send(*(self._bundle.descriptors[name] for name in names)) for names in files]
        suspects = self._suspects.by_front(front.number for front in around.fronts())
        settings, path = around.settings.model_dump_json().encode(), str(self._bundle.path)
        child.send(
            EngineStart(
                settings, child.name, self._place, package, path, self._manifest, files, packages, suspects,
                self._isolated,
            )
        )  # fmt: skip

    def _receive(self, message: object) -> None:
        assert isinstance(message, Loaded)
        if message.state == ModelState.FAILED:
            self._refused = True
            self.expected_s = None
            assert self.child is not None
            self.child.kill()
            if not self.loaded.done():
                self._fail(message.reason)
                return
        else:
            self._isolated = bool(message.reason)
            self.provider, self.precision = message.provider or self.provider, message.precision or self.precision
            if not self.is_ready:
                self._ready(message)
        self._changed(Changed(self._serial, message.state, message.reason, self.provider, self.precision))

    def _ready(self, message: Loaded) -> None:
        self.is_ready = True
        if not self.loaded.done():
            self.loaded.set_result("")
        self.expected_s = None
        self._load_s = message.load_s
        if self._was_cold:
            self._import_s = max(0.0, self._around.clock.now() - self._began_s - message.load_s)
        for front in self._around.fronts():
            self.attach(front)
        self._around.reserve.fill()

    def _fail(self, why: str) -> None:
        """Report why the model could not be loaded, unless it was once."""
        if not self.loaded.done():
            self.loaded.set_result(why)

    def _kill(self, child: Child, end: End) -> None:
        self._end = end
        child.kill()

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
                front.child.send(Culprit(self._serial, culprit[1]))
        self._changed(Changed(self._serial, ModelState.LOADING.value, end.why, expected_s=self.expected_s))
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


def _chunks(names: Sequence[str], most: int) -> Iterable[Sequence[str]]:
    return (names[at : at + most] for at in range(0, len(names), most))
