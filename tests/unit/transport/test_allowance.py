"""The byte budget of a stream grants bytes in order, and loses none when a waiting task is cancelled.

`take` waits while too many bytes are taken, and `give` returns bytes to the budget. Nothing is sent, and no time
passes.
"""

from __future__ import annotations

import asyncio

from attnserve_server.transport.allowance import Allowance
from hypothesis import given
from hypothesis import strategies as st


async def settle() -> None:
    """Let every task run as far as it can."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_bytes_that_fit_are_granted_at_once_and_others_in_order() -> None:
    allowance = Allowance(10)
    await allowance.take(6)
    large, small = (asyncio.create_task(allowance.take(count)) for count in (5, 1))
    await settle()
    assert not large.done()
    assert not small.done()  # it would fit, and would overtake
    allowance.give(6)
    await settle()
    assert large.done()
    assert small.done()


async def test_more_than_the_limit_is_granted_alone() -> None:
    allowance = Allowance(10)
    await allowance.take(1)
    huge = asyncio.create_task(allowance.take(100))
    await settle()
    assert not huge.done()
    allowance.give(1)
    await huge


async def test_a_cancelled_wait_lets_the_next_ones_go_on() -> None:
    allowance = Allowance(10)
    await allowance.take(6)
    front, behind = (asyncio.create_task(allowance.take(count)) for count in (9, 2))
    await settle()
    front.cancel()
    await settle()
    assert behind.done()


async def test_bytes_granted_in_the_turn_of_a_cancellation_are_given_back() -> None:
    allowance = Allowance(10)
    await allowance.take(10)
    waiting = asyncio.create_task(allowance.take(10))
    await settle()
    allowance.give(10)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert waiting.cancelled()
    await asyncio.wait_for(allowance.take(10), 1)


@given(st.lists(st.tuples(st.integers(0, 15), st.booleans()), max_size=20))
def test_every_wait_ends_and_no_bytes_stay_taken(wants: list[tuple[int, bool]]) -> None:
    async def scenario() -> None:
        allowance = Allowance(10)
        held = 0

        async def use(count: int) -> None:
            nonlocal held
            await allowance.take(count)
            held += count
            try:
                assert held <= 10 or held == count
                await asyncio.sleep(0)
            finally:
                held -= count
                allowance.give(count)

        tasks = [asyncio.create_task(use(count)) for count, _ in wants]
        await settle()
        for task, (_, leaves) in zip(tasks, wants, strict=True):
            if leaves:
                task.cancel()
        async with asyncio.timeout(1):
            results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)

    asyncio.run(scenario())
