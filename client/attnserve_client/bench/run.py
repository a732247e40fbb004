"""One run of the command: connects, warms up, measures."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from attnserve_client.bench.load import Record, Sample, closed_loop, open_loop, poisson
from attnserve_client.bench.report import Effort, Report, report_of
from attnserve_client.bench.sending import Calls, Sender, Streams, connected, try_each_kind
from attnserve_client.bench.workload import Workload


@dataclass(frozen=True, slots=True)
class Plan:
    """How a server is loaded.

    Attributes:
        callers: of a closed loop.
        rate: arrivals a second of an open loop; None for a closed one.
        duration_s: how long requests are sent.
        requests: how many a closed loop sends at most; None: as many as the time allows.
        warm_up_s: how long the same load runs unmeasured before.
        timeout_s: each request's.
        connections: to the server.
        stream: whether requests travel on streams.
        seed: of the arrivals.
    """

    callers: int = 64
    rate: float | None = None
    duration_s: float = 10.0
    requests: int | None = None
    warm_up_s: float = 2.0
    timeout_s: float = 30.0
    connections: int = 1
    stream: bool = False
    seed: int = 0


Progress = Callable[[str, Sample], None]
"""Told of each request with the phase that it belongs to: `warm-up` or `measuring`."""


async def measure(target: str, workload: Workload, plan: Plan, progress: Progress) -> Report:
    """Loads a server as planned, and reports what was measured after the warm-up.

    Raises:
        AttnserveError: the server refuses such requests even one at a time.
    """
    async with connected(target, plan.connections) as stubs, contextlib.AsyncExitStack() as stack:
        await try_each_kind(stubs[0], workload, plan.timeout_s)
        sender: Sender
        if plan.stream:
            sender = streams = Streams(stubs, workload, plan.timeout_s)
            stack.push_async_callback(streams.aclose)
        else:
            sender = Calls(stubs, workload, plan.timeout_s)
        if plan.warm_up_s > 0:
            warm_up = replace(plan, duration_s=plan.warm_up_s, requests=None, seed=plan.seed + 1)
            await _load(sender, warm_up, partial(progress, "warm-up"))
        samples: list[Sample] = []

        def record(sample: Sample) -> None:
            samples.append(sample)
            progress("measuring", sample)

        cpu, loop_cpu, begun = time.process_time(), time.thread_time(), time.perf_counter()
        await _load(sender, plan, record)
        wall = time.perf_counter() - begun
        effort = Effort(
            begun_s=begun,
            window_s=min(wall, plan.duration_s),
            wall_s=wall,
            cpu_s=time.process_time() - cpu,
            loop_cpu_s=time.thread_time() - loop_cpu,
        )
    return report_of(samples, effort, workload)


async def _load(sender: Sender, plan: Plan, record: Record) -> None:
    if plan.rate is None:
        await closed_loop(sender.send, record, callers=plan.callers, duration_s=plan.duration_s, requests=plan.requests)
        return
    gaps = poisson(plan.rate, np.random.default_rng(plan.seed))
    await open_loop(sender.send, record, gaps=gaps, duration_s=plan.duration_s)


def run(target: str, workload: Workload, plan: Plan, progress: Progress) -> Report:
    """`measure`, in an event loop of its own."""
    return asyncio.run(measure(target, workload, plan, progress))
