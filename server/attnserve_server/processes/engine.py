"""An engine: one process that owns the queue, the plan, the sessions and the attention of one model.

`python -m attnserve_server.processes.engine LINK LOG NAME`, started by the supervisor.
"""

from __future__ import annotations

import asyncio
import socket

from attnserve_server.config import Settings
from attnserve_server.domain.clock import MonotonicClock
from attnserve_server.engine.instance_thread import SharedOccupancy
from attnserve_server.isolation.arena import Arena, LoadBoard
from attnserve_server.isolation.host import Host
from attnserve_server.isolation.link import Link
from attnserve_server.lifetime import EXIT_DRAINED, EXIT_FAULTED
from attnserve_server.model.repository import Bundle
from attnserve_server.observability.metrics import Metrics
from attnserve_server.processes.child import run
from attnserve_server.processes.control import (
    ARENA_BYTES,
    ENCODER,
    Changed,
    Drain,
    EngineStart,
    Scrape,
    Scraped,
)
from attnserve_server.scheduling.catalog import ModelState
from attnserve_server.starting import ISOLATED, Started, start_model, why_not_loaded
from attnserve_server.wanted import under_policy, wanted_bundles


class EngineProcess:
    """The engine of one model. Event loop only."""

    def __init__(self, start: EngineStart, settings: Settings, supervisor: Link) -> None:
        self._start = start
        self._settings = settings
        self._supervisor = supervisor
        self._clock = MonotonicClock()
        self._metrics = Metrics()
        self._end = asyncio.Event()
        self._faulted = False

    def receive(self, message: object) -> None:
        """Take a message of the supervisor."""
        if isinstance(message, Drain):
            self._end.set()
        elif isinstance(message, Scrape):
            self._supervisor.send(ENCODER.encode(Scraped(message.number, self._metrics.snapshot())))

    async def run(self) -> int:
        """Load the model, and serve the fronts until the supervisor ends it. Return the exit code."""
        start = self._start
        try:
            started = await self._load(self._bundle())
        except Exception as error:  # noqa: BLE001 - the boundary of a model's load: the others are served
            self._report(ModelState.FAILED, why_not_loaded(error, start.name, start.version))
            await self._end.wait()
            return EXIT_DRAINED
        host = Host(started.scheduler, LoadBoard(start.board))
        for front in start.fronts:
            arenas = Arena(front.answers, ARENA_BYTES), Arena(front.requests, ARENA_BYTES)
            await host.attach(socket.socket(fileno=front.link), arenas)
        manifest, provider = started.opened.bundle.manifest, started.executor.provider
        self._report(ModelState.READY, "", provider, manifest.precision)
        await self._end.wait()
        await started.scheduler.drain()
        await started.aclose()
        host.close()
        return EXIT_FAULTED if self._faulted else EXIT_DRAINED

    def _bundle(self) -> Bundle:
        name, version = self._start.name, self._start.version
        bundles, _ = wanted_bundles(self._settings.model_copy(update={"models": (f"{name}/{version}",)}))
        return under_policy(bundles[0], self._settings)

    async def _load(self, bundle: Bundle) -> Started:
        metrics = self._metrics.model(self._start.name, self._start.version)

        def on_fault() -> None:
            self._faulted = True
            self._report(ModelState.FAILED, "its scheduler died")
            self._end.set()

        def on_isolated() -> None:
            self._report(ModelState.READY, ISOLATED)

        return await start_model(
            bundle,
            self._settings,
            self._clock,
            metrics,
            SharedOccupancy(self._start.occupancy, self._start.place),
            on_fault=on_fault,
            on_isolated=on_isolated,
        )

    def _report(self, state: ModelState, reason: str, provider: str = "", precision: str = "") -> None:
        changed = Changed(self._start.name, self._start.version, state.value, reason, provider, precision)
        self._supervisor.send(ENCODER.encode(changed))


if __name__ == "__main__":
    run(EngineStart, EngineProcess)
