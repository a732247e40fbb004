"""The composition root: builds the objects of all packages, loads models, and starts, drains and stops the server.

The input is the settings. It fails to start without a loadable model, without a required execution provider, or if a
port is taken; after the start, a signal ends it, or an internal error.
"""

from __future__ import annotations

import asyncio
import math
from typing import Final

from attnserve_server import __version__
from attnserve_server.access.guard import Access
from attnserve_server.access.keeper import Keeper
from attnserve_server.access.limits import Buckets
from attnserve_server.access.tokens import MAX_TOKENS
from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock, MonotonicClock
from attnserve_server.engine.instance_thread import Occupancy
from attnserve_server.engine.pulse import Overdue, Pulse
from attnserve_server.engine.session import ProviderUnavailable
from attnserve_server.lifetime import write_ports
from attnserve_server.model.repository import Bundle, BundleFault
from attnserve_server.observability.logs import logger
from attnserve_server.observability.metrics import Metrics
from attnserve_server.scheduling.catalog import Catalog, ModelState, ServedModel
from attnserve_server.starting import ISOLATED, Started, start_model, why_not_loaded
from attnserve_server.transport.dataplane import DataPlane
from attnserve_server.transport.health import OVERALL, Health
from attnserve_server.transport.http import HttpServer
from attnserve_server.transport.peak import log_peak
from attnserve_server.transport.receiving import ReceiveBounds
from attnserve_server.transport.server import GrpcServer
from attnserve_server.transport.servicer import SERVICE
from attnserve_server.wanted import log_cautions, ready_models, under_policy, wanted_bundles

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
        self.plane = DataPlane(self.catalog, settings, self.clock)
        buckets = Buckets(MAX_TOKENS)
        self.keeper = Keeper(settings, self.metrics, buckets)
        access = self.access = Access(self.keeper.start(), self.metrics, self.clock, buckets)
        self.grpc = GrpcServer(settings, self.plane, self.health, self.metrics, self.clock, access)
        self.http = HttpServer(
            settings, self.catalog, self.health, self.metrics, lambda: not self.fault.is_set(), access
        )
        self._watching: list[asyncio.Task[None]] = []
        self._pulses: list[tuple[ServedModel, Overdue]] = []
        self.fault = asyncio.Event()
        self.grpc_port = 0
        self.http_port = 0
        self._bundles: list[Bundle] = []
        self._loaded: list[Started] = []
        self._occupancy = Occupancy()

    async def start(self) -> None:
        """Read the repository, open both ports, and load the models. A model answers UNAVAILABLE until it is warm.

        Raises:
            StartFailed: there is no model, or none could be loaded.
            PortUnavailable: a port is taken.
            ProviderUnavailable: the requested execution provider is not available.
            OSError: `ports_file` cannot be written.
        """
        bundles, faults = wanted_bundles(self.settings)
        for fault in faults:
            self._add_broken(fault)
        waiting = [self._add(bundle) for bundle in bundles]
        self.http_port = await self.http.start()
        self.bounds = ReceiveBounds.of(self.settings, [(bundle.manifest, 0) for bundle in bundles])
        self.grpc_port = await self.grpc.start(self.bounds)
        self._watching.append(asyncio.create_task(self.keeper.watch(self.access.update), name="files"))
        _log.info(
            "listening",
            version=__version__,
            host=self.settings.host,
            grpc_port=self.grpc_port,
            http_port=self.http_port,
        )
        _log.info(
            "one process does everything: a crash of the runtime ends it without answers, a run that hangs is reported "
            "and not ended, memory has no limit, and calls use one core",
            remedy="--isolation process",
        )
        log_peak(bundles, self.settings, self.bounds)
        for bundle, model in waiting:
            await self._load(bundle, model)
        ready = ready_models(self.catalog)
        serves = self.catalog.serves(self.settings.ready, started=False)
        self.health.set(SERVICE, serving=serves)
        self.health.set(OVERALL, serving=serves)
        self._watching.append(asyncio.create_task(self._watch(), name="watch"))
        if self.settings.ports_file is not None:
            write_ports(self.settings.ports_file, self.grpc_port, self.http_port)
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
                await asyncio.gather(*(loaded.scheduler.drain() for loaded in self._loaded))
        except TimeoutError:
            _log.warning("grace period is over", grace_s=self.settings.drain_grace_s)
            # Pending requests fail with NotServing and a retry delay. gRPC would only cancel the calls.
            for loaded in self._loaded:
                loaded.scheduler.abort()
        self.health.close()
        await self.grpc.stop(max(_LEAST_STOP_S, end - self.clock.now()))

    async def aclose(self) -> None:
        """Stop everything at once, and cancel pending requests."""
        self.health.drain()
        self.health.close()
        for task in self._watching:
            task.cancel()
        await self.grpc.stop(0)
        await asyncio.gather(self.http.stop(), *(loaded.aclose() for loaded in self._loaded))
        self.plane.close()

    def _add(self, stored: Bundle) -> tuple[Bundle, ServedModel]:
        """Add a bundle to the catalog. Return it under the server's batching policy, with its entry."""
        log_cautions(stored.manifest, self.settings)
        bundle = under_policy(stored, self.settings)
        manifest = bundle.manifest
        model = ServedModel(
            manifest.name,
            manifest.version,
            self.metrics.model(manifest.name, manifest.version),
            manifest,
            max_request_size=stored.manifest.max_batch_size,
        )
        model.move(ModelState.LOADING)
        self.catalog.add(model)
        self.health.set(model.name, serving=False)
        return bundle, model

    def _add_broken(self, fault: BundleFault) -> None:
        model = ServedModel(fault.name, fault.version, self.metrics.model(fault.name, fault.version))
        model.move(ModelState.FAILED, fault.why)
        self.catalog.add(model)
        self.health.set(model.name, serving=False)
        _log.warning("bundle is broken", model=fault.name, version=fault.version, reason=fault.why)

    async def _load(self, bundle: Bundle, model: ServedModel) -> None:
        """Load one model and warm it up. If that fails, its state is FAILED with the reason, and the others load."""

        def on_isolated() -> None:
            if model.state is ModelState.READY:
                model.move(ModelState.READY, ISOLATED)

        pulse = Pulse()
        try:
            started = await start_model(
                bundle,
                self.settings,
                self.clock,
                model.metrics,
                self._occupancy,
                on_fault=lambda: self._on_fault(model),
                on_isolated=on_isolated,
                pulse=pulse,
            )
        except ProviderUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 - the boundary of a model's load: the others are served
            why = why_not_loaded(error, model.name, model.version)
            model.move(ModelState.FAILED, why)
            return
        model.manifest, model.tokenizer = started.opened.bundle.manifest, started.opened.tokenizer
        model.provider = started.executor.provider
        self._loaded.append(started)
        self._pulses.append((model, Overdue(pulse, math.inf)))
        model.scheduler = started.scheduler
        model.move(ModelState.READY)
        self.health.set(model.name, serving=self.catalog.find(model.name).state is ModelState.READY)

    async def _watch(self) -> None:
        """Report NOT_SERVING for a model while one of its runs takes too long. Nothing can end the run."""
        hung: dict[ServedModel, str] = {}
        while True:
            await asyncio.sleep(_WATCH_S)
            for model, overdue in self._pulses:
                why = overdue.look(self.clock.now())
                if why == hung.get(model, "") or model.state is not ModelState.READY:
                    continue
                hung[model] = why
                model.state_reason = why
                if why:
                    _log.critical("a run hangs", model=model.name, version=model.version, reason=why)
                self.health.set(model.name, serving=not why)
                for service in (SERVICE, OVERALL):
                    self.health.set(service, serving=any(not hung.get(one) for one in self.catalog.ready()))

    def _on_fault(self, model: ServedModel) -> None:
        """Report NOT_SERVING and end the process after the scheduling loop of a model died. The loop has logged it."""
        self.health.drain()
        model.move(ModelState.FAILED, "its scheduler died")
        self.fault.set()
