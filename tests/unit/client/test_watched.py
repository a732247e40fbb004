"""Calls whose attempts are watched: a limit for each attempt, and hedges, with a fake clock and against a server.

Where policy or budget allow no further attempt, the last one continues until the deadline. `driver_class` makes either
client, and `server` is a fake server; both are fixtures of conftest.py.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from attnserve.v1 import inference_service_pb2 as wire
from attnserve_client import AsyncClient, InvalidRequest, Overloaded, RetryPolicy
from attnserve_client._lanes import Lanes
from attnserve_client._retry import RetryBudget, Retrying
from attnserve_client.errors import RequestCancelled
from attnserve_client.testing import FakeServer


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def retrying(policy: RetryPolicy, clock: Clock, jitter: float = 1.0) -> Retrying:
    return Retrying(policy, RetryBudget(policy), clock, lambda: jitter)


def test_attempt_over_its_limit_is_cut_and_another_begun_elsewhere() -> None:
    clock = Clock()
    call = retrying(RetryPolicy(attempt_timeout_s=2.0), clock).attempts(Lanes(2, 1, clock), clock.now + 20)
    first = call.begin()
    assert call.patience_s() == pytest.approx(2.0)
    clock.now += 1.5
    assert call.overdue() == (None, False), "it is not due yet"
    assert call.patience_s() == pytest.approx(0.5)
    clock.now += 0.5
    assert call.overdue() == (first, True)
    assert call.begin().lane is not first.lane


def test_attempts_that_one_stalled_server_holds_take_one_token_together() -> None:
    clock = Clock()
    policies, lanes = retrying(RetryPolicy(attempt_timeout_s=2.0, budget_tokens=10), clock), Lanes(2, 1, clock)
    calls = [policies.attempts(lanes, None) for _ in range(64)]
    turns = [call.begin() for call in calls]
    clock.now += 3.0
    held = [call for call, turn in zip(calls, turns, strict=True) if turn.lane.number == 0]
    assert [call.overdue()[1] for call in held] == [True] * 32
    assert policies.budget.tokens == 9.0


def test_last_attempt_continues_until_the_deadline() -> None:
    clock = Clock()
    policy = RetryPolicy(attempt_timeout_s=1.0, max_attempts=2)
    call = retrying(policy, clock).attempts(Lanes(2, 1, clock), clock.now + 20)
    call.begin()
    clock.now += 1.0
    assert call.overdue()[1]
    call.begin()
    clock.now += 1.0
    assert call.overdue() == (None, False)
    assert call.patience_s() is None


def test_attempts_at_a_server_that_never_answers_are_cut_only_while_the_budget_lasts() -> None:
    clock = Clock()
    policies, lanes = retrying(RetryPolicy(attempt_timeout_s=1.0, budget_tokens=10), clock), Lanes(1, 1, clock)
    cut = 0
    for _ in range(20):
        call = policies.attempts(lanes, None)
        call.begin()
        clock.now += 1.0
        cut += call.overdue()[1]
    assert 4 <= cut <= 10, "one for each token above the half, and the attempts that try the connection again"


def test_hedge_runs_beside_the_first_attempt_at_another_address() -> None:
    clock = Clock()
    policies, lanes = retrying(RetryPolicy(hedge_after_s=0.5), clock), Lanes(2, 1, clock)
    call = policies.attempts(lanes, None)
    first = call.begin()
    clock.now += 0.5
    assert call.overdue() == (None, True)
    second = call.begin()
    assert second.lane is not first.lane
    assert call.patience_s() is None, "one hedge at a time"
    assert policies.budget.tokens == 9.0
    call.wait_after(first, Overloaded("full"))
    assert call.patience_s() == pytest.approx(0.5), "the second attempt is alone now"


def test_hedges_take_what_the_budget_has_above_its_half_and_then_a_tenth_of_the_calls() -> None:
    clock = Clock()
    policies, lanes = retrying(RetryPolicy(hedge_after_s=0.5, budget_tokens=10), clock), Lanes(2, 1, clock)
    hedges = []
    for _ in range(105):
        call = policies.attempts(lanes, None)
        turn = call.begin()
        clock.now += 0.5
        hedges.append(call.overdue()[1])
        call.succeeded(turn)
        lanes.leave(turn)
    assert hedges[:5] == [True] * 5
    assert sum(hedges) <= 5 + 11  # 0.1 token for each success


def test_hedge_and_limit_cut_the_older_attempt_and_keep_the_newer() -> None:
    clock = Clock()
    policy = RetryPolicy(hedge_after_s=0.5, attempt_timeout_s=1.0)
    call = retrying(policy, clock).attempts(Lanes(2, 1, clock), None)
    first = call.begin()
    clock.now += 0.5
    assert call.overdue() == (None, True)
    call.begin()
    assert call.patience_s() == pytest.approx(0.5)
    clock.now += 0.5
    assert call.overdue() == (first, False)


# -- against a server


async def test_slow_attempt_is_cut_and_the_call_answered(driver_class: Any, raw_server: Any) -> None:
    entered, leave = [], threading.Event()

    def infer(request: Any, context: Any) -> wire.InferResponse:
        entered.append(request.request_id)
        if len(entered) == 1:
            leave.wait(20)
        return wire.InferResponse(results=[wire.SequenceResult()])

    with raw_server(Infer=infer) as server:
        driver = driver_class(server.target, retry=RetryPolicy(attempt_timeout_s=0.3))
        await driver.infer("fake", "text", request_id="mine", timeout=10.0)
        assert entered == ["mine", "mine"]
        leave.set()
        await driver.close()


async def test_watched_call_raises_the_servers_error(driver_class: Any, server: FakeServer) -> None:
    driver = driver_class(server.target, retry=RetryPolicy(attempt_timeout_s=5.0, hedge_after_s=5.0))
    with pytest.raises(InvalidRequest) as caught:
        await driver.infer("fake", "", attention=None, version="1", outputs=["none"], request_id="mine")
    assert caught.value.request_id == "mine"
    server.fail_next(server.overloaded())
    await driver.infer("fake", "text")
    assert len(driver.waits) == 1
    await driver.close()
    with pytest.raises(RequestCancelled):
        await driver.infer("fake", "text")


async def test_first_answer_of_a_hedged_call_counts_and_the_other_attempt_is_cancelled(
    driver_class: Any, raw_server: Any
) -> None:
    entered, cancelled = [], threading.Event()

    def infer(request: Any, context: Any) -> wire.InferResponse:
        entered.append(request.request_id)
        if len(entered) == 1:
            context.add_callback(cancelled.set)
            cancelled.wait(20)
        return wire.InferResponse(results=[wire.SequenceResult()])

    with raw_server(Infer=infer) as server:
        driver = driver_class(server.target, retry=RetryPolicy(hedge_after_s=0.2))
        await driver.infer("fake", "text", timeout=10.0)
        assert len(entered) == 2
        assert await asyncio.to_thread(cancelled.wait, 10)
        await driver.close()


async def test_cancelled_task_cancels_all_attempts(server: FakeServer) -> None:
    server.latency_s = 30.0
    async with AsyncClient(server.target, retry=RetryPolicy(hedge_after_s=0.1)) as client:
        call = asyncio.create_task(client.infer("fake", "text"))
        await asyncio.to_thread(server.wait_for_requests, 2)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        lanes = client._connections.lanes
        assert lanes.take().lane.turns == 1, "the turns of both attempts have ended"


async def test_closing_the_client_ends_a_watched_call(driver_class: Any, server: FakeServer) -> None:
    server.latency_s = 30.0
    driver = driver_class(server.target, retry=RetryPolicy(hedge_after_s=0.1))
    call = asyncio.create_task(driver.infer("fake", "text"))
    await asyncio.to_thread(server.wait_for_requests, 2)
    await driver.close()
    with pytest.raises(RequestCancelled):
        await call
