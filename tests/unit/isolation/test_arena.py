"""Slots of shared memory: what is taken is not given twice, and what is freed is found again."""

from __future__ import annotations

import itertools
import os
import random

import numpy as np
import pytest
from attnserve_server.isolation.arena import SLOT_BYTES, Arena, LoadBoard, LoadFacts


def arena(slots: int) -> Arena:
    descriptor = Arena.create_descriptor(slots * SLOT_BYTES)
    try:
        return Arena(descriptor, slots * SLOT_BYTES)
    finally:
        os.close(descriptor)


def test_places_never_overlap_and_all_memory_is_found_again() -> None:
    chance = random.Random(3)
    one = arena(40)
    taken: dict[int, int] = {}
    for _ in range(2000):
        if taken and chance.random() < 0.5:
            offset = chance.choice(sorted(taken))
            one.free(offset, taken.pop(offset))
            continue
        size = chance.randint(1, 5 * SLOT_BYTES)
        found = one.allocate(size)
        if found is not None:
            taken[found] = size
            spans = sorted((at, at + length) for at, length in taken.items())
            assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
            assert spans[-1][1] <= 40 * SLOT_BYTES
    for offset, size in taken.items():
        one.free(offset, size)
    assert one.free_slots == 40
    assert one.allocate(40 * SLOT_BYTES) == 0


def test_a_full_arena_gives_nothing() -> None:
    one = arena(3)
    assert one.allocate(2 * SLOT_BYTES) == 0
    assert one.allocate(2 * SLOT_BYTES) is None
    assert one.allocate(1) == 2 * SLOT_BYTES


def test_freeing_what_is_free_raises_value_error() -> None:
    one = arena(3)
    offset = one.allocate(SLOT_BYTES)
    assert offset is not None
    one.free(offset, SLOT_BYTES)
    with pytest.raises(ValueError, match="are not all taken"):
        one.free(offset, SLOT_BYTES)


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, 3 * SLOT_BYTES + 1), (3 * SLOT_BYTES, 1)])
def test_places_outside_of_the_arena_raise_value_error(offset: int, size: int) -> None:
    with pytest.raises(ValueError, match="are not within"):
        arena(3).view(offset, size)


def test_both_sides_see_one_memory_and_arrays_outlive_the_arena() -> None:
    descriptor = Arena.create_descriptor(4 * SLOT_BYTES)
    writer, reader = Arena(descriptor, 4 * SLOT_BYTES), Arena(descriptor, 4 * SLOT_BYTES)
    os.close(descriptor)
    writer.view(SLOT_BYTES, 8)[:] = bytes(range(8))
    read = np.frombuffer(reader.view(SLOT_BYTES, 8), np.uint8)
    reader.close()
    writer.close()
    assert read.tolist() == list(range(8))


def test_a_load_is_read_as_it_was_written() -> None:
    descriptor = Arena.create_descriptor(LoadBoard.SIZE)
    writer, reader = LoadBoard(descriptor), LoadBoard(descriptor)
    os.close(descriptor)
    assert reader.read() == LoadFacts(0, 0, 0, 0, 0, 0.0)
    facts = LoadFacts(3, 120, 9000, 64, 2, 1.5e-4)
    writer.write(facts)
    assert reader.read() == facts
