"""The supervisor: starts fronts and engines, replaces those that end or hang, merges their metrics and states.

It holds the ports of gRPC and REST, on which the fronts listen together, and serves HTTP. Fronts are drained
first, then engines. If a front ends before it listens, the server drains, and exits with code 70.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Coroutine
from typing import Any, Final

from starlette.applications import Starlette

from attnserve_server import __version__
from attnserve_server.access.guard import Access, Material
from attnserve_server.access.keeper import Keeper
from attnserve_server.access.limits import Buckets
from attnserve_server.access.tokens import MAX_TOKENS
from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock, MonotonicClock
from attnserve_server.domain.machine import cores
from attnserve_server.engine.instance_thread import SharedOccupancy
from attnserve_server.isolation.arena import Arena
from attnserve_server.lifetime import write_ports
from attnserve_server.model.repository import Bundle, BundleFault
from attnserve_server.observability.logs import logger
from attnserve_server.observability.metrics import LOG_LINES_DROPPED, Metrics
from attnserve_server.processes.children import Children, Reserve
from attnserve_server.processes.control import Broken, Changed, Drain, FrontStart, PageAnswer, PageRequest
from attnserve_server.processes.kept_engine import KeptEngine, Surroundings
from attnserve_server.processes.kept_front import KeptFront
from attnserve_server.scheduling.catalog import Catalog, ModelState, ServedModel
from attnserve_server.transport.health import OVERALL, Health
from attnserve_server.transport.http import HttpServer, Pages, routes
from attnserve_server.transport.peak import log_peak
from attnserve_server.transport.receiving import ReceiveBounds
from attnserve_server.transport.server import PortUnavailable
from attnserve_server.transport.who import guarded
from attnserve_server.wanted import StartFailed, log_cautions, ready_models, under_policy, wanted_bundles

_log = logger(__name__)

MOST_FRONTS: Final = 8
"""The most fronts that start unasked: with more, one engine would be the limit, and memory would be wasted."""
_FRONTS_END_S: Final = 0.7
"""Seconds after the grace period until which fronts refuse what is left, and end."""
_ENGINES_END_S: Final = 0.8
"""The same for engines, which have nothing left to do then. An engine whose run cannot be stopped is killed."""
_WATCH_S: Final = 0.2
"""Seconds between two looks at the processes."""


class Supervisor:
    """One server of several processes. Event loop only."""

    def __init__(self, settings: Settings, clock: Clock | None = None) -> None:
        """Read the files of TLS and tokens.

        Raises:
            AttnserveError: one of them cannot be used.
            StartFailed: the system has no shared memory without a file.
        """
        if not hasattr(os, "memfd_create"):
            raise StartFailed("isolation process needs Linux: set --isolation none")
        self.settings = settings
        self.clock = clock or MonotonicClock()
        self.metrics = Metrics()
        self.metrics.processes.rename("supervisor")
        self.catalog = Catalog()
        self.health = Health()
        self.fault = asyncio.Event()
        self._own = Metrics()  # what this process counts; `metrics` is the sum over all
        self.metrics.counter(LOG_LINES_DROPPED).labels().function = None
        self._descriptor = Buckets.create(MAX_TOKENS)
        buckets = Buckets(MAX_TOKENS, self._descriptor)
        self.keeper = Keeper(settings, self._own, buckets)
        self.access = Access(self.keeper.start(), self._own, self.clock, buckets)
        self._pages = Pages(self.catalog, self.health, self.metrics, lambda: not self.fault.is_set(), self._collect)
        self.http = HttpServer(guarded(Starlette(routes=routes(self._pages.page)), self.access), self.access)
        self.children = Children(self.metrics)
        self.reserve = Reserve(self.children, wanted=settings.standby)
        self._fronts: list[KeptFront] = []
        self._engines: dict[tuple[str, str], KeptEngine] = {}
        self._broken: list[Broken] = []
        self._count = 0  # of fronts
        self._encoded = b""
        self._occupancy = Arena.create_descriptor(SharedOccupancy.SIZE)
        self.grpc_port = 0
        self.http_port = 0
        self.rest_port = 0
        self._holders: list[socket.socket] = []
        self._settled = asyncio.Event()
        self._served = False
        self._draining = False
        self._tasks: list[asyncio.Task[None]] = []
        self._answering: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start all processes, and wait until every model is ready or failed.

        Raises:
            StartFailed: there is no model, or none could be loaded.
            PortUnavailable: a port is taken.
        """
        bundles, faults = wanted_bundles(self.settings)
        for fault in faults:
            model = ServedModel(fault.name, fault.version, self.metrics.model(fault.name, fault.version))
            self._add(model)
            model.move(ModelState.FAILED, fault.why)
        for bundle in bundles:
            log_cautions(bundle.manifest, self.settings)
            manifest = under_policy(bundle, self.settings).manifest
            metrics = self.metrics.model(manifest.name, manifest.version)
            self._add(ServedModel(manifest.name, manifest.version, metrics, manifest))
        self.grpc_port = self._hold_port(self.settings.grpc_port)
        self.rest_port = self._hold_port(self.settings.rest_port)
        self.http_port = self.rest_port
        if not self.settings.merges_ports:
            self.http_port = await self.http.start(self.settings.host, self.settings.http_port)
        count = self.settings.fronts or min(MOST_FRONTS, max(1, cores() // 2))
        bounds = ReceiveBounds.of(self.settings, [(bundle.manifest, 0) for bundle in bundles], count)  # of each front
        _log.info(
            "listening",
            version=__version__,
            host=self.settings.host,
            grpc_port=self.grpc_port,
            http_port=self.http_port,
            rest_port=self.rest_port,
            fronts=count,
        )
        log_peak(bundles, self.settings, bounds, count)
        self._spawn(bundles, faults, count)
        self._begin(self.keeper.watch(self._reloaded), "files")
        self._begin(self._watch(), "watch")
        await self._settled.wait()
        ready = ready_models(self.catalog)
        self._set_overall()
        self.reserve.fill()
        if self.settings.ports_file is not None:
            write_ports(self.settings.ports_file, self.grpc_port, self.http_port, self.rest_port)
        _log.info("ready", models=[f"{model.name}/{model.version}" for model in ready])

    async def drain(self) -> None:
        """Drain the fronts, then the engines. What has not ended a little after the grace period is killed."""
        end = self.clock.now() + self.settings.drain_grace_s
        self._draining = True
        self.health.drain()
        self.catalog.drain()
        _log.info("draining", grace_s=self.settings.drain_grace_s)
        self.reserve.close()
        kept: tuple[tuple[list[KeptFront] | list[KeptEngine], float], ...] = (
            (self._fronts, _FRONTS_END_S),
            (list(self._engines.values()), _ENGINES_END_S),
        )
        for those, after_s in kept:  # while the fronts drain, an engine that ends is still replaced
            running = []
            for one in those:
                one.ending = True
                if one.child is not None:
                    one.child.send(Drain())
                    running.append(one.child.ended)
            if running:
                await asyncio.wait(running, timeout=max(0.0, end + after_s - self.clock.now()))

    def reread(self) -> None:
        """Read the files of TLS and tokens again now: for SIGHUP."""
        self.keeper.hurry()

    async def aclose(self) -> None:
        """End all processes at once."""
        self.reserve.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.children.aclose()
        self.health.close()
        await self.http.stop()
        for holder in self._holders:
            holder.close()
        for engine in self._engines.values():
            engine.close()
        for descriptor in (self._descriptor, self._occupancy):
            os.close(descriptor)

    def _add(self, model: ServedModel) -> None:
        model.move(ModelState.LOADING)
        self.catalog.add(model)
        self.health.set(model.name, serving=False)

    def _hold_port(self, wanted: int) -> int:
        holder, port = _held_port(self.settings.host, wanted)
        self._holders.append(holder)
        return port

    def _spawn(self, bundles: list[Bundle], faults: list[BundleFault], count: int) -> None:
        http_port = self.rest_port if self.settings.merges_ports else self.settings.http_port
        ports = {"grpc_port": self.grpc_port, "rest_port": self.rest_port, "http_port": http_port}
        self._encoded = self.settings.model_copy(update=ports).model_dump_json().encode()
        self._broken = [Broken(fault.name, fault.version, fault.why) for fault in faults]
        self._count = count
        around = Surroundings(
            self.settings, self._encoded, self.clock, self.reserve, self._occupancy, self._own,
            self._listening, self._change,
        )  # fmt: skip
        for place, bundle in enumerate(bundles):
            name, version = bundle.manifest.name, bundle.manifest.version
            engine = self._engines[name, version] = KeptEngine(around, name, version, place)
            self._begin(engine.run(), f"engine {name}/{version}")
        for number in range(count):
            front = KeptFront(self, self.children, f"front {number}", self._own)
            self._fronts.append(front)
            self._begin(front.run(), front.name)
        self._settle()  # where there are faults alone

    def _begin(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._task_ended)
        self._tasks.append(task)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            _log.critical("the supervisor failed", task=task.get_name(), exc_info=task.exception())
            self._fail()

    def _fail(self) -> None:
        self.health.drain()
        self.fault.set()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_S)
            now = self.clock.now()
            for front in self._fronts:
                front.watch(now)
            for engine in self._engines.values():
                engine.watch(now)

    def _listening(self) -> list[KeptFront]:
        return [front for front in self._fronts if front.is_listening]

    def front_start(self, front: KeptFront) -> FrontStart:
        """Return the message that starts a front."""
        assert front.child is not None
        package = front.child.first_package(self._descriptor)
        models = [engine.front_model(front, front.child.packages.send) for engine in self._engines.values()]
        return FrontStart(self._encoded, models, self._broken, self.keeper.material, package, self._count)

    def page_requested(self, front: KeptFront, request: PageRequest) -> None:
        """Send a front a page of the HTTP port."""
        task = asyncio.create_task(self._send_page(front, request))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _send_page(self, front: KeptFront, request: PageRequest) -> None:
        front.send(PageAnswer(request.number, await self._pages.page(request.path, request.accept)))

    def front_listens(self, front: KeptFront) -> None:
        """Send a front all states, and connect it to the engines."""
        for engine in self._engines.values():
            engine.attach(front)
        for model in self.catalog.all():
            if model.state is not ModelState.LOADING or model.is_replaced:
                front.send(self._changed(model))
        self._settle()

    def front_ended(self, number: int, *, started: bool) -> None:
        """Forget a front. `started`: whether it has listened; if not, none can be started."""
        for engine in self._engines.values():
            engine.detach(number)
        if started or self._settled.is_set():
            self._set_overall()
        else:
            self._fail()

    def _reloaded(self, material: Material) -> None:
        """Use the new files here and in all fronts."""
        self.access.update(material)
        for front in self._fronts:
            front.send(material)

    def _change(self, changed: Changed) -> None:
        if self._draining:  # fronts still have requests for the next engine
            for front in self._listening():
                front.send(changed)
            return
        model = self.catalog.find(changed.name, changed.version)
        if changed.provider and not model.provider:
            model.provider = changed.provider
            model.metrics.provider(model.provider)
        if changed.precision and model.manifest is not None:
            model.manifest = model.manifest.model_copy(update={"precision": changed.precision})
        model.move(ModelState(changed.state), changed.reason)
        model.is_replaced = changed.expected_s is not None
        self.health.set(model.name, serving=self.catalog.find(model.name).state is ModelState.READY)
        for front in self._listening():
            front.send(self._changed(model))
        self._set_overall()
        self._settle()

    def _set_overall(self) -> None:
        """Set whether the server as a whole serves: once it has started, with a model and a front that do."""
        if self._settled.is_set():
            serves = self.catalog.serves(self.settings.ready, started=self._served)
            self._served = self._served or serves
            self.health.set(OVERALL, serving=bool(serves and self._listening()))

    def _settle(self) -> None:
        loading = any(model.state is ModelState.LOADING and not model.is_replaced for model in self.catalog.all())
        if not loading and self._fronts and len(self._listening()) == len(self._fronts):
            self._settled.set()

    def _changed(self, model: ServedModel) -> Changed:
        precision = "" if model.manifest is None else model.manifest.precision
        engine = self._engines.get((model.name, model.version))
        expected_s = engine.expected_s if engine is not None and model.is_replaced else None
        return Changed(
            model.name, model.version, model.state.value, model.state_reason, model.provider, precision, expected_s
        )

    async def _collect(self) -> None:
        """Update `metrics` for a scrape."""
        await self.children.collect(self._own.snapshot())


def _held_port(host: str, wanted: int) -> tuple[socket.socket, int]:
    """Return a socket that holds a port for the fronts, and the port.

    Raises:
        PortUnavailable: The port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:  # fails where another server shares the port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, wanted))
            port = probe.getsockname()[1]
        holder = socket.socket(family)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind((host, port))
    except OSError:
        raise PortUnavailable(host, wanted) from None
    return holder, port
