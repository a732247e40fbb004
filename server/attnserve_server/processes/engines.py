"""The models of a server of several processes: an engine for each, and what each front knows of them.

A model gets a serial number, by which fronts know it, since two of one version exist while one replaces the other. A
change is done once every front that runs has acknowledged it (`Acks`). A front that ends meanwhile has no calls left,
and the next one begins with what is true then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

from attnserve_server.domain.errors import AttnserveError
from attnserve_server.model.holding import KeptFiles
from attnserve_server.model.repository import TOKENIZER_FILE, Bundle
from attnserve_server.observability.metrics import Metrics
from attnserve_server.processes.acks import Acks
from attnserve_server.processes.control import Add, Changed, Equip, Refused, Removed, Retired, Sync, Synced
from attnserve_server.processes.kept_engine import KeptEngine, Surroundings
from attnserve_server.processes.kept_front import KeptFront
from attnserve_server.scheduling.catalog import Catalog, ModelState, ServedModel
from attnserve_server.trial import Trials
from attnserve_server.wanted import under_policy


class EngineFailed(AttnserveError):
    """The engine of a model could not be started, or a front cannot serve the model."""

    reason = "ENGINE_FAILED"

    def __init__(self, why: str) -> None:
        super().__init__(why)


class Changes(Protocol):
    """What engines report by themselves, as `lifecycle.Lifecycle` takes it."""

    def changed(self, model: ServedModel) -> None:
        """Show the state that a model has entered."""

    def died(self, model: ServedModel, why: str) -> None:
        """Take note that an engine has ended for good."""


@dataclass(slots=True, eq=False)
class Kept:
    """One model, from its first trace in the server to its last.

    `is_shown`: fronts have it in their catalogs. `is_begun`: its engine is ready, and its state is reported.
    """

    serial: int
    model: ServedModel
    manifest: bytes = b""
    tokenizer: str = ""
    files: KeptFiles | None = None
    engine: KeptEngine | None = None
    is_shown: bool = False
    is_begun: bool = False
    refusals: list[str] = field(default_factory=list)
    retired: list[asyncio.Future[None]] = field(default_factory=list)


class Engines:
    """Runs models in engines. Event loop only. A `lifecycle.Host`."""

    def __init__(
        self,
        around: Surroundings,
        metrics: Metrics,
        catalog: Catalog,
        begin_task: Callable[[Coroutine[Any, Any, None], str], object],
    ) -> None:
        """Begin without models.

        Args:
            around: of all engines.
            metrics: of the server, with the facts of models.
            catalog: the models that the server shows.
            begin_task: starts a task of the supervisor, by its name.
        """
        self._around = around
        self._metrics = metrics
        self._catalog = catalog
        self._begin_task = begin_task
        self._trials = Trials(around.settings)
        self._kept: dict[ServedModel, Kept] = {}
        self._retiring: set[Kept] = set()
        self._serials = count(1)
        self._syncs = count(1)
        self._acks = Acks()
        self.lifecycle: Changes
        """Set before the first model."""
        self.tries = False
        """Whether bundles are tried first. While the server starts, an engine is such a trial itself."""
        self.draining = False

    def engines(self) -> list[KeptEngine]:
        """Return all engines, also those that end."""
        return [one.engine for one in (*self._kept.values(), *self._retiring) if one.engine is not None]

    async def begin(self, stored: Bundle, model: ServedModel) -> RunningEngine:
        """Try a bundle, start its engine, and equip all fronts.

        Raises:
            AttnserveError: it cannot be served; nothing is left of it.
        """
        kept = self._known(model)
        try:
            files = kept.files = await asyncio.to_thread(KeptFiles, stored)
            settings = self._around.settings
            if self.tries and settings.try_loads:
                await self._trials.run(under_policy(files.bundle, settings))
            await self._start(kept, files.bundle)
        except BaseException:
            await asyncio.shield(self._undo(kept))
            raise
        kept.is_begun = True
        return RunningEngine(self, kept)

    def shown(self, model: ServedModel) -> None:
        """Send all fronts the state of a model of the catalog."""
        kept = self._known(model)
        kept.is_shown = True
        for front in self._around.fronts():
            front.send(_state(kept))

    def forget(self, model: ServedModel) -> None:
        """Have all fronts end a model that the catalog has no more."""
        kept = self._kept.pop(model, None)
        if kept is None:
            return
        if kept.engine is not None:
            self._retiring.add(kept)
        for front in self._around.fronts():
            kept.retired.append(self._acks.expect(front.number, f"retired {kept.serial}"))
            front.send(Removed(kept.serial))

    async def settle(self) -> None:
        """Return once each front has done what it was sent before, or has ended."""
        number = next(self._syncs)
        waits = []
        for front in self._around.fronts():
            waits.append(self._acks.expect(front.number, f"synced {number}"))
            front.send(Sync(number))
        if waits:
            await asyncio.wait(waits)

    def left(self, name: str, version: str) -> None:
        """Remove the series of a version of which nothing is left."""
        held = [one.model for one in (*self._kept.values(), *self._retiring)]
        if not any((model.name, model.version) == (name, version) for model in held):
            for metrics in (self._metrics, self._around.metrics):
                metrics.forget(name, version)

    async def retire(self, kept: Kept) -> None:
        """End a model's engine after the last request of all fronts."""
        if kept.retired:
            await asyncio.wait(kept.retired)
        await self._end(kept)
        self._retiring.discard(kept)
        if kept.model not in self._kept:
            self._forget_series(kept.model)

    def watch(self, now: float) -> None:
        """Look for engines that hang, or take too much memory. Call it several times a second."""
        for engine in self.engines():
            engine.watch(now)

    def front_started(self, front: KeptFront) -> None:
        """Send a front that has its first message all models, with their states and engines."""
        for kept in self._kept.values():
            front.send(_added(kept))
            if kept.engine is not None:
                self._equip(kept, kept.engine, front)
            if kept.is_shown:
                front.send(_state(kept))
        front.send(Sync(0))

    def front_ended(self, number: int) -> None:
        """Forget a front."""
        self._acks.forget(number)
        for engine in self.engines():
            engine.detach(number)

    def front_sent(self, front: KeptFront, message: object) -> None:
        """Take an answer of a front."""
        if isinstance(message, Synced):
            self._acks.resolve(front.number, f"synced {message.number}")
        elif isinstance(message, Retired):
            self._acks.resolve(front.number, f"retired {message.serial}")
        elif isinstance(message, Refused):
            for kept in self._kept.values():
                if kept.serial == message.serial:
                    kept.refusals.append(message.why)

    def close(self) -> None:
        """Close the memory and the files of all models. All processes have ended."""
        self._acks.close()
        for kept in (*self._kept.values(), *self._retiring):
            self._close(kept)

    def no_fronts(self) -> None:
        """Expect nothing more of any front: the server ends, and they have ended."""
        self._acks.close()

    def _known(self, model: ServedModel) -> Kept:
        """Return what is kept of a model; all fronts get it the first time."""
        kept = self._kept.get(model)
        if kept is None:
            manifest = b"" if model.manifest is None else model.manifest.model_dump_json().encode()
            kept = self._kept[model] = Kept(next(self._serials), model, manifest)
            for front in self._around.fronts():
                front.send(_added(kept))
        return kept

    async def _start(self, kept: Kept, bundle: Bundle) -> None:
        """Start an engine, and equip all fronts. Raises EngineFailed."""
        has_tokenizer = TOKENIZER_FILE in bundle.manifest.files and bundle.manifest.text is not None
        kept.tokenizer = TOKENIZER_FILE if has_tokenizer else ""
        engine = kept.engine = KeptEngine(
            self._around, kept.serial, bundle, lambda changed: self._changed(kept, changed)
        )
        self._begin_task(engine.run(), f"engine {engine.name}/{engine.version}")
        for front in self._around.fronts():
            self._equip(kept, engine, front)
        await asyncio.shield(engine.loaded)
        if not engine.loaded.result():
            await self.settle()
        why = engine.loaded.result() or next(iter(kept.refusals), "")
        if not why and not engine.is_ready:
            why = "its engine ended as soon as it was ready"
        if why:
            raise EngineFailed(why)
        model = kept.model
        model.provider = engine.provider
        if engine.precision and model.manifest is not None:
            model.manifest = model.manifest.model_copy(update={"precision": engine.precision})
        model.metrics.provider(model.provider, engine.precision)

    def _equip(self, kept: Kept, engine: KeptEngine, front: KeptFront) -> None:
        front.send(Equip(kept.serial, engine.equip(front, kept.tokenizer)))
        engine.attach(front)

    async def _undo(self, kept: Kept) -> None:
        """End what was started for a model that does not serve."""
        await self._end(kept, at_once=True)
        if not kept.is_shown:
            self.forget(kept.model)

    async def _end(self, kept: Kept, *, at_once: bool = False) -> None:
        if kept.engine is not None:
            await kept.engine.end(at_once=at_once)
        self._close(kept)

    def _close(self, kept: Kept) -> None:
        engine, kept.engine = kept.engine, None
        files, kept.files = kept.files, None
        kept.is_begun = False
        if engine is not None:
            engine.close()
        if files is not None:
            files.close()

    def _changed(self, kept: Kept, changed: Changed) -> None:
        """Take the state of an engine that has been ready once."""
        if not kept.is_begun:
            return  # its model does not serve yet
        if self.draining or kept.model not in self._kept:  # fronts still have requests for the next engine
            for front in self._around.fronts():
                front.send(changed)
            return
        if changed.state == ModelState.FAILED:
            self.lifecycle.died(kept.model, changed.reason)
            return
        kept.model.move(ModelState(changed.state), changed.reason)
        kept.model.is_replaced = changed.expected_s is not None
        self.lifecycle.changed(kept.model)

    def _forget_series(self, model: ServedModel) -> None:
        """Remove the series of a model that has ended, unless the server holds its version still."""
        if all((one.name, one.version) != (model.name, model.version) for one in self._catalog.all()):
            self.left(model.name, model.version)


class RunningEngine:
    """The engine of a model that serves."""

    def __init__(self, engines: Engines, kept: Kept) -> None:
        self._engines = engines
        self._kept = kept

    def why_hung(self, now: float) -> str:
        """Return an empty text: an engine that hangs is replaced."""
        del now
        return ""

    async def retire(self) -> None:
        """End the engine after its last request."""
        await self._engines.retire(self._kept)


def _added(kept: Kept) -> Add:
    return Add(kept.serial, kept.model.name, kept.model.version, kept.manifest, kept.model.max_request_size)


def _state(kept: Kept) -> Changed:
    model, engine = kept.model, kept.engine
    expected_s = engine.expected_s if engine is not None and model.is_replaced else None
    precision = "" if model.manifest is None else model.manifest.precision
    return Changed(kept.serial, model.state.value, model.state_reason, model.provider, precision, expected_s)
