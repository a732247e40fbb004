"""One bundle to a scheduler that serves: sessions, instances, warm-up, costs and the shadow check."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from attnserve_server.config import Settings
from attnserve_server.domain.clock import Clock
from attnserve_server.domain.machine import resident_bytes
from attnserve_server.engine.cost_file import read_costs, write_costs
from attnserve_server.engine.executor import Executor
from attnserve_server.engine.instance_thread import Occupancy
from attnserve_server.engine.observer import Observer
from attnserve_server.engine.pulse import Pulse
from attnserve_server.engine.session import CPU
from attnserve_server.engine.shrinking import Shrinker
from attnserve_server.engine.watched import WatchedExecutor
from attnserve_server.loading import (
    Opened,
    batch_check_settings,
    cost_key,
    instances_of,
    open_bundle,
    prepare_shapes,
    wide_cost_key,
)
from attnserve_server.model.repository import Bundle
from attnserve_server.observability.logs import logger
from attnserve_server.observability.metrics import ModelMetrics
from attnserve_server.scheduling.scheduler import Scheduler
from attnserve_server.scheduling.traced import TracedScheduler
from attnserve_server.scheduling.verifier import Verifier
from attnserve_server.wanted import scheduling_settings

_log = logger(__name__)

ISOLATED: Final = "an answer from a batch differed from the same sequence alone; each runs alone until the next start"
"""State reason of a ready model that does not batch."""


@dataclass(slots=True, eq=False)
class Started:
    """One loaded model, with the objects to close."""

    opened: Opened
    executor: Executor
    scheduler: Scheduler
    shrinker: Shrinker

    async def aclose(self) -> None:
        """Cancel pending requests, end the threads, and free the memory of the sessions."""
        self.shrinker.close()
        await self.scheduler.aclose()
        await self.executor.aclose()
        opened = self.opened
        for session in filter(None, (*opened.sessions, *opened.past_sessions, opened.wide)):
            session.close()


async def start_model(
    bundle: Bundle,
    settings: Settings,
    clock: Clock,
    metrics: ModelMetrics,
    occupancy: Occupancy,
    *,
    on_fault: Callable[[], None],
    on_isolated: Callable[[], None],
    pulse: Pulse,
) -> Started:
    """Load one model, warm it up, and start its scheduler.

    Args:
        bundle: under the server's batching policy.
        settings: of the server.
        clock: of the server.
        metrics: of the model.
        occupancy: of the process.
        on_fault: called if the scheduler's loop ends with an error.
        on_isolated: called if the shadow check turns batching off.
        pulse: states the runs of the model.

    Raises:
        AttnserveError: with the reason why the model cannot be served.
    """
    began, bytes_before = clock.now(), resident_bytes()
    opened = await asyncio.to_thread(open_bundle, bundle, settings)
    bundle, session = opened.bundle, opened.sessions[0]
    manifest = bundle.manifest
    metrics.provider(session.provider, manifest.precision)
    instances = instances_of(opened.sessions, settings)
    executor = WatchedExecutor(
        opened.sessions, manifest, metrics, clock, instances, opened.past_sessions, opened.wide, occupancy,
        pulse=pulse, floor_s=settings.watchdog_floor_s, observer=Observer(settings.feature_sample, manifest, metrics),
    )  # fmt: skip
    executor.start()
    named = {"model": manifest.name, "version": manifest.version}
    try:
        key = cost_key(session, manifest, settings)
        keys = key, wide_cost_key(key, settings)
        known = [read_costs(bundle, one) if settings.remember_costs else () for one in keys]
        for one, before, timed in zip(keys, known, await executor.warm_up(*known), strict=True):
            if settings.remember_costs and timed and not before and not write_costs(bundle, one, timed):
                _log.info("costs were not written: they are measured at each start", **named)
        await prepare_shapes(executor, opened, settings, clock)
    except BaseException:
        await executor.aclose()
        raise
    checked = batch_check_settings(settings)
    verifier = (
        None if checked is None else Verifier(executor, manifest, checked, clock, metrics, on_isolated=on_isolated)
    )
    tracing = metrics.tracing
    scheduler_of = Scheduler if tracing is None else partial(TracedScheduler, tracing=tracing)
    scheduler = scheduler_of(
        executor,
        manifest,
        scheduling_settings(settings, manifest),
        clock,
        metrics,
        on_fault=on_fault,
        verifier=verifier,
    )
    scheduler.start()
    metrics.session_bytes.set(max(0, resident_bytes() - bytes_before))
    _log.info(
        "model ready",
        **named,
        digest=manifest.digest,
        provider=session.provider,
        devices=len(opened.sessions),
        instances=instances,
        sites=len(manifest.sites),
        sites_available=sum(site.available for site in manifest.sites),
        load_s=round(clock.now() - began, 3),
    )
    shrinker = Shrinker(executor.shrink, occupancy, clock)
    if session.provider == CPU:
        shrinker.start()
    return Started(opened, executor, scheduler, shrinker)
