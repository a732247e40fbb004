"""The supervisor: starts fronts and engines, replaces those that end or hang, merges their metrics and states.

It holds the ports of gRPC and REST, on which the fronts listen together, and serves HTTP. Fronts are drained
first, then engines. If a front ends before it listens, the server drains, and exits with code 70.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Coroutine, Sequence
from dataclasses import astuple
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
from attnserve_server.engine.instance_thread import Places, SharedOccupancy
from attnserve_server.isolation.arena import Arena
from attnserve_server.lifecycle import Lifecycle
from attnserve_server.lifetime import write_ports
from attnserve_server.observability.audit import audit_of
from attnserve_server.observability.logs import logger
from attnserve_server.observability.metrics import LOG_LINES_DROPPED, Metrics
from attnserve_server.observability.trace_context import check_tracing
from attnserve_server.processes.changing import change
from attnserve_server.processes.children import Children, Reserve
from attnserve_server.processes.control import ChangeModels, Drain, FrontStart, PageAnswer, PageRequest
from attnserve_server.processes.engines import Engines
from attnserve_server.processes.kept_engine import KeptEngine, Surroundings
from attnserve_server.processes.kept_front import KeptFront
from attnserve_server.scheduling.catalog import Catalog
from attnserve_server.transport.health import Health
from attnserve_server.transport.http import HttpServer, Pages, routes
from attnserve_server.transport.peak import log_peak
from attnserve_server.transport.receiving import ReceiveBounds
from attnserve_server.transport.server import PortUnavailable
from attnserve_server.transport.who import guarded
from attnserve_server.wanted import StartFailed, ready_models

_log = logger(__name__)

MOST_FRONTS: Final = 8
"""The most fronts that start unasked: with more, one engine would be the limit, and memory would be wasted."""
_FRONTS_END_S: Final = 0.7
"""Seconds after the grace period until which fronts refuse what is left, and end."""
_ENGINES_END_S: Final = 0.8
"""The same for engines, which have nothing left to do then. An engine whose run cannot be stopped is killed."""
_AUDIT_END_S: Final = 0.5
"""Seconds that the last audit lines may take, once the fronts have ended."""
_WATCH_S: Final = 0.2
"""Seconds between two looks at the processes."""


class Supervisor:
    """One server of several processes. Event loop only."""

    def __init__(self, settings: Settings, clock: Clock | None = None) -> None:
        """Read the files of TLS and tokens.

        Raises:
            AttnserveError: one of them cannot be used, or spans cannot be exported.
            StartFailed: the system has no shared memory without a file.
        """
        if not hasattr(os, "memfd_create"):
            raise StartFailed("isolation process needs Linux: set --isolation none")
        check_tracing(settings)
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
        self._audit = audit_of(settings, self._own)
        self._pages = Pages(self.catalog, self.health, self.metrics, lambda: not self.fault.is_set(), self._collect)
        self.http = HttpServer(guarded(Starlette(routes=routes(self._pages.page)), self.access), self.access)
        self.children = Children(self.metrics)
        self.reserve = Reserve(self.children, wanted=settings.standby)
        self._fronts: list[KeptFront] = []
        self._bounds = ReceiveBounds(0, 0, 0, 0)
        self._occupancy = Arena.create_descriptor(SharedOccupancy.SIZE)
        around = Surroundings(
            settings, self.clock, self.children, self.reserve, self._occupancy, Places(), self._own, self._started
        )
        self.engines = Engines(around, self.metrics, self.catalog, self._begin)
        self.lifecycle = self.engines.lifecycle = Lifecycle(
            settings,
            self.metrics,
            self.catalog,
            self.health,
            self.engines,
            counted=self._own,
            reachable=lambda: any(front.is_listening for front in self._fronts),
        )
        self.grpc_port = 0
        self.http_port = 0
        self.rest_port = 0
        self._holders: list[socket.socket] = []
        self._listen = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start all processes, and wait until every model is ready or failed.

        Raises:
            StartFailed: there is no model, or none could be loaded.
            PortUnavailable: a port is taken.
        """
        bundles = self.lifecycle.find()
        self.grpc_port = self._hold_port(self.settings.grpc_port)
        self.rest_port = self._hold_port(self.settings.rest_port)
        self.http_port = self.rest_port
        if not self.settings.merges_ports:
            self.http_port = await self.http.start(self.settings.host, self.settings.http_port)
        count = self.settings.fronts or min(MOST_FRONTS, max(1, cores() // 2))
        bounds = ReceiveBounds.of(self.settings, [(bundle.manifest, 0) for bundle in bundles], count)  # of each front
        self._bounds = self.lifecycle.bounds = bounds
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
        for number in range(count):
            front = KeptFront(self, self.children, f"front {number}", self._own)
            self._fronts.append(front)
            self._begin(front.run(), front.name)
        self._begin(self.keeper.watch(self._reloaded), "files")
        self._begin(self._watch(), "watch")
        await self.lifecycle.start()
        await self._listen.wait()
        self.engines.tries = True
        ready = ready_models(self.catalog)
        self.reserve.fill()
        if self.settings.watch_repository:
            self._begin(self.lifecycle.watch(), "repository")
        if self.settings.ports_file is not None:
            write_ports(self.settings.ports_file, self.grpc_port, self.http_port, self.rest_port)
        _log.info("ready", models=[f"{model.name}/{model.version}" for model in ready])

    async def drain(self) -> None:
        """Drain the fronts, then the engines. What has not ended a little after the grace period is killed."""
        end = self.clock.now() + self.settings.drain_grace_s
        self.lifecycle.stop()
        self.engines.draining = True
        self.health.drain()
        self.catalog.drain()
        _log.info("draining", grace_s=self.settings.drain_grace_s)
        self.reserve.close()
        await self._end(self._fronts, end + _FRONTS_END_S)  # an engine that ends now is still replaced
        self.engines.no_fronts()
        await self._end(self.engines.engines(), end + _ENGINES_END_S)

    async def _end(self, those: Sequence[KeptFront | KeptEngine], until_s: float) -> None:
        running = []
        for one in those:
            one.ending = True
            if one.child is not None:
                one.child.send(Drain())
                running.append(one.child.ended)
        if running:
            await asyncio.wait(running, timeout=max(0.0, until_s - self.clock.now()))

    def reread(self) -> None:
        """Read the files of TLS and tokens, and the repository again now, and reopen the audit log: for SIGHUP."""
        self.keeper.hurry()
        self.lifecycle.hurry()
        if self._audit is not None:
            self._audit.reopen()

    async def aclose(self) -> None:
        """End all processes at once."""
        self.reserve.close()
        self.lifecycle.stop()
        self.engines.no_fronts()
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.children.aclose()
        if self._audit is not None:
            await asyncio.to_thread(self._audit.close, _AUDIT_END_S)
        await self.lifecycle.aclose()
        self.health.close()
        await self.http.stop()
        for holder in self._holders:
            holder.close()
        self.engines.close()
        for descriptor in (self._descriptor, self._occupancy):
            os.close(descriptor)

    def _hold_port(self, wanted: int) -> int:
        holder, port = _held_port(self.settings.host, wanted)
        self._holders.append(holder)
        return port

    def _begin(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._task_ended)
        self._tasks.add(task)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
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
            self.engines.watch(now)

    def _started(self) -> list[KeptFront]:
        return [front for front in self._fronts if front.is_started]

    def front_start(self, front: KeptFront) -> FrontStart:
        """Return the message that starts a front."""
        assert front.child is not None
        http_port = self.rest_port if self.settings.merges_ports else self.settings.http_port
        ports = {"grpc_port": self.grpc_port, "rest_port": self.rest_port, "http_port": http_port}
        settings = self.settings.model_copy(update=ports).model_dump_json().encode()
        key = b""
        with contextlib.ExitStack() as sent:
            pipes = []
            if self._audit is not None:
                key, pipes = self._audit.key, [sent.enter_context(self._audit.pipe(front.name))]
            package = front.child.first_package(self._descriptor, *pipes)
        return FrontStart(settings, self.keeper.material, package, len(self._fronts), astuple(self._bounds), key)

    def front_started(self, front: KeptFront) -> None:
        """Send a front all models."""
        self.engines.front_started(front)

    def front_listens(self) -> None:
        """Report the server ready, if it was not because no front took connections."""
        if all(front.is_listening for front in self._fronts):
            self._listen.set()
        self.lifecycle.report()

    def front_sent(self, front: KeptFront, message: object) -> None:
        """Take another message of a front."""
        if isinstance(message, ChangeModels):
            self._begin(self._change(front, message), f"{message.what} of models")
        elif isinstance(message, PageRequest):
            self._begin(self._send_page(front, message), "page")
        else:
            self.engines.front_sent(front, message)

    async def _change(self, front: KeptFront, message: ChangeModels) -> None:
        """Change models for a caller of a front, which waits for the answer unless it has ended."""
        child = front.child
        done = await change(self.lifecycle, message)
        if child is not None:
            child.send(done)

    async def _send_page(self, front: KeptFront, request: PageRequest) -> None:
        front.send(PageAnswer(request.number, await self._pages.page(request.path, request.accept)))

    def front_ended(self, number: int, *, started: bool) -> None:
        """Forget a front. `started`: whether it has listened; if not, none can be started."""
        self.engines.front_ended(number)
        if started or self._listen.is_set():
            self.lifecycle.report()
        else:
            self._fail()

    def _reloaded(self, material: Material) -> None:
        """Use the new files here and in all fronts."""
        self.access.update(material)
        for front in self._fronts:
            front.send(material)

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
