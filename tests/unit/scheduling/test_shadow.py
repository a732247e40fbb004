"""What the shadow check decides, as functions of values."""

from __future__ import annotations

import pytest
from attnserve_server.scheduling.policy import Waiting
from attnserve_server.scheduling.shadow import ShadowSettings, Throttle, has_room, may_start, must_stop, size_of


@pytest.mark.parametrize(
    ("waiting", "free", "instances", "starts"),
    [
        (0, 1, 1, True),  # the only instance, idle
        (1, 1, 1, False),
        (0, 0, 1, False),
        (0, 2, 2, True),
        (0, 1, 2, False),  # a newcomer would find no instance
        (0, 2, 8, True),
        (1, 8, 8, False),
    ],
)
def test_repeat_starts_only_where_nothing_waits_and_another_instance_stays_free(
    waiting: int, free: int, instances: int, starts: bool
) -> None:
    assert may_start(waiting, free, instances) is starts


@pytest.mark.parametrize(("waiting", "free", "stops"), [(0, 0, False), (1, 1, False), (1, 0, True), (9, 0, True)])
def test_repeat_stops_where_work_waits_that_no_instance_takes(waiting: int, free: int, stops: bool) -> None:
    assert must_stop(waiting, free) is stops


def test_samples_are_bounded_by_number_and_by_bytes() -> None:
    settings = ShadowSettings(share=1, max_samples=2, max_bytes=100)
    assert has_room(0, 0, 100, settings)
    assert has_room(1, 40, 60, settings)
    assert not has_room(1, 40, 61, settings)
    assert not has_room(2, 0, 1, settings)
    assert not has_room(0, 0, 101, settings)


def test_size_of_a_sequence_is_that_of_a_run_of_its_own() -> None:
    view = Waiting(rank_s=0.0, lengths=(3, 5), footprint={(): 7, (0,): 10, (0, 1): 4, (1, 1): 2})
    assert size_of(view) == 7 + 3 * 10 + 3 * 5 * 4 + 5 * 5 * 2


def test_throttle_passes_one_in_a_while_and_counts_the_others() -> None:
    throttle = Throttle(10.0)
    assert [throttle.passes(now) for now in (100.0, 100.0, 109.9, 110.0, 110.0, 125.0)] == [0, None, None, 2, None, 1]
