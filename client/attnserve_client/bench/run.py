"""One load test: connect, warm up, measure."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from attnserve_client._credentials import Tls, TokenFile
from attnserve_client.bench.load import Record, Sample, closed_loop, open_loop, poisson
from attnserve_client.bench.report import Effort, Report, report_of
from attnserve_client.bench.sending import Calls, Sender, Streams, connected, try_each_kind
from attnserve_client.bench.workload import Workload


@dataclass(frozen=True, slots=True)
class Plan:
    """The load that a test puts on a server.

    Attributes:
        callers: Callers of a closed loop.
        rate: Arrivals a second of an open loop; None for a closed loop.
        duration_s: Seconds during which requests are sent.
        requests: Most requests of a closed loop; None for as many as fit into the time.
        warm_up_s: Seconds of the same load before the measurement.
        timeout_s: Seconds that each request may take.
        connections: Connections to each address of the server, used in turn.
        stream: Send requests on one stream for each connection instead of as calls.
        seed: Seed of the arrivals.
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
"""Called after each request with its phase, `warm-up` or `measuring`."""


async def measure(
    target: str,
    workload: Workload,
    plan: Plan,
    progress: Progress,
    *,
    credentials: Tls | None = None,
    token: str | TokenFile | None = None,
) -> Report:
    """Put the planned load on a server, and report what was measured after the warm-up.

    Raises:
        AttnserveError: The server refuses such requests even one at a time.
        ValueError: `target` has an empty address, or the plan's `connections` are out of range.
        ExceptionGroup: `progress` raised.
    """
    async with connected(target, plan.connections, credentials, token) as stubs, contextlib.AsyncExitStack() as stack:
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


def run(target: str, workload: Workload, plan: Plan, progress: Progress, **shown: Any) -> Report:
    """Run `measure` in a new event loop, and raise its errors."""
    return asyncio.run(measure(target, workload, plan, progress, **shown))
