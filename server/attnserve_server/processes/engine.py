"""An engine: one process that owns the queue, the plan, the sessions and the attention of one model.

`python -m attnserve_server.processes.engine LINK PACKAGES LOG NAME`, started by the supervisor. It imports the runtime
before its first message names the model, so that one can be kept in reserve.
"""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

from attnserve_server.config import Settings
from attnserve_server.domain.clock import MonotonicClock
from attnserve_server.engine.instance_thread import SharedOccupancy
from attnserve_server.isolation.arena import Arena, LoadBoard
from attnserve_server.isolation.host import Host
from attnserve_server.lifetime import EXIT_DRAINED, EXIT_FAULTED, end_now
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.repository import Bundle
from attnserve_server.observability.metrics import Metrics
from attnserve_server.observability.trace_context import FLUSH_S, tracing_of
from attnserve_server.processes.child import Parent, run
from attnserve_server.processes.control import (
    ARENA_BYTES,
    ENCODER,
    Attach,
    Drain,
    EngineStart,
    Loaded,
    Scrape,
    Scraped,
)
from attnserve_server.scheduling.catalog import ModelState
from attnserve_server.starting import ISOLATED, Started, start_model
from attnserve_server.wanted import under_policy, why_not_loaded


class EngineProcess:
    """The engine of one model. Event loop only."""

    def __init__(self, start: EngineStart, settings: Settings, supervisor: Parent) -> None:
        self._start = start
        self._manifest = Manifest.model_validate_json(start.manifest)
        self._settings = settings
        self._supervisor = supervisor
        self._clock = MonotonicClock()
        self._began_s = self._clock.now()
        self._metrics = Metrics()
        self._tracing = tracing_of(settings, self._metrics, self._clock)
        self._end = asyncio.Event()
        self._faulted = False
        board, occupancy = supervisor.given
        self._board, self._occupancy = LoadBoard(board), SharedOccupancy(occupancy, start.place)
        for descriptor in supervisor.given:
            os.close(descriptor)
        self._host: Host | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def receive(self, message: object) -> None:
        """Take a message of the supervisor."""
        if isinstance(message, Attach):
            task = asyncio.create_task(self._attach(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif isinstance(message, Drain):
            self._end.set()
        elif isinstance(message, Scrape):
            self._supervisor.link.send(ENCODER.encode(Scraped(message.number, self._metrics.snapshot())))

    async def run(self) -> int:
        """Load the model, and serve the fronts until the supervisor ends it. Return the exit code."""
        start = self._start
        try:
            loading = asyncio.create_task(self._load())
            ended = asyncio.create_task(self._end.wait())
            await asyncio.wait((loading, ended), return_when=asyncio.FIRST_COMPLETED)
            if not loading.done():
                end_now(EXIT_DRAINED)  # the thread that loads a model cannot be stopped
            started = await loading
        except Exception as error:  # noqa: BLE001 - the boundary of a model's load: the others are served
            self._report(ModelState.FAILED, why_not_loaded(error, self._manifest.name, self._manifest.version))
            await self._end.wait()
            return EXIT_DRAINED
        pulse, tracing = self._supervisor.pulse, self._tracing
        host = self._host = Host(started.scheduler, self._board, pulse, start.suspects, tracing)
        manifest, provider = started.opened.bundle.manifest, started.executor.provider
        if start.isolated:
            started.scheduler.isolate()
        self._report(ModelState.READY, ISOLATED if start.isolated else "", provider, manifest.precision)
        await self._end.wait()
        await started.scheduler.drain()
        await started.aclose()
        host.close()
        if tracing is not None:
            await tracing.aclose(min(FLUSH_S, self._settings.drain_grace_s))
        return EXIT_FAULTED if self._faulted else EXIT_DRAINED

    async def _attach(self, message: Attach) -> None:
        link, requests, answers = await self._supervisor.packages.take(message.package)
        arenas = Arena(answers, ARENA_BYTES), Arena(requests, ARENA_BYTES)
        for descriptor in (requests, answers):
            os.close(descriptor)
        assert self._host is not None, "fronts are attached once the model is ready"
        await self._host.attach(socket.socket(fileno=link), arenas, message.front)

    async def _load(self) -> Started:
        start = self._start
        metrics = self._metrics.model(self._manifest.name, self._manifest.version)

        def on_fault() -> None:
            self._faulted = True
            self._end.set()

        def on_isolated() -> None:
            self._report(ModelState.READY, ISOLATED)

        files: dict[str, int] = {}
        try:
            for names, package in zip(start.files, start.packages, strict=True):
                files |= zip(names, await self._supervisor.packages.take(package), strict=True)
            bundle = Bundle(Path(start.path), self._manifest, descriptors=files)
            return await start_model(
                under_policy(bundle, self._settings),
                self._settings,
                self._clock,
                metrics,
                self._occupancy,
                on_fault=on_fault,
                on_isolated=on_isolated,
                pulse=self._supervisor.pulse,
            )
        finally:
            for descriptor in files.values():
                os.close(descriptor)

    def _report(self, state: ModelState, reason: str, provider: str = "", precision: str = "") -> None:
        load_s = self._clock.now() - self._began_s
        loaded = Loaded(state.value, reason, provider, precision, load_s)
        self._supervisor.link.send(ENCODER.encode(loaded))


if __name__ == "__main__":
    run(EngineStart, EngineProcess)
