"""The composition root: builds the objects of all packages, loads models, and starts, drains and stops the server.

The input is the settings. It fails to start without a loadable model, without a required execution provider, or if a
port is taken; after the start, a signal ends it, or an internal error.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from attnserve_server import __version__
from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock, MonotonicClock
from attnserve_server.domain.errors import AttnserveError
from attnserve_server.engine.cost_file import read_costs, write_costs
from attnserve_server.engine.executor import Executor
from attnserve_server.engine.graph import Occupancy
from attnserve_server.engine.session import ProviderUnavailable
from attnserve_server.loading import (
    StartFailed,
    batch_check_settings,
    cost_key,
    instances_of,
    open_bundle,
    prepare_shapes,
    scheduling_settings,
    under_policy,
    wanted_bundles,
)
from attnserve_server.model.manifest import Manifest
from attnserve_server.model.repository import Bundle, BundleFault, write_atomically
from attnserve_server.observability.logs import logger
from attnserve_server.observability.metrics import Metrics, resident_bytes
from attnserve_server.scheduling.catalog import Catalog, ModelState, ServedModel
from attnserve_server.scheduling.scheduler import Scheduler
from attnserve_server.scheduling.verifier import Verifier
from attnserve_server.transport.dataplane import DataPlane
from attnserve_server.transport.health import OVERALL, Health
from attnserve_server.transport.http import HttpServer
from attnserve_server.transport.server import GrpcServer
from attnserve_server.transport.servicer import SERVICE

_log = logger(__name__)

EXIT_DRAINED: Final = 0
EXIT_FORCED: Final = 1
EXIT_FAULTED: Final = 70
"""Exit code of an internal error, EX_SOFTWARE of sysexits.h: a supervisor should restart the process."""
_LEAST_STOP_S: Final = 0.5
"""Minimum time for gRPC to send the last answers after a drain."""
_ISOLATED: Final = "an answer from a batch differed from the same sequence alone; each runs alone until the next start"
"""State reason of a ready model that does not batch."""


@dataclass(slots=True, eq=False)
class _Loaded:
    """One loaded model, with the objects to close."""

    model: ServedModel
    scheduler: Scheduler
    executor: Executor


class Application:
    """One server. Event loop only."""

    def __init__(self, settings: Settings, clock: Clock | None = None) -> None:
        self.settings = settings
        self.clock = clock or MonotonicClock()
        self.metrics = Metrics()
        self.catalog = Catalog()
        self.health = Health()
        self.plane = DataPlane(self.catalog, settings, self.clock)
        self.grpc = GrpcServer(settings, self.plane, self.health, self.metrics, self.clock)
        self.http = HttpServer(settings, self.catalog, self.health, self.metrics, lambda: not self.fault.is_set())
        self.fault = asyncio.Event()
        self.grpc_port = 0
        self.http_port = 0
        self._bundles: list[Bundle] = []
        self._loaded: list[_Loaded] = []
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
        self.grpc_port = await self.grpc.start()
        _log.info(
            "listening",
            version=__version__,
            host=self.settings.host,
            grpc_port=self.grpc_port,
            http_port=self.http_port,
        )
        for bundle, model in waiting:
            await self._load(bundle, model)
        ready = [model for model in self.catalog.all() if model.state is ModelState.READY]
        if not ready:
            raise StartFailed(
                "no model could be loaded: "
                + "; ".join(f"{model.name}/{model.version}: {model.state_reason}" for model in self.catalog.all())
            )
        self.health.set(SERVICE, serving=True)
        self.health.set(OVERALL, serving=True)
        if self.settings.ports_file is not None:
            _write_ports(self.settings.ports_file, self.grpc_port, self.http_port)
        _log.info("ready", models=[f"{model.name}/{model.version}" for model in ready])

    async def run(self) -> int:
        """Serve until a signal or an internal error.

        Returns:
            The exit code of the process: `EXIT_DRAINED`, `EXIT_FORCED` or `EXIT_FAULTED`.

        Raises:
            AttnserveError: as `start`.
            OSError: as `start`.
        """
        stop, force = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_signal(number: int) -> None:
            _log.info("signal", signal=signal.Signals(number).name, forced=stop.is_set())
            (force if stop.is_set() else stop).set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number)
        starting = asyncio.create_task(self.start(), name="start")
        try:
            await _first(starting, stop, self.fault)
            if starting.done():
                starting.result()
                await _first(None, stop, self.fault)
            else:
                starting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await starting
            draining = asyncio.create_task(self.drain(), name="drain")
            await _first(draining, force)
            if not draining.done():
                draining.cancel()
                return EXIT_FORCED
            draining.result()
            return EXIT_FAULTED if self.fault.is_set() else EXIT_DRAINED
        finally:
            await self.aclose()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
            if self.grpc_port:
                _log.info("stopped")

    async def drain(self) -> None:
        """Report NOT_SERVING, refuse new requests, and wait for pending ones until the grace period ends."""
        end = self.clock.now() + self.settings.drain_grace_s
        self.health.drain()
        for model in self.catalog.all():
            if model.state is ModelState.READY:
                model.move(ModelState.DRAINING)
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
        await self.grpc.stop(0)
        for loaded in self._loaded:
            await loaded.scheduler.aclose()
            await loaded.executor.aclose()
        self.plane.close()
        await self.http.stop()

    def _add(self, stored: Bundle) -> tuple[Bundle, ServedModel]:
        """Add a bundle to the catalog. Return it under the server's batching policy, with its entry."""
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
        began, bytes_before = self.clock.now(), resident_bytes()
        executor: Executor | None = None
        try:
            opened = await asyncio.to_thread(open_bundle, bundle, self.settings)
            bundle, session = opened.bundle, opened.sessions[0]
            model.manifest, model.tokenizer = bundle.manifest, opened.tokenizer
            model.provider = session.provider
            model.metrics.provider(session.provider)
            instances = instances_of(opened.sessions, self.settings)
            executor = Executor(
                opened.sessions,
                bundle.manifest,
                model.metrics,
                self.clock,
                instances,
                opened.past_sessions,
                opened.wide,
                self._occupancy,
            )
            executor.start()
            key = cost_key(session, bundle.manifest, self.settings)
            known = read_costs(bundle, key) if self.settings.remember_costs else ()
            timed = await executor.warm_up(known)
            if self.settings.remember_costs and not known and not write_costs(bundle, key, timed):
                _log.info(
                    "costs were not written: they are measured at each start", model=model.name, version=model.version
                )
            await prepare_shapes(executor, opened, self.settings, self.clock)
            scheduler = Scheduler(
                executor,
                bundle.manifest,
                scheduling_settings(self.settings, bundle.manifest),
                self.clock,
                model.metrics,
                on_fault=lambda: self._on_fault(model),
                verifier=self._verifier_of(bundle.manifest, model, executor),
            )
            scheduler.start()
        except ProviderUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 - the boundary of a model's load: the others are served
            if executor is not None:
                await executor.aclose()
            why = str(error) if isinstance(error, AttnserveError) else "internal error while loading; see the log"
            model.move(ModelState.FAILED, why)
            # The message of an AttnserveError without a cause is complete, so the log needs no traceback.
            traced = not isinstance(error, AttnserveError) or error.__cause__ is not None
            _log.error("model failed to load", model=model.name, version=model.version, reason=why, exc_info=traced)
            return
        self._loaded.append(_Loaded(model, scheduler, executor))
        model.scheduler = scheduler
        model.metrics.session_bytes.set(max(0, resident_bytes() - bytes_before))
        model.move(ModelState.READY)
        self.health.set(model.name, serving=self.catalog.find(model.name).state is ModelState.READY)
        _log.info(
            "model ready",
            model=model.name,
            version=model.version,
            digest=bundle.manifest.digest,
            provider=session.provider,
            precision=bundle.manifest.precision,
            devices=len(opened.sessions),
            instances=instances,
            sites=len(bundle.manifest.sites),
            sites_available=sum(site.available for site in bundle.manifest.sites),
            load_s=round(self.clock.now() - began, 3),
        )

    def _verifier_of(self, manifest: Manifest, model: ServedModel, executor: Executor) -> Verifier | None:
        """The shadow check of one model; None if it is off."""
        settings = batch_check_settings(self.settings)
        if settings is None:
            return None

        def on_isolated() -> None:
            if model.state is ModelState.READY:
                model.move(ModelState.READY, _ISOLATED)

        return Verifier(executor, manifest, settings, self.clock, model.metrics, on_isolated=on_isolated)

    def _on_fault(self, model: ServedModel) -> None:
        """Report NOT_SERVING and end the process after the scheduling loop of a model died. The loop has logged it."""
        self.health.drain()
        model.move(ModelState.FAILED, "its scheduler died")
        self.fault.set()


def _write_ports(path: Path, grpc_port: int, http_port: int) -> None:
    """Write the ports as JSON. The file is complete as soon as it exists, because programs poll for it."""
    with write_atomically(path) as partial:
        partial.write_text(json.dumps({"grpc": grpc_port, "http": http_port}) + "\n", encoding="ascii")


async def _first(task: asyncio.Task[None] | None, *events: asyncio.Event) -> None:
    """Wait until `task` is done or one of the events is set."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait([*waits, *([task] if task else [])], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
