"""When requests are sent: in a closed loop after the caller's last answer, in an open loop at given times.

A refusal is an `Outcome`. An exception of `send` or `record` ends the loop as an ExceptionGroup.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

PAUSE_AFTER_ERROR_S: Final = 0.05
"""Seconds that a caller in a closed loop waits after a refusal; without a pause, it would measure refusals alone."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one request.

    Attributes:
        error: Reason of the refusal, or the gRPC code if it has no reason; empty if the request was answered.
        bytes_received: Size of the answer.
        batch_size: Sequences in the run of the request's first sequence.
        useful_tokens: Positions of that run that carry data.
        computed_tokens: All positions of that run, padding included.
        queue_s: Seconds that the first sequence waited in the queue.
    """

    error: str = ""
    bytes_received: int = 0
    batch_size: int = 0
    useful_tokens: int = 0
    computed_tokens: int = 0
    queue_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: when it was due, sent and done, in seconds on one monotonic clock."""

    index: int
    due_s: float
    sent_s: float
    done_s: float
    outcome: Outcome

    @property
    def latency_s(self) -> float:
        """Seconds from when the request was due, so that the delay of a late client counts."""
        return self.done_s - self.due_s


Send = Callable[[int], Awaitable[Outcome]]
Record = Callable[[Sample], None]


@dataclass(frozen=True, slots=True)
class Clock:
    """The source of time: seconds on a monotonic clock, and a sleep in seconds."""

    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


async def closed_loop(
    send: Send,
    record: Record,
    *,
    callers: int,
    duration_s: float,
    requests: int | None = None,
    clock: Clock | None = None,
) -> None:
    """Let each caller send, await its answer and send again, for `duration_s` or until `requests` are sent."""
    clock = clock or Clock()
    until = clock.now() + duration_s
    indices = itertools.count() if requests is None else iter(range(requests))

    async def caller() -> None:
        for index in indices:
            sent = clock.now()
            if sent >= until:
                return
            outcome = await send(index)
            record(Sample(index, sent, sent, clock.now(), outcome))
            if outcome.error:
                await clock.sleep(PAUSE_AFTER_ERROR_S)

    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())


async def open_loop(
    send: Send, record: Record, *, gaps: Iterator[float], duration_s: float, clock: Clock | None = None
) -> None:
    """Send each request when it is due, whether or not earlier ones are answered; return after the last answer.

    Args:
        send: Sends the request of an index and returns its outcome.
        record: Receives a sample of each request.
        gaps: Seconds from one arrival to the next.
        duration_s: Seconds during which requests are due.
        clock: The source of time; the system's by default.
    """
    clock = clock or Clock()
    begun = due = clock.now()

    async def one(index: int, due_s: float) -> None:
        sent = clock.now()
        outcome = await send(index)
        record(Sample(index, due_s, sent, clock.now(), outcome))

    async with asyncio.TaskGroup() as group:
        for index in itertools.count():
            due += next(gaps)
            if due >= begun + duration_s:
                return
            await clock.sleep(max(0.0, due - clock.now()))
            group.create_task(one(index, due))


def poisson(rate: float, random: np.random.Generator) -> Iterator[float]:
    """Yield endless gaps, in seconds, of a Poisson process of `rate` arrivals a second: independent callers."""
    while True:
        yield float(random.exponential(1 / rate))
