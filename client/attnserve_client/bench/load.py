"""When requests are sent: in closed loops callers wait for answers, in open ones arrivals wait for nobody."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

PAUSE_AFTER_ERROR_S: Final = 0.05
"""What a caller in a closed loop waits after a refusal: without it, refusals would be all that it measures."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one request. `error` is empty where it was answered.

    Attributes:
        error: the refusal's reason, or gRPC's code where it gives none.
        bytes_received: the answer's size.
        batch_size: sequences that shared its first sequence's run.
        useful_tokens: positions of that run that carry data.
        computed_tokens: positions that it worked on.
        queue_s: what its first sequence waited.
    """

    error: str = ""
    bytes_received: int = 0
    batch_size: int = 0
    useful_tokens: int = 0
    computed_tokens: int = 0
    queue_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: when it was due, sent and done, in seconds of one monotonic clock."""

    index: int
    due_s: float
    sent_s: float
    done_s: float
    outcome: Outcome

    @property
    def latency_s(self) -> float:
        """From when it was due, not from when it was sent: what a late client hides would be missing otherwise."""
        return self.done_s - self.due_s


Send = Callable[[int], Awaitable[Outcome]]
Record = Callable[[Sample], None]


@dataclass(frozen=True, slots=True)
class Clock:
    """Where time comes from."""

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
    """Each of `callers` sends, waits for the answer and sends again, for a time or until `requests` are sent."""
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
    """Sends when each request is due, whatever has become of the others; ends when the last is answered.

    Args:
        send: sends one.
        record: is told of each.
        gaps: seconds from one arrival to the next.
        duration_s: requests are due until then.
        clock: the time.
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
    """Gaps of a Poisson process: independent callers, `rate` a second together. Endless."""
    while True:
        yield float(random.exponential(1 / rate))
