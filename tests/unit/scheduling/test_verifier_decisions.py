"""The decisions of the shadow check are functions of values.

The shadow check repeats a share of the batched sequences alone, on idle instances, and compares the answers. Nothing
runs or raises here.
"""

from __future__ import annotations

import pytest
from attnserve_server.scheduling.policy import Candidate
from attnserve_server.scheduling.verifier import ShadowSettings, Throttle, has_room, may_start, must_stop, size_of


@pytest.mark.parametrize(
    ("waiting", "free", "instances", "starts"),
    [
        (0, 1, 1, True),  # the only instance, idle
        (1, 1, 1, False),
        (0, 0, 1, False),
        (0, 2, 2, True),
        (0, 1, 2, False),  # a new request would find no instance
        (0, 2, 8, True),
        (1, 8, 8, False),
    ],
)
def test_a_repeat_starts_only_with_an_empty_queue_and_another_free_instance(
    waiting: int, free: int, instances: int, starts: bool
) -> None:
    assert may_start(waiting, free, instances) is starts


@pytest.mark.parametrize(("waiting", "free", "stops"), [(0, 0, False), (1, 1, False), (1, 0, True), (9, 0, True)])
def test_a_repeat_stops_if_work_waits_and_no_instance_is_free(waiting: int, free: int, stops: bool) -> None:
    assert must_stop(waiting, free) is stops


def test_samples_are_bounded_by_number_and_by_bytes() -> None:
    settings = ShadowSettings(share=1, max_samples=2, max_bytes=100)
    assert has_room(0, 0, 100, settings)
    assert has_room(1, 40, 60, settings)
    assert not has_room(1, 40, 61, settings)
    assert not has_room(2, 0, 1, settings)
    assert not has_room(0, 0, 101, settings)


def test_a_samples_size_is_that_of_a_run_alone() -> None:
    candidate = Candidate(adjusted_arrival_s=0.0, lengths=(3, 5), footprint={(): 7, (0,): 10, (0, 1): 4, (1, 1): 2})
    assert size_of(candidate) == 7 + 3 * 10 + 3 * 5 * 4 + 5 * 5 * 2


def test_the_throttle_passes_one_event_per_interval_and_counts_the_others() -> None:
    throttle = Throttle(10.0)
    assert [throttle.passes(now) for now in (100.0, 100.0, 109.9, 110.0, 110.0, 125.0)] == [0, None, None, 2, None, 1]
