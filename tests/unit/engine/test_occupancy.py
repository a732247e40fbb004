"""A run is alone where no engine runs, be it in this process or in another."""

from __future__ import annotations

import os

from attnserve_server.engine.instance_thread import Occupancy, SharedOccupancy
from attnserve_server.isolation.arena import Arena


def test_an_engine_is_busy_from_the_first_run_to_the_last() -> None:
    one = Occupancy()
    assert not one.busy
    one.begin()
    one.begin()
    one.end()
    assert one.busy
    one.end()
    assert not one.busy


def test_engines_count_the_runs_of_each_other() -> None:
    descriptor = Arena.create_descriptor(SharedOccupancy.SIZE)
    one, other = SharedOccupancy(descriptor, 0), SharedOccupancy(descriptor, 1)
    os.close(descriptor)
    one.begin()
    assert (one.busy, other.busy) == (True, True)
    other.begin()
    one.end()
    assert (one.busy, other.busy) == (True, True)
    other.end()
    assert (one.busy, other.busy) == (False, False)


def test_engines_beyond_the_memory_share_places() -> None:
    descriptor = Arena.create_descriptor(SharedOccupancy.SIZE)
    first, beyond = SharedOccupancy(descriptor, 0), SharedOccupancy(descriptor, SharedOccupancy.MOST)
    os.close(descriptor)
    beyond.begin()
    assert first.busy
