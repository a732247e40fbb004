"""Places of engines in shared memory: each has its own, and one that is given back is used again."""

from __future__ import annotations

import os

from attnserve_server.engine.instance_thread import Places, SharedOccupancy
from attnserve_server.isolation.arena import Arena


def test_the_lowest_free_place_is_taken() -> None:
    places = Places()
    assert [places.take() for _ in range(3)] == [0, 1, 2]
    places.free(1)
    assert [places.take(), places.take()] == [1, 3]


def test_many_changes_use_few_places() -> None:
    places = Places()
    first = places.take()
    for _ in range(2000):
        second = places.take()
        places.free(first)
        first = second
    assert first < 2


def test_engines_beyond_the_last_place_share_it() -> None:
    places = Places(3)
    assert [places.take() for _ in range(5)] == [0, 1, 2, 2, 2]


def test_an_engine_of_a_place_that_was_used_before_counts_its_own_runs() -> None:
    descriptor = Arena.create_descriptor(SharedOccupancy.SIZE)
    try:
        before, other = SharedOccupancy(descriptor, 0), SharedOccupancy(descriptor, 1)
        before.begin()
        assert other.busy
        before.clear()
        assert not other.busy
        SharedOccupancy(descriptor, 0).begin()
        assert other.busy
    finally:
        os.close(descriptor)
