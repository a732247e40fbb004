"""Lanes: which connection takes the next attempt or stream, under a clock that the test sets.

A lane is one connection to one peer, which is an address. Lane n is to peer n modulo the number of peers. A turn is one
attempt or stream on a lane.
"""

from __future__ import annotations

import threading
from collections import Counter

import pytest
from attnserve_client import InvalidRequest, NotServing, ServerUnreachable
from attnserve_client._lanes import Lanes, Turn
from attnserve_client.errors import AttnserveError


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def numbers(turns: list[Turn]) -> list[int]:
    return [turn.lane.number for turn in turns]


def miss(lanes: Lanes, turn: Turn) -> None:
    lanes.failed(turn, ServerUnreachable("gone", code="UNAVAILABLE"))
    lanes.leave(turn)


def test_calls_that_run_together_are_spread_evenly_over_all_lanes() -> None:
    lanes = Lanes(2, 3)
    turns = [lanes.take() for _ in range(12)]
    assert Counter(numbers(turns)) == dict.fromkeys(range(6), 2)
    assert Counter(turn.lane.peer for turn in turns) == dict.fromkeys({turn.lane.peer for turn in turns}, 6)


def test_calls_one_after_the_other_take_all_lanes_in_turn() -> None:
    lanes = Lanes(1, 3)
    taken = []
    for _ in range(6):
        taken.append(lanes.take())
        lanes.leave(taken[-1])
    assert numbers(taken) == [0, 1, 2, 0, 1, 2]


def test_the_lane_with_the_fewest_turns_is_next() -> None:
    lanes = Lanes(1, 3)
    turns = [lanes.take() for _ in range(6)]
    for turn in turns:
        if turn.lane.number == 2:
            lanes.leave(turn)
    assert numbers([lanes.take(), lanes.take()]) == [2, 2]


def test_streams_take_separate_lanes_even_where_calls_run() -> None:
    lanes = Lanes(1, 3)
    first = lanes.take(stream=True)
    calls = [lanes.take() for _ in range(8)]
    others = [lanes.take(stream=True), lanes.take(stream=True)]
    assert len({turn.lane for turn in (first, *others)}) == 3
    assert Counter(numbers([first, *calls])) == {0: 3, 1: 3, 2: 3}, "a stream counts as one turn"


def test_a_retry_takes_another_address_and_then_another_connection() -> None:
    lanes = Lanes(2, 2)
    tried: list[Turn] = []
    for _ in range(4):
        tried.append(lanes.take(tried))
        lanes.leave(tried[-1])
    assert tried[0].lane.peer is not tried[1].lane.peer
    assert len({turn.lane for turn in tried}) == 4


def test_a_lane_that_failed_is_avoided_although_it_has_the_fewest_turns() -> None:
    lanes = Lanes(1, 2, Clock())
    miss(lanes, lanes.take())
    assert set(numbers([lanes.take() for _ in range(5)])) == {1}


def test_one_attempt_after_1_second_and_then_every_2_tries_a_failed_lane_again() -> None:
    clock = Clock()
    lanes = Lanes(1, 2, clock)
    miss(lanes, lanes.take())
    lanes.take()  # on lane 1, so that lane 0 has the fewest turns
    for wait_s in (1.0, 2.0, 2.0, 2.0):
        clock.now += wait_s - 0.1
        early = lanes.take()
        clock.now += 0.2
        probe, next_ = lanes.take(), lanes.take()
        assert numbers([early, probe, next_]) == [1, 0, 1]
        assert [turn.probe for turn in (early, probe, next_)] == [False, True, False]
        clock.now -= 0.1
        miss(lanes, probe)
    clock.now += 6.0
    found = lanes.take()
    lanes.answered(found)
    assert set(numbers([lanes.take() for _ in range(5)])) == {0}, "it is used like the others again"


def test_a_second_attempt_does_not_try_a_failed_lane_again() -> None:
    clock = Clock()
    lanes = Lanes(2, 1, clock)
    miss(lanes, lanes.take())
    clock.now += 60.0
    tried = [lanes.take(), lanes.take()]
    assert numbers(tried) == [1, 0]
    on_lane_1 = [tried[0]]
    lanes.leave(tried[1])
    miss(lanes, tried[1])
    clock.now += 60.0
    assert lanes.take(on_lane_1).lane.number == 1


def test_failures_of_attempts_that_ran_together_are_one_miss() -> None:
    clock = Clock()
    lanes = Lanes(1, 1, clock)
    turns = [lanes.take() for _ in range(30)]
    for turn in turns:
        miss(lanes, turn)
    assert turns[0].lane.misses == 1
    assert turns[0].lane.turns == 0


def test_late_answers_from_before_a_failure_leave_the_lane_avoided() -> None:
    lanes = Lanes(1, 2, Clock())
    early, lost = lanes.take(), lanes.take()
    both = [lanes.take() for _ in range(2)]
    assert early.lane is both[0].lane
    miss(lanes, both[0])
    lanes.answered(early)
    lanes.leave(early)
    assert set(numbers([lanes.take() for _ in range(4)])) == {lost.lane.number}


def test_where_all_lanes_failed_calls_are_still_made() -> None:
    lanes = Lanes(2, 1, Clock())
    for _ in range(2):
        miss(lanes, lanes.take())
    assert sorted(numbers([lanes.take(), lanes.take()])) == [0, 1]


@pytest.mark.parametrize(
    ("error", "avoided"),
    [
        (ServerUnreachable("gone", code="UNAVAILABLE"), True),
        (NotServing("draining", code="UNAVAILABLE", reason="NOT_SERVING"), False),
        (InvalidRequest("wrong", code="INVALID_ARGUMENT", reason="INVALID_REQUEST"), False),
        (AttnserveError("refused", code="UNAUTHENTICATED"), False),
    ],
)
def test_only_a_lane_without_an_answer_is_avoided(error: AttnserveError, avoided: bool) -> None:
    lanes = Lanes(1, 2, Clock())
    turn = lanes.take()
    lanes.failed(turn, error)
    lanes.leave(turn)
    assert (0 not in numbers([lanes.take() for _ in range(4)])) is avoided


@pytest.mark.parametrize(("since_s", "tokens"), [(0.5, 8.0), (1.5, 1.0)])
def test_a_drain_takes_one_token_where_another_address_failed_a_while_ago(since_s: float, tokens: float) -> None:
    clock = Clock()
    lanes = Lanes(2, 1, clock)
    turns = [lanes.take() for _ in range(16)]
    miss(lanes, next(turn for turn in turns if turn.lane.number == 1))
    clock.now += since_s  # its server may have returned, and no call has tried it since
    draining = NotServing("draining", code="UNAVAILABLE", reason="NOT_SERVING", metadata={"state": "draining"})
    refused = [turn for turn in turns if turn.lane.number == 0]
    assert sum(lanes.failed(turn, draining) for turn in refused) == tokens
    assert lanes.take(refused[:1]).lane.number == 1


def test_threads_that_take_and_leave_lose_no_count() -> None:
    lanes = Lanes(1, 4)

    def work() -> None:
        for _ in range(2_000):
            lanes.leave(lanes.take(stream=True))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    turns = [lanes.take() for _ in range(4)]
    assert [(turn.lane.turns, turn.lane.streams) for turn in turns] == [(1, 0)] * 4
