"""The models of a server of one process: each bundle is tried in a separate process, and then runs in this one."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Final

from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock
from attnserve_server.engine.instance_thread import Occupancy
from attnserve_server.engine.pulse import Overdue, Pulse
from attnserve_server.model.repository import Bundle
from attnserve_server.scheduling.catalog import ModelState, ServedModel
from attnserve_server.starting import ISOLATED, Started, start_model
from attnserve_server.trial import Trials
from attnserve_server.wanted import under_policy

_SUBMITTED_EVERY_S: Final = 0.02
"""Seconds between two looks for requests that are not submitted yet."""


class LocalModel:
    """One model that runs in this process. Event loop only."""

    def __init__(self, models: LocalModels, served: ServedModel, started: Started, pulse: Pulse) -> None:
        self.started = started
        self._models = models
        self._served = served
        self._overdue = Overdue(pulse, math.inf)

    def why_hung(self, now: float) -> str:
        """Return why one of its runs counts as hung; empty: none does."""
        return self._overdue.look(now)

    async def retire(self) -> None:
        """End a model that gets no more requests, after those that it has."""
        await self._models.retire(self, self._served)


class LocalModels:
    """Runs models in this process. Event loop only."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        *,
        forget: Callable[[ServedModel], None],
        on_fault: Callable[[ServedModel], None],
    ) -> None:
        """Begin without models.

        Args:
            settings: of the server.
            clock: of the server.
            forget: called with each model that the catalog has no more.
            on_fault: called if a model's scheduler ends with an error.
        """
        self._settings = settings
        self._clock = clock
        self._on_fault = on_fault
        self._trials = Trials(settings)
        self._occupancy = Occupancy()
        # One model at a time loads in this process, because loading takes all cores, and costs of runs are measured.
        self._turn = asyncio.Lock()
        self._running: list[LocalModel] = []
        self.forget = forget

    def started(self) -> list[Started]:
        """Return the models that serve, with the objects to end."""
        return [one.started for one in self._running]

    async def begin(self, stored: Bundle, model: ServedModel) -> LocalModel:
        """Try a bundle, and start its model here."""
        bundle = under_policy(stored, self._settings)
        if self._settings.try_loads:
            await self._trials.run(bundle)

        def on_isolated() -> None:
            if model.state is ModelState.READY:
                model.move(ModelState.READY, ISOLATED)

        pulse = Pulse()
        async with self._turn:
            started = await start_model(
                bundle,
                self._settings,
                self._clock,
                model.metrics,
                self._occupancy,
                on_fault=lambda: self._on_fault(model),
                on_isolated=on_isolated,
                pulse=pulse,
            )
        model.manifest, model.tokenizer = started.opened.bundle.manifest, started.opened.tokenizer
        model.provider, model.scheduler = started.executor.provider, started.scheduler
        running = LocalModel(self, model, started, pulse)
        self._running.append(running)
        return running

    def shown(self, model: ServedModel) -> None:
        """Do nothing: calls are answered from the catalog."""

    async def settle(self) -> None:
        """Do nothing: calls are answered from the catalog."""

    def left(self, name: str, version: str) -> None:
        """Do nothing: nothing else was held of it."""

    async def retire(self, running: LocalModel, served: ServedModel) -> None:
        """End a model that gets no more requests, after those that it has."""
        self._running.remove(running)
        scheduler = running.started.scheduler
        try:
            async with asyncio.timeout(self._settings.drain_grace_s):
                while served.prepared:  # noqa: ASYNC110 - a request costs no more than adding to this number
                    await asyncio.sleep(_SUBMITTED_EVERY_S)
                await scheduler.drain()
        except TimeoutError:
            scheduler.abort()
        finally:
            await running.started.aclose()

    async def drain(self) -> None:
        """Wait for all pending requests."""
        await asyncio.gather(*(started.scheduler.drain() for started in self.started()))

    def abort(self) -> None:
        """Fail all pending requests."""
        for started in self.started():
            started.scheduler.abort()

    async def aclose(self) -> None:
        """End all models at once."""
        await asyncio.gather(*(started.aclose() for started in self.started()))
