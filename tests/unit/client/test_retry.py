"""Retries: the policy with a fake clock, and both clients against a failing server.

Only overload and unavailability are retried. Where the attempts, the budget of retries or the time are used up, the
last error is raised; a policy out of range raises ValueError. `driver` runs a test with each client on `server`, a fake
server; both are fixtures of conftest.py.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import grpc
import pytest
from attnserve.v1 import inference_service_pb2 as wire
from attnserve_client import (
    InvalidRequest,
    NotServing,
    Overloaded,
    ResponseTooLarge,
    RetryPolicy,
    ServerUnreachable,
)
from attnserve_client._lanes import Lanes
from attnserve_client._retry import RetryBudget, Retrying
from attnserve_client.errors import AttnserveError, InternalFault
from attnserve_client.testing import FakeServer
from hypothesis import given
from hypothesis import strategies as st


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def retrying(policy: RetryPolicy, clock: Clock, jitter: float = 1.0) -> Retrying:
    return Retrying(policy, RetryBudget(policy), clock, lambda: jitter)


@given(
    attempt=st.integers(1, 10_000),
    retry_delay_s=st.none() | st.floats(0, 1e6),
    jitter=st.floats(0, 1),
    initial=st.floats(0, 10),
    multiplier=st.floats(1, 100),
    most=st.floats(0, 100),
)
def test_backoff_exceeds_the_servers_delay_by_at_most_the_cap(
    attempt: int, retry_delay_s: float | None, jitter: float, initial: float, multiplier: float, most: float
) -> None:
    policy = RetryPolicy(initial_backoff_s=initial, multiplier=multiplier, max_backoff_s=most)
    least = retry_delay_s or 0.0
    assert least <= policy.backoff_s(attempt, retry_delay_s, jitter) <= least + most


def test_backoff_doubles_up_to_its_cap() -> None:
    policy = RetryPolicy(initial_backoff_s=0.1, multiplier=2.0, max_backoff_s=0.5)
    assert [policy.backoff_s(attempt, None, 1.0) for attempt in range(1, 5)] == pytest.approx([0.1, 0.2, 0.4, 0.5])


@pytest.mark.parametrize(
    "wrong", [{"max_attempts": 0}, {"initial_backoff_s": -1.0}, {"budget_return": -0.1}, {"multiplier": 0.5}]
)
def test_policy_refuses_values_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        RetryPolicy(**wrong)


@pytest.mark.parametrize("name", ["attempt_timeout_s", "hedge_after_s"])
@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_policy_refuses_limits_that_are_no_time(name: str, wrong: float) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is {wrong}; it must be above 0 and finite, or None"):
        RetryPolicy(**{name: wrong})


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (NotServing("draining"), True),
        (ServerUnreachable("gone"), True),
        (Overloaded("full"), True),
        (ResponseTooLarge("too large"), False),
        (InvalidRequest("wrong"), False),
        (InternalFault("ours"), False),
        (InternalFault("the engine ended", code="INTERNAL", reason="ENGINE_CRASHED"), False),
        (AttnserveError("message too large", code="RESOURCE_EXHAUSTED"), False),
    ],
)
def test_only_overload_and_unavailability_are_retried(error: AttnserveError, retried: bool) -> None:
    attempts = retrying(RetryPolicy(), Clock()).attempts(Lanes(1, 1), None)
    assert (attempts.wait_after(attempts.begin(), error) is not None) is retried


def test_attempts_stop_at_their_maximum() -> None:
    attempts = retrying(RetryPolicy(max_attempts=3), Clock()).attempts(Lanes(1, 1), None)
    waits = [attempts.wait_after(attempts.begin(), Overloaded("full")) for _ in range(3)]
    assert [wait is not None for wait in waits] == [True, True, False]


def test_wait_past_the_deadline_is_not_started() -> None:
    clock = Clock()
    attempts = retrying(RetryPolicy(), clock).attempts(Lanes(1, 1), clock.now + 1.0)
    assert attempts.wait_after(attempts.begin(), Overloaded("full", retry_delay_s=0.5)) is not None
    clock.now += 0.6
    assert attempts.remaining_s() == pytest.approx(0.4)
    assert attempts.wait_after(attempts.begin(), Overloaded("full", retry_delay_s=0.5)) is None


def test_remaining_time_is_never_negative() -> None:
    clock = Clock()
    attempts = retrying(RetryPolicy(), clock).attempts(Lanes(1, 1), clock.now + 1.0)
    clock.now += 5.0
    assert attempts.remaining_s() == 0.0


def test_budget_stops_retries_at_half_and_refills_by_successes() -> None:
    budget = RetryBudget(RetryPolicy(budget_tokens=10, budget_return=0.1))
    assert [budget.failed() for _ in range(6)] == [True, True, True, True, False, False]
    for _ in range(21):
        budget.succeeded()
    assert budget.failed()  # 4 + 2.1 - 1 is above half again
    for _ in range(1000):
        budget.succeeded()
    assert budget.tokens == 10


def test_budget_is_never_negative() -> None:
    budget = RetryBudget(RetryPolicy(budget_tokens=2))
    for _ in range(10):
        budget.failed()
    assert budget.tokens == 0


LOST = "Stream removed (Socket closed)"


def lost() -> ServerUnreachable:
    return ServerUnreachable(LOST, code="UNAVAILABLE")


def test_calls_that_one_lost_connection_ends_take_one_token_together() -> None:
    policies, lanes = retrying(RetryPolicy(budget_tokens=10), Clock()), Lanes(2, 1)
    calls = [policies.attempts(lanes, None) for _ in range(64)]
    turns = [call.begin() for call in calls]
    ended = [(call, turn) for call, turn in zip(calls, turns, strict=True) if turn.lane.number == 0]
    waits = [call.wait_after(turn, lost()) for call, turn in ended]
    assert len(waits) == 32
    assert None not in waits
    assert policies.budget.tokens == 9.0
    assert {call.begin().lane.number for call, _ in ended} == {1}, "they are made again at the other address"


def test_connections_of_one_address_are_lost_together() -> None:
    policies, lanes = retrying(RetryPolicy(budget_tokens=10), Clock()), Lanes(2, 8)
    calls = [policies.attempts(lanes, None) for _ in range(64)]
    turns = [call.begin() for call in calls]
    peer = turns[0].lane.peer
    for call, turn in zip(calls, turns, strict=True):
        if turn.lane.peer is peer:
            assert call.wait_after(turn, lost()) is not None
    assert policies.budget.tokens == 9.0


def test_refusals_of_a_proxy_take_a_token_each() -> None:
    policies, lanes = retrying(RetryPolicy(budget_tokens=10), Clock()), Lanes(1, 1)
    calls = [policies.attempts(lanes, None) for _ in range(64)]
    waits = [call.wait_after(call.begin(), ServerUnreachable("no healthy upstream")) for call in calls]
    assert [wait is not None for wait in waits] == [True] * 4 + [False] * 60


def test_losses_without_an_answer_between_them_take_a_token_each() -> None:
    policies, lanes = retrying(RetryPolicy(budget_tokens=10), Clock()), Lanes(1, 1)
    waits = []
    for _ in range(6):
        call = policies.attempts(lanes, None)
        waits.append(call.wait_after(call.begin(), lost()))
    assert [wait is not None for wait in waits] == [True] * 4 + [False] * 2


def test_a_second_loss_after_an_answer_is_one_failure_again() -> None:
    policies, lanes = retrying(RetryPolicy(budget_tokens=10, budget_return=0.0), Clock()), Lanes(1, 1)
    for number in (1, 2, 3):
        calls = [policies.attempts(lanes, None) for _ in range(20)]
        turns = [call.begin() for call in calls]
        for call, turn in zip(calls, turns, strict=True):
            call.wait_after(turn, lost())
        assert policies.budget.tokens == 10 - number
        answered = policies.attempts(lanes, None)
        answered.succeeded(answered.begin())


def test_an_attempt_that_tries_a_lost_connection_again_takes_no_token() -> None:
    clock = Clock()
    policies, lanes = retrying(RetryPolicy(budget_tokens=10), clock), Lanes(2, 1, clock)
    first = policies.attempts(lanes, None)
    first.wait_after(first.begin(), lost())
    for _ in range(20):
        clock.now += 6.0
        turns = [policies.attempts(lanes, None) for _ in range(2)]
        begun = [(call, call.begin()) for call in turns]
        (probe,) = [(call, turn) for call, turn in begun if turn.probe]
        assert probe[0].wait_after(probe[1], lost()) is not None
    assert policies.budget.tokens == 9.0


def draining() -> NotServing:
    return NotServing(
        "the server is draining",
        code="UNAVAILABLE",
        reason="NOT_SERVING",
        metadata={"state": "draining"},
        retry_delay_s=1.0,
    )


def test_refusals_of_a_draining_server_take_one_token_together_while_another_address_works() -> None:
    policies, lanes = retrying(RetryPolicy(budget_tokens=10), Clock()), Lanes(2, 1)
    calls = [policies.attempts(lanes, None) for _ in range(64)]
    refused = [(call, turn) for call in calls if (turn := call.begin()).lane.number == 0]
    waits = [call.wait_after(turn, draining()) for call, turn in refused]
    assert waits == [0.1] * 32, "the other address need not wait for the first one's delay"
    assert policies.budget.tokens == 9.0
    assert lanes.take().lane.number == 1


def test_refusals_of_a_draining_server_without_another_one_take_a_token_each() -> None:
    policies, lanes = retrying(RetryPolicy(budget_tokens=10), Clock()), Lanes(1, 2)
    calls = [policies.attempts(lanes, None) for _ in range(64)]
    waits = [call.wait_after(call.begin(), draining()) for call in calls]
    assert waits == [1.1] * 4 + [None] * 60


async def test_call_that_the_server_cancels_is_made_again(driver_class: Any, raw_server: Any) -> None:
    """A server of grpc.aio cancels calls without details when it stops."""
    seen = []

    def infer(request: Any, context: Any) -> wire.InferResponse:
        seen.append(1)
        if len(seen) == 1:
            context.abort(grpc.StatusCode.CANCELLED, "")
        return wire.InferResponse(results=[wire.SequenceResult()])

    with raw_server(Infer=infer) as server:
        for policy in (RetryPolicy(), RetryPolicy(attempt_timeout_s=9.0)):
            seen.clear()
            driver = driver_class(server.target, retry=policy)
            await driver.infer("fake", "text")
            assert len(seen) == 2
            await driver.close()


async def test_crash_of_an_engine_is_raised_and_the_request_not_sent_again(driver: Any, server: FakeServer) -> None:
    server.fail_next(InternalFault("the engine ended", code="INTERNAL", reason="ENGINE_CRASHED"))
    with pytest.raises(InternalFault) as caught:
        await driver.infer("fake", "text")
    assert caught.value.reason == "ENGINE_CRASHED"
    assert len(server.requests) == 1


async def test_crash_of_an_engine_is_final_even_with_a_code_that_is_retried(driver: Any, server: FakeServer) -> None:
    server.fail_next(InternalFault("the engine ended", code="UNAVAILABLE", reason="ENGINE_CRASHED", retry_delay_s=0.0))
    with pytest.raises(InternalFault):
        await driver.infer("fake", "text")
    assert len(server.requests) == 1


async def test_refused_request_is_retried_after_the_servers_delay(driver: Any, server: FakeServer) -> None:
    server.fail_next(server.overloaded(retry_delay_s=0.25))
    server.fail_next(server.not_serving("loading", retry_delay_s=0.5))
    answer = await driver.infer("fake", "a text", request_id="mine")
    assert answer.receipt.request_id == "mine"
    assert [request.request_id for request in server.requests] == ["mine"] * 3
    first, second = driver.waits
    assert 0.25 <= first <= 0.25 + 0.1
    assert 0.5 <= second <= 0.5 + 0.2


async def test_too_large_response_is_not_retried(driver: Any, server: FakeServer) -> None:
    metadata = {"predicted_bytes": "200", "allowed_bytes": "100"}
    error = ResponseTooLarge("too large", code="RESOURCE_EXHAUSTED", reason="RESPONSE_TOO_LARGE", metadata=metadata)
    server.fail_next(error)
    with pytest.raises(ResponseTooLarge) as caught:
        await driver.infer("fake", "a text")
    assert (caught.value.predicted_bytes, caught.value.allowed_bytes) == (200, 100)
    assert len(server.requests) == 1


async def attempts_per_call(driver: Any, server: FakeServer, calls: int) -> float:
    server.fail_next(server.not_serving(), times=calls * 10)
    for _ in range(calls):
        with pytest.raises(NotServing):
            await driver.infer("fake", "a text")
    return len(server.requests) / calls


async def test_failing_server_receives_at_most_a_tenth_more_requests(driver: Any, server: FakeServer) -> None:
    assert await attempts_per_call(driver, server, 60) <= 1.1


async def test_control_without_the_budget_every_call_makes_all_attempts(
    patient_driver: Any, server: FakeServer
) -> None:
    assert await attempts_per_call(patient_driver, server, 20) == 4.0


async def test_storm_of_bare_refusals_receives_at_most_a_tenth_more_requests(
    driver_class: Any, raw_server: Any
) -> None:
    """A proxy without a server behind it sends UNAVAILABLE without details, to callers that run together."""
    seen = []

    def infer(request: Any, context: Any) -> None:
        seen.append(1)
        context.abort(grpc.StatusCode.UNAVAILABLE, "no healthy upstream")

    with raw_server(Infer=infer) as server:
        driver = driver_class([server.target] * 2, connections=2)
        for _ in range(10):
            outcomes = await asyncio.gather(*(driver.infer("fake", "a") for _ in range(30)), return_exceptions=True)
            assert {type(outcome) for outcome in outcomes} == {ServerUnreachable}
        await driver.close()
    assert 300 <= len(seen) <= 330


async def test_timeout_covers_all_attempts(driver: Any, server: FakeServer) -> None:
    clock = itertools.count(step=1.0)  # each reading of the clock is a second later
    retries = driver.client._calls._retrying
    driver.client._calls._retrying = Retrying(retries.policy, retries.budget, lambda: float(next(clock)), lambda: 0.5)
    server.fail_next(server.overloaded(), times=10)
    with pytest.raises(Overloaded):
        await driver.infer("fake", "a text", timeout=6.0)
    assert len(server.requests) < 4
