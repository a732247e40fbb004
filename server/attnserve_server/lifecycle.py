"""Loads, replaces and unloads the models of a server, at its start and while it runs.

Each version has at most one change at a time, and versions change side by side. A `Host` runs the models: this process
(`local_models`), or engines (`processes.engines`). A version whose files were replaced is loaded beside the one that
serves, takes its place when it is ready, and is dropped if it fails. Methods raise what `transport.admin.Lifecycle`
states.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from typing import Any, Final, Protocol, TypeVar
from weakref import WeakValueDictionary

from attnserve_server.config import Settings
from attnserve_server.domain.errors import AttnserveError, ModelFailed, NotServing, RepositoryUnusable
from attnserve_server.engine.providers import ProviderUnavailable
from attnserve_server.model.repository import Bundle, BundleFault, BundleInvalid, Repository
from attnserve_server.observability.logs import logger
from attnserve_server.observability.metrics import Metrics
from attnserve_server.scheduling.catalog import Catalog, ModelState, ServedModel
from attnserve_server.transport.admin import Change, Outcome
from attnserve_server.transport.health import Health
from attnserve_server.transport.receiving import ReceiveBounds
from attnserve_server.versions import Key, Running, Version, Versions, key_of
from attnserve_server.wanted import is_wanted, wanted_bundles, why_not_loaded

_log = logger(__name__)

T = TypeVar("T")
_LOOK_EVERY_S: Final = 1.0
"""Seconds between two looks at the repository; it costs a `stat` for each file."""


class Host(Protocol):
    """Where models run. Event loop only."""

    async def begin(self, stored: Bundle, model: ServedModel) -> Running:
        """Try a bundle, and start its model. The catalog may have another one of its version, which serves on.

        Raises:
            Exception: it cannot be served; nothing is left of it.
        """
        ...

    def shown(self, model: ServedModel) -> None:
        """Take note that a model of the catalog has entered a state."""
        ...

    def forget(self, model: ServedModel) -> None:
        """Take note that the catalog does not have a model any more."""
        ...

    async def settle(self) -> None:
        """Return once all calls that begin from now on are answered by the states that were shown."""
        ...

    def left(self, name: str, version: str) -> None:
        """Take note that nothing is held of a version, and nothing runs of it."""
        ...


class Lifecycle:
    """The models of a server. Event loop only."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        catalog: Catalog,
        health: Health,
        host: Host,
        *,
        counted: Metrics | None = None,
        reachable: Callable[[], bool] = lambda: True,
    ) -> None:
        """Store the parts.

        Args:
            settings: of the server.
            metrics: of the server.
            catalog: gets the models.
            health: gets their states.
            host: runs them.
            counted: counts changes; None: `metrics`.
            reachable: whether callers reach the server at all.
        """
        self._settings = settings
        self._metrics = metrics
        self._catalog = catalog
        self._host = host
        self._repository = Repository(settings.repository)
        self._stamps: dict[Key, object] = {}
        self._versions = Versions(
            settings, metrics, catalog, health,
            shown=host.shown, forget=host.forget, counted=counted or metrics, reachable=reachable,
        )  # fmt: skip
        self._withheld: set[Key] = set()
        self._locks: WeakValueDictionary[Key, asyncio.Lock] = WeakValueDictionary()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._retiring: set[asyncio.Task[None]] = set()
        self._has_started = False
        self._draining = False
        self.bounds: ReceiveBounds | None = None
        """Of the messages that callers send, since the start."""

    def find(self) -> list[Bundle]:
        """Add the models that the settings name to the catalog, as loading or failed; return the bundles to load.

        Raises:
            StartFailed: there is none.
        """
        self._stamps = self._repository.stamps()
        bundles, faults = wanted_bundles(self._settings)
        for fault in faults:
            self._versions.broken(fault)
        for bundle in bundles:
            self._versions.put(Version(self._versions.made(bundle), bundle), ModelState.LOADING)
        return bundles

    def look(self, now: float) -> None:
        """Look for runs that take too long. The health of their models is NOT_SERVING until they end."""
        self._versions.look(now)

    async def start(self) -> None:
        """Load what was found, side by side. One that fails is FAILED with the reason, and the others load.

        Raises:
            ProviderUnavailable: the requested execution provider is not available.
        """
        waiting = [held.stored for held in self._versions.held.values() if held.stored is not None]
        results = await asyncio.gather(*(self._load(stored) for stored in waiting), return_exceptions=True)
        for error in results:
            if isinstance(error, BaseException):
                raise error
        self._has_started = True
        self._versions.begin()

    async def load(self, name: str, version: str = "") -> ServedModel:
        """Return a version that is ready, loaded if it was not."""
        self._check()
        try:
            stored = await asyncio.to_thread(self._repository.bundle, name, version)
        except BundleInvalid as error:
            self._versions.broken(BundleFault(name, error.version, error.why))
            raise ModelFailed(name, error.version, error.why) from None
        key = name, stored.manifest.version
        self._withheld.discard(key)
        change = await self._going_on(self._changed(stored))
        if change is not None and change.outcome is Outcome.FAILED:
            raise ModelFailed(*key, change.reason)
        return self._catalog.find(*key)

    async def unload(self, name: str, version: str) -> None:
        """Unload a version until it is loaded by its name, or the server starts again."""
        self._check()
        self._catalog.find(name, version)
        await self._going_on(self._unload((name, version), withhold=True))

    async def reload(self, only: Collection[Key] | None = None) -> list[Change]:
        """Compare the repository with what is loaded, and return what was changed. `only`: these; None: all."""
        self._check()
        return await self._going_on(self._reload(only))

    def hurry(self) -> None:
        """Reload in the background: for SIGHUP."""
        if self._has_started and not self._draining:
            self._keep(self._logged(None))

    async def watch(self) -> None:
        """Reload what appears, changes or is removed, once it has been the same twice. Ends when it is cancelled."""
        acted, seen = dict(self._stamps), self._stamps
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            now = await asyncio.to_thread(self._repository.stamps)
            changed = {key for key in acted.keys() | now.keys() if now.get(key) != acted.get(key)}
            # Files that change right now are read once they have been the same twice, so that none is half written.
            settled = {key for key in changed if now.get(key) == seen.get(key)}
            if settled:
                acted = {key: stamp for key, stamp in acted.items() if key not in settled}
                acted |= {key: now[key] for key in settled & now.keys()}
                self._keep(self._logged(settled))
            seen = now

    def died(self, model: ServedModel, why: str) -> None:
        """Take note that what ran a model has ended for good. A reload loads the version again."""
        held = self._versions.held.get((model.name, model.version))
        if held is not None and held.served is model and held.running is not None:
            running, held.running = held.running, None
            self._versions.put(held, ModelState.FAILED, why)
            self._ending(running)

    def changed(self, model: ServedModel) -> None:
        """Show the state that a model has entered by itself, if the catalog has this very one."""
        if self._versions.holds(model):
            self._host.shown(model)
            self._versions.report(model.name)

    def report(self) -> None:
        """Report the health of the server as a whole: callers reach it again, or not any more."""
        self._versions.report()

    def stop(self) -> None:
        """Change nothing more."""
        self._draining = True
        for task in self._tasks:
            task.cancel()

    async def drain(self) -> None:
        """Change nothing more, and wait for the versions that have been replaced or unloaded."""
        self.stop()
        await asyncio.gather(*self._retiring)

    async def aclose(self) -> None:
        """Change nothing more, and end at once what a version still does that has been replaced or unloaded."""
        self.stop()
        tasks = [*self._tasks, *self._retiring]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _check(self) -> None:
        if self._draining:
            raise NotServing("", "draining")

    async def _going_on(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for work that goes on if the caller is cancelled. Raises NotServing if a drain ends it."""
        task = self._keep(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled() and self._draining:
                raise NotServing("", "draining") from None
            raise

    def _keep(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _logged(self, only: Collection[Key] | None) -> None:
        """Reload, and log what cannot be done."""
        try:
            changes = await self._reload(only)
        except AttnserveError as error:
            _log.error("repository was not reloaded", reason=str(error))
            return
        found = [f"{change.name}/{change.version} {change.outcome.value}" for change in changes]
        _log.info("repository was reloaded", changes=found)

    async def _reload(self, only: Collection[Key] | None) -> list[Change]:
        bundles, faults = await asyncio.to_thread(self._repository.bundles)
        there = {key_of(bundle) for bundle in bundles} | {(fault.name, fault.version) for fault in faults}
        if not there:
            raise RepositoryUnusable("the repository has no bundle, or cannot be read; unload models by their names")
        self._withheld &= there

        def concerns(key: Key) -> bool:
            wanted = key in self._versions.held or is_wanted(self._settings, *key)
            return wanted and key not in self._withheld and (only is None or key in only)

        changes: list[Change | None] = [
            self._versions.broken(fault) for fault in faults if concerns((fault.name, fault.version))
        ]
        changes += await asyncio.gather(*(self._changed(bundle) for bundle in bundles if concerns(key_of(bundle))))
        # What is new serves before what was removed ends.
        gone = [key for key in self._versions.held if key not in there and (only is None or key in only)]
        changes += await asyncio.gather(*(self._unload(key, withhold=False) for key in gone))
        return sorted((change for change in changes if change is not None), key=_order)

    async def _changed(self, stored: Bundle) -> Change | None:
        """Load a bundle unless it serves. An unavailable provider is a failure of this version like any other."""
        try:
            return await self._load(stored)
        except ProviderUnavailable as error:
            return self._versions.failed(stored, str(error))

    async def _load(self, stored: Bundle) -> Change | None:
        """Load a bundle in place of what the server holds of its version; None: that serves these files already."""
        async with self._changing(key_of(stored)):
            before = self._versions.held.get(key_of(stored))
            serving = before is not None and before.running is not None
            if before is not None and serving and before.stored == stored:
                return None
            if before is not None and before.stored == stored and before.served.state is ModelState.LOADING:
                model = before.served
            else:
                model = self._versions.made(stored)
                if not serving:
                    self._versions.put(Version(model, stored), ModelState.LOADING)
            try:
                self._check_size(stored)
                running = await self._host.begin(stored, model)
            except ProviderUnavailable:
                raise
            except Exception as error:  # noqa: BLE001 - the boundary of a model's load: the others are served
                return self._versions.failed(stored, why_not_loaded(error, model.name, model.version))
            replaced = self._versions.put(Version(model, stored, running), ModelState.READY)
            await self._host.settle()
            if replaced is None:
                return self._versions.counted(Change(*key_of(stored), Outcome.LOADED))
            self._ending(replaced)
            return self._versions.counted(Change(*key_of(stored), Outcome.REPLACED))

    async def _unload(self, key: Key, *, withhold: bool) -> Change | None:
        """Unload a version; None: the server does not hold it."""
        async with self._changing(key):
            held = self._versions.remove(key)
            if held is None:
                return None
            if withhold:
                self._withheld.add(key)
            await self._host.settle()
            if held.running is not None:
                await asyncio.shield(self._ending(held.running))
            self._metrics.forget(*key)
            self._host.left(*key)
            _log.info("model unloaded", model=key[0], version=key[1])
            return self._versions.counted(Change(*key, Outcome.UNLOADED))

    def _check_size(self, stored: Bundle) -> None:
        """Raise BundleInvalid if a request of a model may be larger than what the server accepts since its start."""
        why = "" if self.bounds is None else self.bounds.why_too_large(stored.manifest, self._settings)
        if why:
            raise BundleInvalid(*key_of(stored), why)

    def _ending(self, running: Running) -> asyncio.Task[None]:
        """End what gets no more requests, in a task that a drain waits for."""
        retiring = asyncio.create_task(running.retire())
        self._retiring.add(retiring)
        retiring.add_done_callback(self._retiring.discard)
        return retiring

    @contextlib.asynccontextmanager
    async def _changing(self, key: Key) -> AsyncIterator[None]:
        """Let one change of a version run at a time."""
        async with self._locks.setdefault(key, asyncio.Lock()):
            yield


def _order(change: Change) -> tuple[str, int]:
    return change.name, int(change.version)
