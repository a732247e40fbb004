"""The models of a front, as the supervisor states them: their entries, their schedulers, and how each ends.

Messages are done in the order in which they arrive, but for the end of a model, which waits for its requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock
from attnserve_server.domain.errors import AttnserveError
from attnserve_server.isolation.arena import Arena, LoadBoard
from attnserve_server.isolation.descriptors import DescriptorReceiver
from attnserve_server.isolation.remote import RemoteScheduler
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.repository import TOKENIZER_FILE, Bundle
from attnserve_server.observability.logs import logger
from attnserve_server.observability.metrics import Metrics
from attnserve_server.processes.control import (
    ARENA_BYTES,
    Add,
    Changed,
    Connect,
    Culprit,
    Equip,
    Refused,
    Removed,
    Retired,
    Sync,
    Synced,
)
from attnserve_server.scheduling.catalog import Catalog, ModelState, ServedModel
from attnserve_server.transport.health import OVERALL, Health
from attnserve_server.transport.servicer import SERVICE
from attnserve_server.wanted import scheduling_settings, tokenizer_of

_log = logger(__name__)

Message = Add | Equip | Connect | Culprit | Changed | Removed | Sync
_SUBMITTED_EVERY_S: Final = 0.02
"""Seconds between two looks for requests that are not submitted yet."""


@dataclass(slots=True, eq=False)
class _Entry:
    """One model. `bundle`: without files; None: it is broken. `scheduler`: None without an engine."""

    model: ServedModel
    bundle: Bundle | None
    scheduler: RemoteScheduler | None = None


class FrontModels:
    """The models of a front. Event loop only."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        metrics: Metrics,
        catalog: Catalog,
        health: Health,
        packages: DescriptorReceiver,
        *,
        forget: Callable[[ServedModel], None],
        send: Callable[[msgspec.Struct], None],
    ) -> None:
        """Begin without models.

        Args:
            settings: of the server.
            clock: of the front.
            metrics: of the front.
            catalog: gets the models.
            health: gets their states.
            packages: receives descriptors.
            forget: called with each model that the catalog has no more.
            send: sends a message to the supervisor.
        """
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._catalog = catalog
        self._health = health
        self._packages = packages
        self._forget = forget
        self._send = send
        self._entries: dict[int, _Entry] = {}
        self._retiring: dict[int, _Entry] = {}  # those that get no new requests, and have some
        self._queue: asyncio.Queue[Message] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False
        self.synced = asyncio.Event()
        """Set once all models of the server are known."""

    def receive(self, message: Message) -> None:
        """Take a message of the supervisor."""
        self._queue.put_nowait(message)

    async def work(self) -> None:
        """Do what the messages state, in order. Ends when it is cancelled."""
        while True:
            message = await self._queue.get()
            if isinstance(message, Add):
                self._add(message)
            elif isinstance(message, Equip):
                await self._equip(message)
            elif isinstance(message, Connect):
                await self._connect(message)
            elif isinstance(message, Culprit):
                self._crashed(message)
            elif isinstance(message, Changed):
                self._change(message)
            elif isinstance(message, Removed):
                self._remove(message.serial)
            elif isinstance(message, Sync):
                self.synced.set()
                self._send(Synced(message.number))

    def drain(self) -> None:
        """Let no model take requests again."""
        self._draining = True

    async def drained(self) -> None:
        """Return when no request is pending."""
        await asyncio.gather(*(scheduler.drained() for scheduler in self._schedulers()))

    def close(self) -> None:
        """Fail all pending requests."""
        for scheduler in self._schedulers():
            scheduler.close()

    def _schedulers(self) -> list[RemoteScheduler]:
        entries = (*self._entries.values(), *self._retiring.values())
        return [one.scheduler for one in entries if one.scheduler is not None]

    def _scheduler(self, serial: int) -> RemoteScheduler | None:
        """Return the scheduler of a model, also of one that is removed and has requests."""
        entry = self._entries.get(serial) or self._retiring.get(serial)
        return None if entry is None else entry.scheduler

    def _add(self, message: Add) -> None:
        metrics = self._metrics.model(message.name, message.version)
        if not message.manifest:
            self._entries[message.serial] = _Entry(ServedModel(message.name, message.version, metrics), None)
            return
        manifest = Manifest.model_validate_json(message.manifest)
        model = ServedModel(message.name, message.version, metrics, manifest, message.max_request_size)
        self._entries[message.serial] = _Entry(model, Bundle(Path(), manifest))

    async def _equip(self, message: Equip) -> None:
        """Give a model its scheduler and tokenizer. Where that fails, the supervisor is answered why."""
        arena, load, *files = await self._packages.take(message.package)
        entry = self._entries[message.serial]
        assert entry.bundle is not None
        model, manifest = entry.model, entry.bundle.manifest
        try:
            if files:
                bundle = replace(entry.bundle, descriptors={TOKENIZER_FILE: files[0]})
                model.tokenizer = await asyncio.to_thread(tokenizer_of, bundle)
            model.scheduler = entry.scheduler = RemoteScheduler(
                model.name, Arena(arena, ARENA_BYTES), LoadBoard(load), scheduling_settings(self._settings, manifest),
                self._clock, model.metrics,
            )  # fmt: skip
        except (AttnserveError, OSError) as error:
            _log.error("a model cannot be served", model=model.name, version=model.version, reason=str(error))
            self._send(Refused(message.serial, str(error)))
        finally:
            for descriptor in (arena, load, *files):
                os.close(descriptor)

    async def _connect(self, message: Connect) -> None:
        link, descriptor = await self._packages.take(message.package)
        scheduler = self._scheduler(message.serial)
        try:
            if scheduler is None:
                os.close(link)
            else:
                await scheduler.connect(socket.socket(fileno=link), Arena(descriptor, ARENA_BYTES), message.suspects)
        finally:
            os.close(descriptor)

    def _crashed(self, message: Culprit) -> None:
        scheduler = self._scheduler(message.serial)
        if scheduler is not None:
            scheduler.crashed(message.number)

    def _change(self, changed: Changed) -> None:
        scheduler = self._scheduler(changed.serial)
        if scheduler is not None and changed.expected_s is not None:
            scheduler.expect(changed.expected_s)
        elif scheduler is not None and changed.state == ModelState.FAILED:
            scheduler.refuse(changed.state)
        entry = self._entries.get(changed.serial)
        if entry is None or self._draining:
            return  # it takes no requests again
        model = entry.model
        if changed.provider:
            model.provider = changed.provider
        if changed.precision and model.manifest is not None:
            model.manifest = model.manifest.model_copy(update={"precision": changed.precision})
        model.move(ModelState(changed.state), changed.reason)
        model.is_replaced = changed.expected_s is not None
        if changed.state == ModelState.FAILED and scheduler is not None:
            entry.scheduler = model.scheduler = None
            self._keep(scheduler.aclose())
        self._catalog.replace(model)
        self._report(model.name)

    def _remove(self, serial: int) -> None:
        entry = self._entries.pop(serial, None)
        if entry is None:
            self._send(Retired(serial))
            return
        self._catalog.remove(entry.model)
        self._forget(entry.model)
        self._report(entry.model.name)
        self._retiring[serial] = entry
        self._keep(self._retire(serial, entry))

    async def _retire(self, serial: int, entry: _Entry) -> None:
        """End a model that gets no more requests, after those that it has, or at the end of the grace period."""
        scheduler = entry.scheduler
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_grace_s):
                while entry.model.prepared:  # noqa: ASYNC110 - a request costs no more than adding to this number
                    await asyncio.sleep(_SUBMITTED_EVERY_S)
                if scheduler is not None:
                    await scheduler.drained()
        if scheduler is not None:
            await scheduler.aclose()
        del self._retiring[serial]
        key = entry.model.name, entry.model.version
        left = (*self._entries.values(), *self._retiring.values())
        if all((one.model.name, one.model.version) != key for one in left):
            self._metrics.forget(*key)
        self._send(Retired(serial))

    def _report(self, name: str) -> None:
        """Report the health of a model, and of the server."""
        versions = [model for model in self._catalog.all() if model.name == name]
        if versions:
            self._health.set(name, serving=any(model.state is ModelState.READY for model in versions))
        else:
            self._health.forget(name)
        ready = self._catalog.serves(self._settings.ready, started=self._health.serving())
        self._health.set(SERVICE, serving=ready)
        self._health.set(OVERALL, serving=ready)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
