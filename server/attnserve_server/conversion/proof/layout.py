"""Layouts: which axes of a tensor vary between the two runs, and how reshapes, transposes and broadcasts move them.

One axis is varied at a time: the batch, or one symbol. Two runs are compared: a sequence alone, and the same sequence
in a batch (or padded). A *varying* factor of an axis differs in size between them. Its first `real` positions are the
sequence's own and have the same index in both runs; padding follows. A *plain* factor is the same in both runs.

`NotFollowed` and `Mixed` carry the reason in plain words. The interpreter turns them into the verdicts `unknown` and
`refuted`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from attnserve_server.conversion.proof.sizes import ONE, Size, product


@dataclass(frozen=True, slots=True)
class Factor:
    """A part of an axis, in row-major order with the other parts.

    Args:
        size: Its number of positions.
        real: How many positions are the sequence's own, as a function of the sequence's length. None: plain.
        tail: How many plain positions follow the padding of a varying factor.
    """

    size: Size
    real: Size | None = None
    tail: int = 0

    @property
    def varies(self) -> bool:
        """True if its size differs between the two runs."""
        return self.real is not None


Axis = tuple[Factor, ...]
Layout = tuple[Axis, ...]
Places = dict[int, int]
"""The place of each varying factor of one layout, counted in order, within another layout."""
PLAIN_ONE: Axis = (Factor(ONE),)


class NotFollowed(Exception):
    """Raised where the proof cannot represent a layout or a number. Carries the reason."""


class Mixed(Exception):
    """Raised where the sequence's own positions have other places than in the run alone. Carries the reason."""


def plain(size: Size) -> Axis:
    """Return an axis without any varying factor."""
    return (Factor(size),)


def size_of(axis: Axis) -> Size:
    """Return the number of positions of an axis."""
    return product(factor.size for factor in axis)


def is_one(axis: Axis) -> bool:
    """Return whether an axis has one position, in both runs."""
    return size_of(axis).number == 1


def varying(layout: Layout) -> list[tuple[int, Factor]]:
    """Return each varying factor with its axis, in order."""
    return [(at, factor) for at, axis in enumerate(layout) for factor in axis if factor.varies]


def is_plain(axis: Axis) -> bool:
    """Return whether no factor of an axis varies."""
    return not any(factor.varies for factor in axis)


def is_plain_all(layout: Layout) -> bool:
    """Return whether no axis varies."""
    return all(is_plain(axis) for axis in layout)


def ordinals(layout: Layout, axis: int) -> list[int]:
    """Return the places, among all varying factors, of those on one axis."""
    return [place for place, (at, _) in enumerate(varying(layout)) if at == axis]


def merged(factors: Sequence[Factor]) -> Axis:
    """Return an axis in which adjacent plain factors are one."""
    parts: list[Factor] = []
    for factor in factors:
        if not factor.varies and factor.size.number == 1:
            continue
        if parts and not factor.varies and not parts[-1].varies:
            parts[-1] = Factor(parts[-1].size * factor.size)
        else:
            parts.append(factor)
    return tuple(parts) or PLAIN_ONE


def broadcast(layouts: Sequence[Layout]) -> tuple[Layout, list[Places]]:
    """Return the layout of an elementwise operator, and the places of each operand's varying factors in it.

    Raises:
        NotFollowed: It is not known that two axes have the same length in both runs.
    """
    rank = max((len(layout) for layout in layouts), default=0)
    axes: list[Axis] = []
    for back in range(rank, 0, -1):
        there = [layout[-back] for layout in layouts if len(layout) >= back]
        wide = [axis for axis in there if not is_one(axis)]
        first = wide[0] if wide else PLAIN_ONE
        for other in wide[1:]:
            if not alike(first, other):
                lengths = f"{_written(first)} and {_written(other)}"
                raise NotFollowed(f"axes of {lengths} positions are not known to have equal lengths")
            if not is_plain(other) and is_plain(first):
                first = other
        axes.append(first)
    found = tuple(axes)
    return found, [_places(layout, found) for layout in layouts]


def alike(one: Axis, other: Axis) -> bool:
    """Return whether two axes are known to have the same positions in both runs."""
    return one == other or (is_plain(one) and is_plain(other) and size_of(one) == size_of(other))


def _places(layout: Layout, wide: Layout) -> Places:
    shift = len(wide) - len(layout)
    targets: dict[int, list[int]] = {}
    for place, (at, _) in enumerate(varying(wide)):
        targets.setdefault(at, []).append(place)
    places: Places = {}
    seen: dict[int, int] = {}
    for place, (at, _) in enumerate(varying(layout)):
        count = seen.get(at, 0)
        seen[at] = count + 1
        places[place] = targets[at + shift][count]
    return places


def transposed(layout: Layout, order: Sequence[int]) -> tuple[Layout, Places]:
    """Return the layout with its axes in another order, and the places of its varying factors there."""
    found = tuple(layout[at] for at in order)
    starts: dict[int, int] = {}
    count = 0
    for at in order:
        starts[at] = count
        count += sum(factor.varies for factor in layout[at])
    places: Places = {}
    seen: dict[int, int] = {}
    for place, (at, _) in enumerate(varying(layout)):
        places[place] = starts[at] + seen.get(at, 0)
        seen[at] = seen.get(at, 0) + 1
    return found, places


def without_axes(layout: Layout, gone: set[int]) -> tuple[Layout, Places]:
    """Return the layout without some axes, and the places of the varying factors of the others."""
    kept: Places = {}
    for place, (at, _) in enumerate(varying(layout)):
        if at not in gone:
            kept[place] = len(kept)
    return tuple(axis for at, axis in enumerate(layout) if at not in gone), kept


def reshaped(layout: Layout, sizes: Sequence[Size]) -> Layout:
    """Return the layout of the same elements, in row-major order, on axes of other sizes.

    Varying factors stay whole and in their order, so their places do not change.

    Raises:
        NotFollowed: A varying factor would be split, or sizes cannot be matched.
    """
    if any(factor.tail for axis in layout for factor in axis):
        raise NotFollowed("reshapes positions behind the padding")
    left = list(merged([factor for axis in layout for factor in axis]))
    if left == list(PLAIN_ONE):
        left = []
    axes: list[Axis] = []
    for size in sizes:
        taken, need = [], size
        while need.number != 1:
            if not left:
                raise NotFollowed(f"an axis of {size} positions cannot be matched with the axes before the reshape")
            part, need = _take(left, need, size)
            taken.append(part)
        axes.append(merged(taken))
    if any(factor.size.number != 1 for factor in left):
        raise NotFollowed("reshapes to fewer elements than there are")
    return tuple(axes)


def _take(left: list[Factor], need: Size, whole: Size) -> tuple[Factor, Size]:
    """Return the next part of an axis, and the size of the rest of the axis."""
    factor = left[0]
    rest = need.over(factor.size)
    if rest is not None:
        left.pop(0)
        return factor, rest
    more = None if factor.varies else factor.size.over(need)
    if more is not None:
        left[0] = replace(factor, size=more)
        return Factor(need), ONE
    part = "the padded axis" if factor.varies else f"an axis of {factor.size}"
    raise NotFollowed(f"a reshape to {whole} positions splits {part}")


def _written(axis: Axis) -> str:
    return " x ".join(str(factor.size) for factor in axis)
