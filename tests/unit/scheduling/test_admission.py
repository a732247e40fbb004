"""Admission: whether a request may join the queue, and the retry delay if it may not.

`refusal` returns None for a request that may. Demands and loads are made by hand or drawn; nothing runs or raises.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from attnserve_server.scheduling.admission import Demand, Load, Speed, refusal
from attnserve_server.scheduling.policy import SchedulingSettings
from hypothesis import given
from hypothesis import strategies as st

SETTINGS = SchedulingSettings(max_queue_size=10, max_queue_bytes=1000, wait_headroom=1.0)
ONE = Demand(sequences=1, tokens=20, bytes=100)


def load(waiting: Demand, running: int = 0, speed: float | None = 0.01, instances: int = 2) -> Load:
    return Load(waiting, running, instances, speed)


def test_a_queue_with_room_takes_a_request() -> None:
    assert refusal(ONE, load(Demand(9, 180, 900)), None, SETTINGS) is None


def test_a_full_queue_refuses_with_the_time_until_it_has_room() -> None:
    refused = refusal(ONE, load(Demand(10, 200, 500)), None, SETTINGS)
    assert refused is not None
    assert (refused.cause, refused.limit, refused.value) == ("queue_full", 10, 11)
    # one of ten waiting sequences, 20 tokens, at 0.01 s per token on two instances
    assert refused.retry_delay_s == pytest.approx(0.1)


def test_a_queue_at_its_byte_limit_refuses_with_the_time_until_it_has_room() -> None:
    refused = refusal(ONE, load(Demand(5, 100, 1000)), None, SETTINGS)
    assert refused is not None
    assert (refused.cause, refused.limit, refused.value) == ("queue_bytes", 1000, 1100)
    # a tenth of the bytes, hence of the 100 tokens
    assert refused.retry_delay_s == pytest.approx(0.05)


def test_the_retry_delay_is_one_second_if_the_speed_is_unknown() -> None:
    refused = refusal(ONE, load(Demand(10, 200, 500), speed=None), None, SETTINGS)
    assert refused is not None
    assert refused.retry_delay_s == 1.0


def test_an_empty_queue_takes_a_request_larger_than_its_bounds() -> None:
    assert refusal(Demand(11, 100, 5000), load(Demand(0, 0, 0)), None, SETTINGS) is None


def test_a_wait_beyond_the_deadline_is_refused_with_the_time_until_it_fits() -> None:
    # 100 waiting + 40 / 2 running + 20 of the request, at 0.005 s: 0.7 s
    busy = load(Demand(5, 100, 100), running=40)
    assert refusal(ONE, busy, 0.71, SETTINGS) is None
    refused = refusal(ONE, busy, 0.4, SETTINGS)
    assert refused is not None
    assert refused.cause == "predicted_wait"
    assert (refused.limit, refused.value) == (0.4, pytest.approx(0.7))
    assert refused.retry_delay_s == pytest.approx(0.3)


def test_a_predicted_wait_has_headroom() -> None:
    busy = load(Demand(5, 100, 100), running=40)  # 0.7 s, as above
    roomy = replace(SETTINGS, wait_headroom=1.5)
    assert refusal(ONE, busy, 1.06, roomy) is None
    refused = refusal(ONE, busy, 0.9, roomy)
    assert refused is not None
    assert refused.value == pytest.approx(1.05)
    # the wait is 0.6 s, and 0.9 s with headroom
    assert refused.retry_delay_s == pytest.approx(0.1)


def test_a_deadline_too_short_for_the_run_itself_is_no_overload() -> None:
    assert refusal(ONE, load(Demand(0, 0, 0)), 0.001, SETTINGS) is None
    refused = refusal(ONE, load(Demand(1, 20, 0)), 0.001, SETTINGS)
    assert refused is not None
    assert refused.retry_delay_s == pytest.approx(0.1), "at most the time until the queue is empty"


def test_no_wait_is_refused_without_a_deadline_or_an_estimate() -> None:
    busy = Demand(9, 10**6, 0)
    assert refusal(ONE, load(busy), None, SETTINGS) is None
    assert refusal(ONE, load(busy, speed=None), 0.001, SETTINGS) is None


@given(
    st.builds(Demand, *[st.integers(1, 10**6)] * 3),
    st.builds(
        Load,
        waiting=st.builds(Demand, *[st.integers(0, 10**6)] * 3),
        running_tokens=st.integers(0, 10**6),
        instances=st.integers(1, 8),
        seconds_per_token=st.none() | st.floats(1e-6, 1),
    ),
    st.none() | st.floats(0.001, 100),
)
def test_retry_delays_are_positive_and_bounded(demand: Demand, ahead: Load, remaining: float | None) -> None:
    refused = refusal(demand, ahead, remaining, SETTINGS)
    if refused is not None:
        assert 0.01 <= refused.retry_delay_s <= 30
        assert refused.value > refused.limit


def test_pace_is_the_time_of_runs_over_their_predicted_time() -> None:
    speed = Speed(0.5)
    assert speed.pace == 0.0
    speed.add(1.0, 100)
    assert speed.pace == 0.0, "nothing was predicted"
    for _ in range(200):
        speed.add(3.0, 100, 2.0)
    assert speed.pace == pytest.approx(1.5)


def test_speed_starts_from_its_seed_and_follows_the_runs() -> None:
    assert Speed().seconds_per_token is None
    speed = Speed(0.5)
    assert speed.seconds_per_token == 0.5
    for _ in range(200):
        speed.add(1.0, 100)
    # the seed weighs 0.95^200 by now
    assert speed.seconds_per_token == pytest.approx(0.01, rel=1e-3)
