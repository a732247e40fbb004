"""A front: one process that serves gRPC and REST, and sends valid requests to the engines of their models.

`python -m attnserve_server.processes.front LINK PACKAGES LOG NAME`, started by the supervisor. It does not import the
runtime.
"""

from __future__ import annotations

import asyncio
import os
from itertools import count
from typing import Final

import msgspec

from attnserve_server.access.guard import Access, Material
from attnserve_server.access.limits import Buckets
from attnserve_server.access.tokens import MAX_TOKENS
from attnserve_server.config import Settings
from attnserve_server.domain.clock import MonotonicClock
from attnserve_server.lifetime import EXIT_DRAINED
from attnserve_server.observability.audit import Audit, to_pipe
from attnserve_server.observability.metrics import Metrics
from attnserve_server.observability.trace_context import FLUSH_S, tracing_of
from attnserve_server.processes.changing import RemoteLifecycle
from attnserve_server.processes.child import Parent, run
from attnserve_server.processes.control import (
    ENCODER,
    Done,
    Drain,
    FrontStart,
    Listening,
    PageAnswer,
    PageRequest,
    Scrape,
    Scraped,
)
from attnserve_server.processes.front_models import FrontModels, Message
from attnserve_server.scheduling.catalog import Catalog
from attnserve_server.transport.admin import ModelServicer
from attnserve_server.transport.health import Health
from attnserve_server.transport.http import Page, routes
from attnserve_server.transport.receiving import ReceiveBounds
from attnserve_server.transport.rest.exchange import Rest
from attnserve_server.transport.rest.server import RestServer
from attnserve_server.transport.server import GrpcServer
from attnserve_server.transport.traced import plane_of
from attnserve_server.wanted import shared_among

_LEAST_STOP_S: Final = 0.5
_LEAST_FLUSH_S: Final = 0.1
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
        self._tracing = tracing_of(settings, self._metrics, self._clock)
        buckets, *pipes = supervisor.given
        self._audit = Audit(settings, self._metrics, start.audit_key, to_pipe(pipes[0])) if pipes else None
        self._plane = plane_of(self._catalog, settings, self._clock, self._tracing, self._audit)
        self._access = Access(start.material, self._metrics, self._clock, Buckets(MAX_TOKENS, buckets))
        os.close(buckets)
        self._models = FrontModels(
            settings,
            self._clock,
            self._metrics,
            self._catalog,
            self._health,
            supervisor.packages,
            forget=self._plane.forget,
            send=self._send,
        )
        self._lifecycle = RemoteLifecycle(self._catalog, self._send)
        models = ModelServicer(self._plane, self._lifecycle) if settings.admin else None
        self._grpc = GrpcServer(
            shared_among(settings, start.fronts),
            self._plane,
            self._health,
            self._metrics,
            self._clock,
            self._access,
            shared_port=True,
            models=models,
        )
        shared = Rest(
            *(self._plane, self._catalog, settings, self._clock, self._metrics),
            *(self._grpc.unread, self._health, models),
        )
        shared.settings = shared_among(settings, start.fronts)
        self._rest = RestServer(shared, self._access, shared_port=True)
        self._pages: dict[int, asyncio.Future[Page]] = {}
        self._drain = asyncio.Event()

    def receive(self, message: object) -> None:
        """Take a message of the supervisor."""
        if isinstance(message, Message):
            self._models.receive(message)
        elif isinstance(message, Done):
            self._lifecycle.done(message)
        elif isinstance(message, Material):
            self._access.update(message)
        elif isinstance(message, PageAnswer):
            waiting = self._pages.pop(message.number)
            if not waiting.done():
                waiting.set_result(message.page)
        elif isinstance(message, Drain):
            self._models.drain()
            self._drain.set()
        elif isinstance(message, Scrape):
            self._send(Scraped(message.number, self._metrics.snapshot()))

    async def run(self) -> int:
        """Serve until the supervisor ends it. Return the exit code."""
        working = asyncio.create_task(self._models.work())
        await _first_of(working, self._models.synced)
        bounds = ReceiveBounds(*self._start.bounds)
        port = await self._grpc.start(bounds)
        await self._rest.start(bounds, routes(self._page) if self._settings.merges_ports else ())
        self._send(Listening(port))
        await _first_of(working, self._drain)
        await self._drained()
        working.cancel()
        self._supervisor.link.close()
        return EXIT_DRAINED

    async def _page(self, path: str, accept: str) -> Page:
        """Return a page of the supervisor, which merges what all processes count."""
        number = next(_numbers)
        waiting: asyncio.Future[Page] = asyncio.get_running_loop().create_future()
        self._pages[number] = waiting
        self._send(PageRequest(number, path, accept))
        return await waiting

    async def _drained(self) -> None:
        """Refuse new requests, and wait for pending ones until the grace period ends."""
        end = self._clock.now() + self._settings.drain_grace_s
        self._health.drain()
        self._catalog.drain()
        self._grpc.drain()
        try:
            async with asyncio.timeout(self._settings.drain_grace_s):
                await self._models.drained()
        except TimeoutError:
            pass
        self._models.close()
        self._lifecycle.close()
        self._health.close()
        left_s = max(_LEAST_STOP_S, end - self._clock.now())
        await asyncio.gather(self._grpc.stop(left_s), self._rest.stop(left_s))
        self._plane.close()
        if self._audit is not None:
            left_s = min(FLUSH_S, max(_LEAST_FLUSH_S, end - self._clock.now()))
            await asyncio.to_thread(self._audit.close, left_s)
        if self._tracing is not None:
            await self._tracing.aclose(min(FLUSH_S, max(_LEAST_FLUSH_S, end - self._clock.now())))

    def _send(self, message: msgspec.Struct) -> None:
        self._supervisor.link.send(ENCODER.encode(message))


async def _first_of(working: asyncio.Task[None], event: asyncio.Event) -> None:
    """Wait for an event. Raises what the work on messages fails with, which is an internal error."""
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait((working, waiting), return_when=asyncio.FIRST_COMPLETED)
    if working.done():
        waiting.cancel()
        working.result()


if __name__ == "__main__":
    run(FrontStart, FrontProcess)
