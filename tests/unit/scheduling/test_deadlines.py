"""Deadlines are called back in order, each once, not before it is reached, and never after it was discarded."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
from attnserve_server.scheduling.deadlines import TICK_S, Deadlines
from attnserve_server.scheduling.queue import Request


@pytest.mark.parametrize("seed", range(5))
def test_each_deadline_is_called_back_when_it_is_reached(virtually: Callable, clock, seed: int) -> None:
    chance = random.Random(seed)
    reached: list[tuple[Request, float]] = []

    async def story() -> None:
        begun = clock.now()
        deadlines = Deadlines(clock, lambda request: reached.append((request, clock.now())))
        requests = [Request(str(number), begun + chance.uniform(0.001, 40 * TICK_S)) for number in range(60)]
        kept = []
        for number, request in enumerate(requests):
            deadlines.add(request)
            if number % 3 == 0:
                deadlines.discard(request)
            else:
                kept.append(request)
        await asyncio.sleep(45 * TICK_S)
        assert [one for one, _ in reached] == sorted(kept, key=lambda one: one.deadline_s)
        assert all(0 <= at - one.deadline_s < 1e-3 for one, at in reached)

    virtually(story())


def test_a_request_may_be_discarded_in_its_last_tick_and_nothing_comes_after_close(virtually: Callable, clock) -> None:
    reached: list[Request] = []

    async def story() -> None:
        deadlines = Deadlines(clock, reached.append)
        at = (clock.now() // TICK_S + 2) * TICK_S
        near, closed = Request("near", at + 0.9 * TICK_S), Request("closed", at + 5 * TICK_S)
        deadlines.add(near)
        deadlines.add(closed)
        await asyncio.sleep(at + 0.5 * TICK_S - clock.now())
        deadlines.discard(near)
        deadlines.discard(Request("never added", at))
        deadlines.discard(Request("without a deadline"))
        await asyncio.sleep(TICK_S)
        deadlines.close()
        await asyncio.sleep(9 * TICK_S)
        assert reached == []

    virtually(story())
