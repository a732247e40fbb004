"""Layouts after a reshape, a transpose or a broadcast agree with NumPy on where positions of varying axes are.

A layout has the factors of each axis of a tensor, and marks those whose length varies, the batch or a sequence. An
operation that would mix their positions raises NotFollowed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from attnserve_server.conversion.proof.layout import (
    PLAIN_ONE,
    Axis,
    Factor,
    Layout,
    NotFollowed,
    Places,
    broadcast,
    is_one,
    is_plain,
    merged,
    ordinals,
    plain,
    reshaped,
    size_of,
    transposed,
    varying,
    without_axes,
)
from attnserve_server.conversion.proof.sizes import Atom, Size, product
from hypothesis import given
from hypothesis import strategies as st

SEQ = Size.atom(Atom("seq", frozenset({"seq"}), 1, 64))
BATCH = Size.atom(Atom("batch", frozenset({"batch"}), 1, 64))
LENGTHS = {"seq": 5, "batch": 3}
VARIES: Axis = (Factor(SEQ, SEQ),)

AXES = st.sampled_from(
    [
        plain(Size.of(2)),
        plain(Size.of(4)),
        plain(BATCH),
        PLAIN_ONE,
        VARIES,
        (Factor(Size.of(2)), Factor(SEQ, SEQ)),
        (Factor(SEQ, SEQ), Factor(Size.of(2))),
    ]
)
LAYOUTS = st.lists(AXES, min_size=1, max_size=4).map(tuple)


def number(size: Size, lengths: Mapping[str, int]) -> int:
    """Return a size for given lengths."""
    total = 0
    for monomial, factor in size.terms:
        total += factor * math.prod(lengths[name] for name in monomial)
    return total


def shape_of(layout: Layout) -> tuple[int, ...]:
    return tuple(number(size_of(axis), LENGTHS) for axis in layout)


def positions(layout: Layout, place: int) -> np.ndarray:
    """Return each element's position along one varying factor."""
    wide = [number(factor.size, LENGTHS) for axis in layout for factor in axis]
    marks = [factor.varies for axis in layout for factor in axis]
    at = [index for index, varies in enumerate(marks) if varies][place]
    shape = [1] * len(wide)
    shape[at] = wide[at]
    counted = np.broadcast_to(np.arange(wide[at]).reshape(shape), wide)
    return counted.reshape(shape_of(layout))


@dataclass(frozen=True)
class Moved:
    """A layout before and after an operation."""

    before: Layout
    after: Layout
    places: Places


def check(moved: Moved, arrays: Sequence[np.ndarray]) -> None:
    """Assert that NumPy moved each factor's positions to the places of the new layout."""
    for place, array in enumerate(arrays):
        if place in moved.places:
            assert np.array_equal(array, np.broadcast_to(positions(moved.after, moved.places[place]), array.shape))


@given(LAYOUTS, st.randoms(use_true_random=False))
def test_transposed_positions_are_those_of_numpy(layout: Layout, random: object) -> None:
    order = list(range(len(layout)))
    random.shuffle(order)  # type: ignore[attr-defined]
    after, places = transposed(layout, order)
    before = [positions(layout, place) for place in range(len(varying(layout)))]
    assert shape_of(after) == tuple(shape_of(layout)[at] for at in order)
    assert sorted(places) == sorted(places.values()) == list(range(len(before)))
    check(Moved(layout, after, places), [array.transpose(order) for array in before])


@given(LAYOUTS, st.data())
def test_reshaped_positions_are_those_of_numpy(layout: Layout, data: st.DataObject) -> None:
    factors = [factor for axis in layout for factor in axis]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(factors)), max_size=3)))
    ends = [0, *cuts, len(factors)]
    sizes = [product(f.size for f in factors[start:end]) for start, end in itertools.pairwise(ends)]
    after = reshaped(layout, sizes)
    before = [positions(layout, place) for place in range(len(varying(layout)))]
    assert shape_of(after) == tuple(number(size, LENGTHS) for size in sizes)
    check(Moved(layout, after, {at: at for at in range(len(before))}), [a.reshape(shape_of(after)) for a in before])


@given(
    LAYOUTS,
    st.lists(
        st.sampled_from([Size.of(1), Size.of(2), Size.of(4), Size.of(8), SEQ, SEQ * Size.of(2), BATCH]), max_size=4
    ),
)
def test_a_reshape_is_right_or_raises_not_followed(layout: Layout, sizes: list[Size]) -> None:
    try:
        after = reshaped(layout, sizes)
    except NotFollowed:
        return
    before = [positions(layout, place) for place in range(len(varying(layout)))]
    assert [size_of(axis) for axis in after] == sizes
    check(Moved(layout, after, {at: at for at in range(len(before))}), [a.reshape(shape_of(after)) for a in before])


@given(LAYOUTS, st.data())
def test_broadcast_positions_are_those_of_numpy(layout: Layout, data: st.DataObject) -> None:
    kept = data.draw(st.lists(st.booleans(), min_size=len(layout), max_size=len(layout)))
    other = tuple(axis if keep else PLAIN_ONE for axis, keep in zip(layout, kept, strict=True))
    other = other[data.draw(st.integers(0, len(other))) :]
    after, (first, second) = broadcast([layout, other])
    shape = np.broadcast_shapes(shape_of(layout), shape_of(other))
    assert shape_of(after) == shape
    for source, places in ((layout, first), (other, second)):
        arrays = [np.broadcast_to(positions(source, place), shape) for place in range(len(varying(source)))]
        assert len(places) == len(arrays)
        check(Moved(source, after, places), arrays)


@given(LAYOUTS, LAYOUTS)
def test_axes_of_unequal_lengths_are_not_broadcast(one: Layout, other: Layout) -> None:
    try:
        after, _ = broadcast([one, other])
    except NotFollowed:
        return
    assert shape_of(after) == np.broadcast_shapes(shape_of(one), shape_of(other))


@given(LAYOUTS, st.data())
def test_remaining_axes_keep_their_order(layout: Layout, data: st.DataObject) -> None:
    gone = data.draw(st.sets(st.integers(0, len(layout) - 1)))
    after, places = without_axes(layout, gone)
    assert after == tuple(axis for at, axis in enumerate(layout) if at not in gone)
    assert sorted(places.values()) == list(range(len(varying(after))))
    assert all(varying(layout)[old][1] == varying(after)[new][1] for old, new in places.items())


@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        ((VARIES, plain(Size.of(4))), [Size.of(4), SEQ]),  # the axes in reverse
        ((plain(Size.of(4)), VARIES), [Size.of(2), SEQ, Size.of(2)]),  # a rotation: the axes before it come last
        ((VARIES,), [Size.of(2), Size.of(2)]),
        ((plain(BATCH), VARIES), [SEQ, BATCH]),
        ((VARIES,), []),
    ],
)
def test_a_reshape_that_mixes_positions_raises_not_followed(layout: Layout, sizes: list[Size]) -> None:
    with pytest.raises(NotFollowed):
        reshaped(layout, sizes)


def test_positions_behind_padding_are_not_reshaped() -> None:
    with pytest.raises(NotFollowed, match="behind the padding"):
        reshaped(((Factor(SEQ + Size.of(1), SEQ, 1),),), [SEQ + Size.of(1)])


def test_broadcasting_keeps_two_axes_of_one_length_apart() -> None:
    with pytest.raises(NotFollowed, match="equal lengths"):
        broadcast([(VARIES,), (plain(Size.of(4)),)])


def test_adjacent_plain_factors_are_merged() -> None:
    assert merged([Factor(Size.of(2)), Factor(Size.of(1)), Factor(Size.of(3))]) == plain(Size.of(6))
    assert merged([]) == PLAIN_ONE
    assert is_one(merged([Factor(Size.of(1))]))


def test_factors_are_counted_over_all_axes() -> None:
    layout: Layout = (VARIES, plain(Size.of(4)), (Factor(Size.of(2)), Factor(SEQ, SEQ)))
    assert [at for at, _ in varying(layout)] == [0, 2]
    assert ordinals(layout, 2) == [1]
    assert is_plain(layout[1])
    assert not is_plain(layout[2])
