"""The last idle instance is woken first; a cheap run waits for neighbours where some are usual, for a bounded time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from attnserve_server.scheduling.idle import CHEAP_S, MOST_WAIT_S, Gathering, IdleInstances


async def test_the_last_instance_is_woken_first_and_one_at_a_time() -> None:
    idle = IdleInstances()
    first, second, third = (idle.enter() for _ in range(3))
    idle.leave(second)
    idle.wake()
    assert (first.done(), third.done()) == (False, True)
    idle.wake()
    idle.wake()
    assert first.done()
    assert not second.done()


async def test_all_instances_are_woken_at_once() -> None:
    idle = IdleInstances()
    entered = [idle.enter() for _ in range(3)]
    entered[1].cancel()
    idle.wake_all()
    assert all(woken.done() for woken in entered)


def gathering(in_flight: int) -> tuple[Gathering, list[str]]:
    woken: list[str] = []
    made = Gathering(lambda: woken.append("woken"))
    made.arrived(in_flight)
    return made, woken


async def test_a_lone_request_never_waits() -> None:
    made, _ = gathering(1)
    assert not made.waits(1, 0.0)


async def test_a_run_that_is_not_cheap_never_waits() -> None:
    made, _ = gathering(64)
    assert not made.waits(1, CHEAP_S)
    assert made.waits(1, CHEAP_S / 2)


async def test_a_cheap_run_waits_for_half_of_those_that_are_usually_in_flight() -> None:
    made, _ = gathering(10)
    assert made.waits(4, 0.0)
    assert not made.waits(5, 0.0)


def test_a_wait_ends_after_a_millisecond_and_the_next_run_may_wait_again(virtually: Callable) -> None:
    async def story() -> None:
        made, woken = gathering(64)
        assert made.waits(1, 0.0)
        await asyncio.sleep(0.9 * MOST_WAIT_S)
        assert (made.waits(2, 0.0), woken) == (True, [])
        await asyncio.sleep(0.2 * MOST_WAIT_S)
        assert (made.waits(2, 0.0), woken) == (False, ["woken"])
        made.started()
        assert made.waits(1, 0.0)

    virtually(story())


async def test_requests_of_long_ago_are_no_longer_expected() -> None:
    made, _ = gathering(64)
    for _ in range(400):
        made.arrived(1)
    assert not made.waits(1, 0.0)
