"""The supervisor: starts fronts and engines, merges their metrics and states, and ends them in order.

It holds the gRPC port, on which the fronts listen together, and serves HTTP. Fronts are drained first, then engines. If
a process ends by itself, the server drains, and exits with code 70.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import sys
from dataclasses import dataclass, field
from typing import Any, Final

from attnserve_server import __version__
from attnserve_server.access.guard import Access, Material
from attnserve_server.access.keeper import Keeper
from attnserve_server.access.limits import Buckets
from attnserve_server.access.tokens import MAX_TOKENS
from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock, MonotonicClock
from attnserve_server.domain.machine import cores
from attnserve_server.engine.instance_thread import SharedOccupancy
from attnserve_server.isolation.arena import Arena, LoadBoard
from attnserve_server.isolation.link import Link
from attnserve_server.lifetime import write_ports
from attnserve_server.model.repository import Bundle, BundleFault
from attnserve_server.observability.logs import logger, pipes_of
from attnserve_server.observability.metrics import LOG_LINES_DROPPED, Metrics
from attnserve_server.processes.control import (
    ARENA_BYTES,
    ENCODER,
    TO_SUPERVISOR,
    Broken,
    Changed,
    Channel,
    Drain,
    EngineStart,
    FrontStart,
    Listening,
    ModelChannel,
    Scrape,
    Scraped,
)
from attnserve_server.scheduling.catalog import Catalog, ModelState, ServedModel
from attnserve_server.transport.health import OVERALL, Health
from attnserve_server.transport.http import HttpServer
from attnserve_server.transport.server import PortUnavailable
from attnserve_server.wanted import StartFailed, log_cautions, ready_models, under_policy, wanted_bundles

_log = logger(__name__)

MOST_FRONTS: Final = 8
"""The most fronts that start unasked: with more, one engine would be the limit, and memory would be wasted."""
_END_S: Final = 2.0
"""Seconds that processes have to end after the grace period: fronts, and then engines."""
_SCRAPE_S: Final = 1.0
"""Seconds that a scrape waits for a process; after that, its last metrics count."""


@dataclass(slots=True, eq=False)
class _Child:
    """One process."""

    name: str
    process: asyncio.subprocess.Process
    link: Link
    metrics: dict[str, list[Any]] = field(default_factory=dict)


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
        alive, access = lambda: not self.fault.is_set(), self.access
        self.http = HttpServer(settings, self.catalog, self.health, self.metrics, alive, access, self._collect)
        self._fronts: list[_Child] = []
        self._engines: list[_Child] = []
        self.grpc_port = 0
        self.http_port = 0
        self._holder: socket.socket | None = None
        self._listening = 0
        self._settled = asyncio.Event()
        self._scrapes: dict[int, asyncio.Future[None]] = {}
        self._numbers = itertools.count()
        self._ending = False
        self._watching: list[asyncio.Task[None]] = []

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
        self._holder, self.grpc_port = _held_port(self.settings)
        self.http_port = await self.http.start()
        count = self.settings.fronts or min(MOST_FRONTS, max(1, cores() // 2))
        _log.info(
            "listening",
            version=__version__,
            host=self.settings.host,
            grpc_port=self.grpc_port,
            http_port=self.http_port,
            fronts=count,
        )
        await self._spawn(bundles, faults, count)
        self._watching.append(asyncio.create_task(self.keeper.watch(self._reloaded), name="files"))
        await self._settled.wait()
        ready = ready_models(self.catalog)
        self.health.set(OVERALL, serving=self.catalog.serves(self.settings.ready, started=False))
        if self.settings.ports_file is not None:
            write_ports(self.settings.ports_file, self.grpc_port, self.http_port)
        _log.info("ready", models=[f"{model.name}/{model.version}" for model in ready])

    async def drain(self) -> None:
        """Drain the fronts, then the engines. What has not ended a little after the grace period is killed."""
        end = self.clock.now() + self.settings.drain_grace_s
        self._ending = True
        self.health.drain()
        self.catalog.drain()
        _log.info("draining", grace_s=self.settings.drain_grace_s)
        for children in (self._fronts, self._engines):
            for child in children:
                child.link.send(ENCODER.encode(Drain()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, end - self.clock.now()) + _END_S):
                    await asyncio.gather(*(child.process.wait() for child in children))

    async def aclose(self) -> None:
        """End all processes at once."""
        self._ending = True
        for child in (*self._fronts, *self._engines):
            if child.process.returncode is None:
                child.process.kill()
            await child.process.wait()
        for task in self._watching:
            task.cancel()
        self.health.close()
        await self.http.stop()
        if self._holder is not None:
            self._holder.close()
        os.close(self._descriptor)

    def _add(self, model: ServedModel) -> None:
        model.move(ModelState.LOADING)
        self.catalog.add(model)
        self.health.set(model.name, serving=False)

    async def _spawn(self, bundles: list[Bundle], faults: list[BundleFault], count: int) -> None:
        settings = self.settings.model_copy(update={"grpc_port": self.grpc_port}).model_dump_json().encode()
        broken = [Broken(fault.name, fault.version, fault.why) for fault in faults]
        fronts: list[FrontStart] = [
            FrontStart(settings, [], broken, self.keeper.material, self._descriptor) for _ in range(count)
        ]
        kept: list[list[int]] = [[] for _ in range(count)]
        engines: list[list[int]] = []
        occupancy = Arena.create_descriptor(SharedOccupancy.SIZE)
        for place, bundle in enumerate(bundles):
            name, version = bundle.manifest.name, bundle.manifest.version
            board = Arena.create_descriptor(LoadBoard.SIZE)
            engine = EngineStart(settings, name, version, board, occupancy, place, [])
            own = [board, occupancy]
            for front, fds in zip(fronts, kept, strict=True):
                here, there = (end.detach() for end in socket.socketpair())
                asked, answered = (Arena.create_descriptor(ARENA_BYTES) for _ in range(2))
                front.models.append(ModelChannel(name, version, Channel(here, asked, answered, board)))
                engine.fronts.append(Channel(there, asked, answered, board))
                own += [there, asked, answered]
                fds += [here, asked, answered, board]
            engines.append(own)
            self._engines.append(await self._child(f"engine {name}/{version}", engine, own))
        for number, (front, fds) in enumerate(zip(fronts, kept, strict=True)):
            self._fronts.append(await self._child(f"front {number}", front, [*fds, self._descriptor]))
        # The children have their own copies.
        for fd in {fd for fds in (*kept, *engines) for fd in fds}:
            os.close(fd)

    async def _child(self, name: str, start: FrontStart | EngineStart, descriptors: list[int]) -> _Child:
        own, theirs = socket.socketpair()
        role = "front" if isinstance(start, FrontStart) else "engine"
        for fd in descriptors:
            os.set_inheritable(fd, True)
        with pipes_of(name) as (log, native):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", f"attnserve_server.processes.{role}", str(theirs.fileno()), str(log), name,
                pass_fds=(theirs.fileno(), log, *descriptors), stderr=native, start_new_session=True,
            )  # fmt: skip
        theirs.close()
        holder: list[_Child] = []
        link = await Link.open(own, lambda data: self._receive(holder[0], TO_SUPERVISOR.decode(data)), lambda: None)
        child = _Child(name, process, link)
        self.metrics.processes.add(name, process.pid)
        holder.append(child)
        link.send(ENCODER.encode(start))
        self._watching.append(asyncio.create_task(self._watch(child)))
        return child

    async def _watch(self, child: _Child) -> None:
        code = await child.process.wait()
        if not self._ending:
            _log.critical("a process ended", ended=child.name, code=code)
            self.health.drain()
            self.fault.set()

    def _reloaded(self, material: Material) -> None:
        """Use the new files here and in all fronts."""
        self.access.update(material)
        for front in self._fronts:
            front.link.send(ENCODER.encode(material))

    def _receive(self, child: _Child, message: object) -> None:
        if isinstance(message, Changed):
            self._change(message)
        elif isinstance(message, Listening):
            self._listening += 1
            for model in self.catalog.all():
                if model.state is not ModelState.LOADING:
                    child.link.send(ENCODER.encode(_changed(model)))
            self._settle()
        elif isinstance(message, Scraped):
            child.metrics = message.families
            waiting = self._scrapes.pop(message.number, None)
            if waiting is not None:
                waiting.set_result(None)

    def _change(self, changed: Changed) -> None:
        model = self.catalog.find(changed.name, changed.version)
        if changed.provider and not model.provider:
            model.provider = changed.provider
            model.metrics.provider(model.provider)
        if changed.precision and model.manifest is not None:
            model.manifest = model.manifest.model_copy(update={"precision": changed.precision})
        model.move(ModelState(changed.state), changed.reason)
        self.health.set(model.name, serving=self.catalog.find(model.name).state is ModelState.READY)
        for front in self._fronts:
            front.link.send(ENCODER.encode(_changed(model)))
        self._settle()

    def _settle(self) -> None:
        loading = any(model.state is ModelState.LOADING for model in self.catalog.all())
        if not loading and self._listening and self._listening == len(self._fronts):
            self._settled.set()

    async def _collect(self) -> None:
        """Update `metrics` for a scrape."""
        loop = asyncio.get_running_loop()
        children = (*self._fronts, *self._engines)
        waits: dict[int, asyncio.Future[None]] = {next(self._numbers): loop.create_future() for _ in children}
        self._scrapes |= waits
        for number, child in zip(waits, children, strict=True):
            child.link.send(ENCODER.encode(Scrape(number)))
        try:
            if waits:
                await asyncio.wait(waits.values(), timeout=_SCRAPE_S)
        finally:
            for number in waits:
                self._scrapes.pop(number, None)  # of a process that did not answer
        self.metrics.merge((self._own.snapshot(), *(child.metrics for child in children)))


def _changed(model: ServedModel) -> Changed:
    precision = "" if model.manifest is None else model.manifest.precision
    return Changed(model.name, model.version, model.state.value, model.state_reason, model.provider, precision)


def _held_port(settings: Settings) -> tuple[socket.socket, int]:
    """Return a socket that holds the port for the fronts, and the port.

    Raises:
        PortUnavailable: The port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    host, port = settings.host, settings.grpc_port
    try:
        with socket.socket(family) as probe:  # fails where another server shares the port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            port = probe.getsockname()[1]
        holder = socket.socket(family)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind((host, port))
    except OSError:
        raise PortUnavailable(settings.host, settings.grpc_port) from None
    return holder, port
