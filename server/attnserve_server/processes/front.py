"""A front: one process that serves gRPC and REST, and sends valid requests to the engines of their models.

`python -m attnserve_server.processes.front LINK PACKAGES LOG NAME`, started by the supervisor. It does not import the
runtime.
"""

from __future__ import annotations

import asyncio
import os
import socket
from itertools import count
from typing import Final

from attnserve_server.access.guard import Access, Material
from attnserve_server.access.limits import Buckets
from attnserve_server.access.tokens import MAX_TOKENS
from attnserve_server.config import Settings
from attnserve_server.domain.clock import MonotonicClock
from attnserve_server.isolation.arena import Arena, LoadBoard
from attnserve_server.isolation.remote import RemoteScheduler
from attnserve_server.lifetime import EXIT_DRAINED
from attnserve_server.model.repository import Bundle
from attnserve_server.observability.metrics import Metrics
from attnserve_server.processes.child import Parent, run
from attnserve_server.processes.control import (
    ARENA_BYTES,
    ENCODER,
    Changed,
    Connect,
    Culprit,
    Drain,
    FrontModel,
    FrontStart,
    Listening,
    PageAnswer,
    PageRequest,
    Scrape,
    Scraped,
)
from attnserve_server.scheduling.catalog import Catalog, ModelState, ServedModel
from attnserve_server.transport.admin import ModelServicer
from attnserve_server.transport.dataplane import DataPlane
from attnserve_server.transport.health import OVERALL, Health
from attnserve_server.transport.http import Page, routes
from attnserve_server.transport.receiving import ReceiveBounds
from attnserve_server.transport.rest.exchange import Rest
from attnserve_server.transport.rest.server import RestServer
from attnserve_server.transport.server import GrpcServer
from attnserve_server.transport.servicer import SERVICE
from attnserve_server.wanted import scheduling_settings, shared_among, tokenizer_of, under_policy, wanted_bundles

_LEAST_STOP_S: Final = 0.5
_numbers = count(1)


class FrontProcess:
    """One front. Event loop only."""

    def __init__(self, start: FrontStart, settings: Settings, supervisor: Parent) -> None:
        self._start = start
        self._settings = settings
        self._supervisor = supervisor
        self._clock = MonotonicClock()
        self._metrics = Metrics()
        self._catalog = Catalog()
        self._health = Health()
        self._plane = DataPlane(self._catalog, settings, self._clock)
        (buckets,) = supervisor.given
        self._access = Access(start.material, self._metrics, self._clock, Buckets(MAX_TOKENS, buckets))
        os.close(buckets)
        self._grpc = GrpcServer(
            shared_among(settings, start.fronts),
            self._plane,
            self._health,
            self._metrics,
            self._clock,
            self._access,
            shared_port=True,
            models=ModelServicer(self._plane, None) if settings.admin else None,
        )
        shared = Rest(self._plane, self._catalog, settings, self._clock, self._metrics, self._grpc.unread)
        shared.settings = shared_among(settings, start.fronts)
        self._rest = RestServer(shared, self._access, shared_port=True)
        self._pages: dict[int, asyncio.Future[Page]] = {}
        self._schedulers: dict[tuple[str, str], RemoteScheduler] = {}
        self._added: dict[tuple[str, str], asyncio.Event] = {
            (one.name, one.version): asyncio.Event() for one in start.models
        }
        self._tasks: set[asyncio.Task[None]] = set()
        self._listening = False
        self._drain = asyncio.Event()

    def receive(self, message: object) -> None:
        """Take a message of the supervisor."""
        if isinstance(message, Changed):
            if self._listening:  # the supervisor sends all states once it knows the port
                self._change(message)
        elif isinstance(message, Connect):
            task = asyncio.create_task(self._connect(message))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        elif isinstance(message, Culprit):
            self._schedulers[message.name, message.version].crashed(message.number)
        elif isinstance(message, Material):
            self._access.update(message)
        elif isinstance(message, PageAnswer):
            waiting = self._pages.pop(message.number)
            if not waiting.done():
                waiting.set_result(message.page)
        elif isinstance(message, Drain):
            self._drain.set()
        elif isinstance(message, Scrape):
            self._supervisor.link.send(ENCODER.encode(Scraped(message.number, self._metrics.snapshot())))

    async def run(self) -> int:
        """Serve until the supervisor ends it. Return the exit code."""
        bundles, _ = wanted_bundles(self._settings)
        stored = {(one.manifest.name, one.manifest.version): one for one in bundles}
        for model_ in self._start.models:
            await self._add(stored[model_.name, model_.version], model_)
        for fault in self._start.broken:
            model = ServedModel(fault.name, fault.version, self._metrics.model(fault.name, fault.version))
            model.move(ModelState.FAILED, fault.reason)
            self._catalog.add(model)
            self._health.set(fault.name, serving=False)
        manifests = [(one.manifest, 0) for one in stored.values()]
        bounds = ReceiveBounds.of(self._settings, manifests, self._start.fronts)
        port = await self._grpc.start(bounds)
        await self._rest.start(bounds, routes(self._page) if self._settings.merges_ports else ())
        self._listening = True
        self._supervisor.link.send(ENCODER.encode(Listening(port)))
        await self._drain.wait()
        await self._drained()
        return EXIT_DRAINED

    async def _add(self, stored: Bundle, served: FrontModel) -> None:
        bundle = under_policy(stored, self._settings)
        manifest = bundle.manifest
        metrics = self._metrics.model(manifest.name, manifest.version)
        model = ServedModel(
            manifest.name, manifest.version, metrics, manifest, max_request_size=stored.manifest.max_batch_size
        )
        model.tokenizer = await asyncio.to_thread(tokenizer_of, bundle)
        requests, board = await self._supervisor.packages.take(served.package)
        arena, load = Arena(requests, ARENA_BYTES), LoadBoard(board)
        for descriptor in (requests, board):
            os.close(descriptor)
        settings = scheduling_settings(self._settings, manifest)
        scheduler = RemoteScheduler(manifest.name, arena, load, settings, self._clock, metrics)
        model.scheduler = scheduler
        model.move(ModelState.LOADING)
        self._schedulers[manifest.name, manifest.version] = scheduler
        self._catalog.add(model)
        self._health.set(model.name, serving=False)
        self._added[manifest.name, manifest.version].set()

    async def _connect(self, message: Connect) -> None:
        link, descriptor = await self._supervisor.packages.take(message.package)
        answers = Arena(descriptor, ARENA_BYTES)
        os.close(descriptor)
        key = message.name, message.version
        await self._added[key].wait()
        await self._schedulers[key].connect(socket.socket(fileno=link), answers, message.suspects)

    async def _page(self, path: str, accept: str) -> Page:
        """Return a page of the supervisor, which merges what all processes count."""
        number = next(_numbers)
        waiting: asyncio.Future[Page] = asyncio.get_running_loop().create_future()
        self._pages[number] = waiting
        self._supervisor.link.send(ENCODER.encode(PageRequest(number, path, accept)))
        return await waiting

    def _change(self, changed: Changed) -> None:
        scheduler = self._schedulers.get((changed.name, changed.version))
        if scheduler is not None and changed.expected_s is not None:
            scheduler.expect(changed.expected_s)
        elif scheduler is not None and changed.state == ModelState.FAILED:
            scheduler.refuse(changed.state)
        if self._drain.is_set():
            return  # no model takes requests again
        model = self._catalog.find(changed.name, changed.version)
        if changed.provider:
            model.provider = changed.provider
        if changed.precision and model.manifest is not None:
            model.manifest = model.manifest.model_copy(update={"precision": changed.precision})
        model.move(ModelState(changed.state), changed.reason)
        model.is_replaced = changed.expected_s is not None
        found = self._catalog.find(model.name)
        self._health.set(model.name, serving=found.state is ModelState.READY)
        ready = self._catalog.serves(self._settings.ready, started=self._health.serving())
        self._health.set(SERVICE, serving=ready)
        self._health.set(OVERALL, serving=ready)

    async def _drained(self) -> None:
        """Refuse new requests, and wait for pending ones until the grace period ends."""
        end = self._clock.now() + self._settings.drain_grace_s
        self._health.drain()
        self._catalog.drain()
        self._grpc.drain()
        waiting = [scheduler.drained() for scheduler in self._schedulers.values()]
        try:
            async with asyncio.timeout(self._settings.drain_grace_s):
                await asyncio.gather(*waiting)
        except TimeoutError:
            pass
        for scheduler in self._schedulers.values():
            scheduler.close()
        self._health.close()
        left_s = max(_LEAST_STOP_S, end - self._clock.now())
        await asyncio.gather(self._grpc.stop(left_s), self._rest.stop(left_s))
        self._plane.close()
        self._supervisor.link.close()


if __name__ == "__main__":
    run(FrontStart, FrontProcess)
