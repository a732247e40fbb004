"""What the positions of a derived axis stand for: each for several of its source's, side by side."""

from __future__ import annotations

from attnserve_server.domain.values import AxisUnits
from attnserve_server.model.manifest import DerivedLength


def pooled_units(axis: str, source: AxisUnits, derived: DerivedLength) -> AxisUnits:
    """The units of a derived axis.

    Position j stands for the source's positions from j * stride to before (j + 1) * stride: their texts joined by
    spaces, from the start of the first to the end of the last that has a place in the text. It is special where all of
    them are. A position may hold parts of two words, so where words are asked for it stays a unit of its own.

    Args:
        axis: its symbol.
        source: the units of the axis that it is derived from, unmerged.
        derived: its form. Where its windows do not start with the source, as behind a token of its own, nothing tells
            what its positions stand for, and they have no texts.
    """
    length = derived.of(source.length)
    if not 0 <= derived.offset < derived.stride:
        return AxisUnits(axis=axis, length=length)
    members = [
        range(first, min(first + derived.stride, source.length))
        for first in range(0, length * derived.stride, derived.stride)
    ]

    def spans(of_position: tuple[int, ...], at: int) -> tuple[int, ...]:
        return tuple(of_position[_placed(each, source)[at]] for each in members) if of_position else ()

    return AxisUnits(
        axis=axis,
        length=length,
        texts=tuple(" ".join(source.texts[at] for at in each) for each in members) if source.texts else (),
        starts=spans(source.starts, 0),
        ends=spans(source.ends, -1),
        special=tuple(all(source.special[at] for at in each) for each in members) if source.special else (),
        segments=spans(source.segments, 0),
        word_ids=(-1,) * length if source.word_ids else (),
    )


def _placed(members: range, source: AxisUnits) -> list[int]:
    """The members that stand somewhere in one text: special tokens do not, and of two texts the first counts."""
    plain = [at for at in members if not (source.special and source.special[at])] or list(members)
    if not source.segments:
        return plain
    return [at for at in plain if source.segments[at] == source.segments[plain[0]]]
