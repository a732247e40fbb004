"""The composition root: builds the objects of all packages, and starts, drains and stops the server.

The input is the settings. It fails to start without a loadable model, without a required execution provider, or if a
port is taken; after the start, a signal ends it, or an internal error.
"""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.applications import Starlette

from attnserve_server import __version__
from attnserve_server.access.guard import Access
from attnserve_server.access.keeper import Keeper
from attnserve_server.access.limits import Buckets
from attnserve_server.access.tokens import MAX_TOKENS
from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock, MonotonicClock
from attnserve_server.lifecycle import Lifecycle
from attnserve_server.lifetime import write_ports
from attnserve_server.local_models import LocalModels
from attnserve_server.observability.audit import audit_of
from attnserve_server.observability.logs import logger
from attnserve_server.observability.metrics import Metrics
from attnserve_server.observability.trace_context import FLUSH_S, tracing_of
from attnserve_server.scheduling.catalog import Catalog, ModelState, ServedModel
from attnserve_server.transport.admin import ModelServicer
from attnserve_server.transport.health import Health
from attnserve_server.transport.http import HttpServer, Pages, routes
from attnserve_server.transport.peak import log_peak
from attnserve_server.transport.receiving import ReceiveBounds
from attnserve_server.transport.rest.exchange import Rest
from attnserve_server.transport.rest.server import RestServer
from attnserve_server.transport.server import GrpcServer
from attnserve_server.transport.traced import plane_of
from attnserve_server.transport.who import guarded
from attnserve_server.wanted import ready_models

_log = logger(__name__)

_LEAST_STOP_S: Final = 0.5
"""Minimum time for gRPC to send the last answers after a drain."""
_WATCH_S: Final = 0.2
"""Seconds between two looks at the runs."""


class Application:
    """One server. Event loop only."""

    def __init__(self, settings: Settings, clock: Clock | None = None) -> None:
        self.settings = settings
        self.clock = clock or MonotonicClock()
        self.metrics = Metrics()
        self.catalog = Catalog()
        self.health = Health()
        self.tracing = tracing_of(settings, self.metrics, self.clock)
        self.audit = audit_of(settings, self.metrics)
        self.plane = plane_of(self.catalog, settings, self.clock, self.tracing, self.audit)
        buckets = Buckets(MAX_TOKENS)
        self.keeper = Keeper(settings, self.metrics, buckets)
        access = self.access = Access(self.keeper.start(), self.metrics, self.clock, buckets)
        self.models = LocalModels(settings, self.clock, forget=self.plane.forget, on_fault=self._on_fault)
        self.lifecycle = Lifecycle(settings, self.metrics, self.catalog, self.health, self.models)
        models = ModelServicer(self.plane, self.lifecycle) if settings.admin else None
        self.grpc = GrpcServer(settings, self.plane, self.health, self.metrics, self.clock, access, models=models)
        pages = Pages(self.catalog, self.health, self.metrics, lambda: not self.fault.is_set())
        self._pages = routes(pages.page)
        self.http = HttpServer(guarded(Starlette(routes=self._pages), access), access)
        shared = Rest(
            *(self.plane, self.catalog, settings, self.clock, self.metrics, self.grpc.unread, self.health, models)
        )
        self.rest = RestServer(shared, access)
        self._watching: list[asyncio.Task[None]] = []
        self.fault = asyncio.Event()
        self.grpc_port = 0
        self.http_port = 0
        self.rest_port = 0

    async def start(self) -> None:
        """Read the repository, open all ports, and load the models. A model answers UNAVAILABLE until it is warm.

        Raises:
            StartFailed: there is no model, or none could be loaded.
            PortUnavailable: a port is taken.
            ProviderUnavailable: the requested execution provider is not available.
            OSError: `ports_file` cannot be written.
        """
        bundles = self.lifecycle.find()
        merged = self.settings.merges_ports
        if not merged:
            self.http_port = await self.http.start(self.settings.host, self.settings.http_port)
        self.bounds = ReceiveBounds.of(self.settings, [(bundle.manifest, 0) for bundle in bundles])
        self.lifecycle.bounds = self.bounds
        self.grpc_port = await self.grpc.start(self.bounds)
        self.rest_port = await self.rest.start(self.bounds, self._pages if merged else ())
        self.http_port = self.http_port or self.rest_port
        self._watching.append(asyncio.create_task(self.keeper.watch(self.access.update), name="files"))
        _log.info(
            "listening",
            version=__version__,
            host=self.settings.host,
            grpc_port=self.grpc_port,
            http_port=self.http_port,
            rest_port=self.rest_port,
        )
        _log.info(
            "one process does everything: a crash of the runtime ends it without answers, a run that hangs is reported "
            "and not ended, memory has no limit, and calls use one core",
            remedy="--isolation process",
        )
        log_peak(bundles, self.settings, self.bounds)
        await self.lifecycle.start()
        ready = ready_models(self.catalog)
        self._watching.append(asyncio.create_task(self._watch(), name="watch"))
        if self.settings.watch_repository:
            self._watching.append(asyncio.create_task(self.lifecycle.watch(), name="repository"))
        if self.settings.ports_file is not None:
            write_ports(self.settings.ports_file, self.grpc_port, self.http_port, self.rest_port)
        _log.info("ready", models=[f"{model.name}/{model.version}" for model in ready])

    async def drain(self) -> None:
        """Report NOT_SERVING, refuse new requests, and wait for pending ones until the grace period ends."""
        end = self.clock.now() + self.settings.drain_grace_s
        self.health.drain()
        self.catalog.drain()
        _log.info("draining", grace_s=self.settings.drain_grace_s)
        self.grpc.drain()
        try:
            async with asyncio.timeout(self.settings.drain_grace_s):
                await asyncio.gather(self.models.drain(), self.lifecycle.drain())
        except TimeoutError:
            _log.warning("grace period is over", grace_s=self.settings.drain_grace_s)
            # Pending requests fail with NotServing and a retry delay. gRPC would only cancel the calls.
            self.models.abort()
        self.health.close()
        left_s = max(_LEAST_STOP_S, end - self.clock.now())
        await asyncio.gather(self.grpc.stop(left_s), self.rest.stop(left_s))
        if self.tracing is not None:
            await self.tracing.aclose(min(FLUSH_S, max(_LEAST_STOP_S, end - self.clock.now())))

    def reread(self) -> None:
        """Read the files of TLS and tokens, and the repository again now, and reopen the audit log: for SIGHUP."""
        self.keeper.hurry()
        self.lifecycle.hurry()
        if self.audit is not None:
            self.audit.reopen()

    async def aclose(self) -> None:
        """Stop everything at once, and cancel pending requests."""
        self.health.drain()
        self.health.close()
        for task in self._watching:
            task.cancel()
        await self.grpc.stop(0)
        await asyncio.gather(self.http.stop(), self.rest.stop(0), self.lifecycle.aclose())
        await self.models.aclose()
        self.plane.close()
        if self.audit is not None:
            await asyncio.to_thread(self.audit.close, _LEAST_STOP_S)
        if self.tracing is not None:
            await self.tracing.aclose(_LEAST_STOP_S)

    async def _watch(self) -> None:
        """Report NOT_SERVING for a model while one of its runs takes too long. Nothing can end the run."""
        while True:
            await asyncio.sleep(_WATCH_S)
            self.lifecycle.look(self.clock.now())

    def _on_fault(self, model: ServedModel) -> None:
        """Report NOT_SERVING and end the process after the scheduling loop of a model died. The loop has logged it."""
        self.health.drain()
        model.move(ModelState.FAILED, "its scheduler died")
        self.fault.set()
