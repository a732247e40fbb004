"""Quotas and guesses: the rate over time, the burst, requests above it, several processes, and slots over reloads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from attnserve_server.access.limits import GUESS_EVERY_S, GUESSES, Buckets, Slots
from hypothesis import given
from hypothesis import strategies as st

TAKER = """
import sys
from attnserve_server.access.limits import Buckets
buckets = Buckets(8, int(sys.argv[1]))
sys.stdin.readline()
print(sum(buckets.take(3, 1, 1e-9, 1000, 5.0) == 0 for _ in range(2000)))
"""


@pytest.fixture(params=["own", "shared"])
def buckets(request: pytest.FixtureRequest) -> Buckets:
    return Buckets(8) if request.param == "own" else Buckets(8, Buckets.create(8))


def test_a_burst_is_taken_at_once_and_then_the_rate(buckets: Buckets) -> None:
    assert [buckets.take(0, 1, 2, 5, 100.0) == 0 for _ in range(6)] == [True] * 5 + [False]
    assert buckets.take(0, 1, 2, 5, 100.0) == pytest.approx(0.5), "one is earned each half second"
    assert buckets.take(0, 1, 2, 5, 100.5) == 0
    assert buckets.take(0, 1, 2, 5, 100.5) > 0


def test_a_request_above_the_burst_needs_a_full_bucket_and_is_earned_afterwards(buckets: Buckets) -> None:
    assert buckets.take(0, 20, 2, 5, 100.0) == 0
    assert buckets.take(0, 1, 2, 5, 107.9) > 0
    assert buckets.take(0, 1, 2, 5, 108.0) == 0, "20 sequences at 2 a second, less the burst of 5, and this one"


def test_tokens_have_separate_buckets(buckets: Buckets) -> None:
    assert buckets.take(0, 5, 1, 5, 1.0) == 0
    assert buckets.take(1, 5, 1, 5, 1.0) == 0
    assert buckets.take(0, 1, 1, 5, 1.0) > 0


def test_a_refused_request_takes_nothing(buckets: Buckets) -> None:
    buckets.take(0, 5, 1, 5, 1.0)
    waits = [buckets.take(0, 1, 1, 5, 1.0) for _ in range(100)]
    assert len(set(waits)) == 1


@given(
    rate=st.floats(0.1, 1000),
    burst=st.floats(1, 1000),
    calls=st.lists(st.tuples(st.floats(0, 5), st.integers(1, 64)), max_size=60),
)
def test_no_more_is_admitted_than_rate_and_burst_allow(
    rate: float, burst: float, calls: list[tuple[float, int]]
) -> None:
    made, now, taken = Buckets(1), 0.0, 0
    largest = 1
    for pause_s, count in calls:
        now += pause_s
        largest = max(largest, count)
        if made.take(0, count, rate, burst, now) == 0:
            taken += count
    assert taken <= rate * now + burst + largest + 1e-6


def test_processes_that_share_buckets_admit_no_more_together() -> None:
    descriptor = Buckets.create(8)
    os.set_inheritable(descriptor, True)
    takers = [
        subprocess.Popen(
            [sys.executable, "-c", TAKER, str(descriptor)],
            pass_fds=(descriptor,), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    for taker in takers:
        assert taker.stdin is not None
        taker.stdin.write("\n")
        taker.stdin.flush()
    assert sum(int(taker.communicate(timeout=60)[0]) for taker in takers) == 1000
    os.close(descriptor)


def test_an_address_may_guess_ten_times_and_then_each_six_seconds(buckets: Buckets) -> None:
    assert [buckets.guess("10.0.0.1", 50.0) for _ in range(GUESSES)] == [0] * GUESSES
    assert buckets.guess("10.0.0.1", 50.0) == pytest.approx(GUESS_EVERY_S)
    assert buckets.guess("10.0.0.1", 50.0 + GUESS_EVERY_S) == 0
    assert buckets.guess("10.0.0.2", 50.0) == 0


def test_a_valid_token_gives_its_guess_back(buckets: Buckets) -> None:
    for _ in range(100):
        assert buckets.guess("10.0.0.1", 50.0) == 0
        buckets.right("10.0.0.1")


def test_places_of_addresses_differ_from_server_to_server() -> None:
    """Otherwise an attacker could choose addresses that share the bucket of another."""
    assert len({Buckets(1)._place("10.0.0.1") for _ in range(20)}) > 10


def test_tokens_keep_their_slots_over_reloads_and_a_new_one_gets_a_full_bucket() -> None:
    made = Buckets(2)
    slots = Slots(made, 2)
    first = slots.assign({"a", "b"})
    made.take(first["a"], 5, 1, 5, 1.0)
    again = slots.assign({"b", "c"})
    assert again == {"b": first["b"], "c": first["a"]}
    assert made.take(again["c"], 5, 1, 5, 1.0) == 0
