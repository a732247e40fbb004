"""Closed and open loops of the load test, in virtual time.

In a closed loop, each caller waits for its answer before its next request. An open loop sends each request when it is
due, whether or not others are answered. `FakeTime` replaces the clock, so that no test waits.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from attnserve_client.bench.load import PAUSE_AFTER_ERROR_S, Clock, Outcome, Sample, closed_loop, open_loop, poisson


class FakeTime:
    """A clock that jumps to the end of the next sleep when no task can run."""

    def __init__(self) -> None:
        self.now = 100.0
        self._sleepers: list[tuple[float, int, asyncio.Event]] = []
        self._count = 0

    async def sleep(self, seconds: float) -> None:
        event = asyncio.Event()
        self._count += 1
        heapq.heappush(self._sleepers, (self.now + seconds, self._count, event))
        await event.wait()

    async def drive(self, work: Any) -> None:
        task = asyncio.create_task(work)
        while not task.done():
            for _ in range(5):
                await asyncio.sleep(0)
            if self._sleepers and not task.done():
                until, _, event = heapq.heappop(self._sleepers)
                self.now = max(self.now, until)
                event.set()
        await task

    @property
    def clock(self) -> Clock:
        return Clock(now=lambda: self.now, sleep=self.sleep)


async def test_closed_loop_callers_wait_for_their_answers() -> None:
    time, samples, at_once = FakeTime(), list[Sample](), 0

    async def send(index: int) -> Outcome:
        nonlocal at_once
        at_once += 1
        assert at_once <= 3
        await time.sleep(1.0)
        at_once -= 1
        return Outcome()

    await time.drive(closed_loop(send, samples.append, callers=3, duration_s=10.0, clock=time.clock))
    assert sorted(sample.index for sample in samples) == list(range(30))
    assert {sample.latency_s for sample in samples} == {1.0}


async def test_closed_loop_stops_after_its_requests() -> None:
    time, samples = FakeTime(), list[Sample]()

    async def send(index: int) -> Outcome:
        await time.sleep(1.0)
        return Outcome()

    await time.drive(closed_loop(send, samples.append, callers=4, duration_s=1e9, requests=10, clock=time.clock))
    assert sorted(sample.index for sample in samples) == list(range(10))


async def test_refused_caller_pauses_before_its_next_request() -> None:
    time, samples = FakeTime(), list[Sample]()

    async def send(index: int) -> Outcome:
        return Outcome(error="OVERLOADED")

    await time.drive(
        closed_loop(send, samples.append, callers=1, duration_s=9.5 * PAUSE_AFTER_ERROR_S, clock=time.clock)
    )
    assert len(samples) == 10


async def test_open_loop_latencies_count_from_when_requests_were_due() -> None:
    time, samples = FakeTime(), list[Sample]()

    async def send(index: int) -> Outcome:
        if index == 1:
            time.now += 3.0  # the whole client stands still: what is due meanwhile is sent late
        await time.sleep(0.5)
        return Outcome()

    await time.drive(open_loop(send, samples.append, gaps=iter([1.0] * 9), duration_s=6.5, clock=time.clock))
    samples.sort(key=lambda sample: sample.index)
    assert [sample.due_s - 100 for sample in samples] == [1, 2, 3, 4, 5, 6]
    assert [sample.sent_s - sample.due_s for sample in samples] == [0, 0, 2, 1, 0, 0]
    # Requests delayed inside the client take longer than 0.5.
    assert [sample.latency_s for sample in samples] == [0.5, 3.5, 2.5, 1.5, 0.5, 0.5]


async def test_open_loop_sends_without_waiting_for_answers() -> None:
    time, samples = FakeTime(), list[Sample]()

    async def send(index: int) -> Outcome:
        await time.sleep(100.0)
        return Outcome()

    await time.drive(open_loop(send, samples.append, gaps=iter([0.125] * 99), duration_s=5.0, clock=time.clock))
    assert len(samples) == 39
    assert max(sample.sent_s - sample.due_s for sample in samples) < 1e-9


def test_poisson_gaps_have_equal_mean_and_deviation() -> None:
    gaps: Iterator[float] = poisson(50.0, np.random.default_rng(0))
    drawn = np.array([next(gaps) for _ in range(20_000)])
    # Mean and deviation of an exponential are equal; of 20,000 draws each is off by about 1%.
    assert drawn.mean() == pytest.approx(1 / 50, rel=0.05)
    assert drawn.std() == pytest.approx(1 / 50, rel=0.05)
