"""Units, the rows and columns of a map: merge positions into words, pool them along derived axes, select rows.

The input is the units of each axis of one sequence. A selection that its units cannot satisfy is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attnserve_server.attention.resolve import from_end
from attnserve_server.domain.errors import AttentionUnavailable, Violations
from attnserve_server.domain.values import AttentionUnit, AxisUnits, EffectiveSelection, SpecialTokens
from attnserve_server.model.manifest import DerivedLength, SiteSpec

Indices = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class AxisPlan:
    """One axis of one sequence after merging: U units over N positions.

    Args:
        merged: the U units.
        starts: first position of each unit, (U,); None: every position is a unit.
        positions: N.
        rows: the units selected as queries; None: all of them, in order.
        columns: the units selected as keys; None: all of them, in order.
    """

    merged: AxisUnits
    starts: Indices | None
    positions: int
    rows: Indices | None
    columns: Indices | None

    @property
    def row_count(self) -> int:
        """Number of units selected as queries."""
        return self.merged.length if self.rows is None else len(self.rows)

    @property
    def column_count(self) -> int:
        """Number of units selected as keys."""
        return self.merged.length if self.columns is None else len(self.columns)

    def sizes(self) -> Indices:
        """Number of positions of each unit, (U,)."""
        if self.starts is None:
            return np.ones(self.merged.length, dtype=np.intp)
        return np.diff(self.starts, append=self.positions)

    def row_positions(self) -> Indices | None:
        """Positions of the selected rows, unit after unit; None: all, in order."""
        if self.rows is None or self.starts is None:
            return self.rows
        sizes = self.sizes()[self.rows]
        firsts = np.repeat(self.starts[self.rows], sizes)
        return firsts + np.arange(len(firsts)) - np.repeat(np.cumsum(sizes) - sizes, sizes)

    def row_sizes(self) -> Indices | None:
        """Number of positions of each selected row; None if each row is one position."""
        if self.starts is None:
            return None
        sizes = self.sizes()
        return sizes if self.rows is None else sizes[self.rows]


def plan_axis(effective: EffectiveSelection, units: AxisUnits) -> AxisPlan:
    """Merge the positions of one axis, and find the selected units. `check_units` must have passed."""
    merged, starts = merge_words(units) if effective.unit is AttentionUnit.WORD else (units, None)
    plain = None
    if effective.special_tokens is SpecialTokens.DROP:
        plain = _unless_all(np.flatnonzero(~np.array(merged.special, dtype=bool)), merged.length)
    rows = plain
    if effective.queries:
        asked = np.array(effective.queries, dtype=np.intp)
        rows = _unless_all(np.where(asked < 0, asked + merged.length, asked), merged.length)
    return AxisPlan(merged, starts, units.length, rows, plain)


def plan_axes(
    effective: EffectiveSelection, sites: Sequence[SiteSpec], units: Mapping[str, AxisUnits]
) -> dict[str, AxisPlan]:
    """Return a plan for every axis of a chosen site, in the order of first use.

    The rows of an axis that no chosen site queries along have no meaning, because `queries` are indices into query
    axes.
    """
    return {axis: plan_axis(effective, units[axis]) for axis in _axes(effective, sites)}


def merge_words(units: AxisUnits) -> tuple[AxisUnits, Indices | None]:
    """Merge the pieces of each word. A special token, or a position without a word, stays a unit.

    Pieces of a word are adjacent, so a unit is a run of positions with one word id.

    Args:
        units: N positions, with `word_ids`.

    Returns:
        The U units, and the first position of each, (U,); None if no unit has two positions.
    """
    ids = np.array(units.word_ids, dtype=np.intp)
    begins = np.ones(len(ids), dtype=bool)
    begins[1:] = (ids[1:] != ids[:-1]) | (ids[1:] < 0)
    starts = np.flatnonzero(begins)
    firsts = starts.tolist()
    words = [units.word_ids[first] for first in firsts]
    # Without words, no text or span of a word can be missing.
    wordless = max(words, default=-1) < 0

    def spans(of_position: tuple[int, ...], part: int) -> tuple[int, ...]:
        if not of_position or not (units.word_spans or wordless):
            return ()
        return tuple(
            of_position[first] if word < 0 else units.word_spans[word][part]
            for first, word in zip(firsts, words, strict=True)
        )

    texts: tuple[str, ...] = ()
    if units.texts and (units.words or wordless):
        texts = tuple(
            units.texts[first] if word < 0 else units.words[word] for first, word in zip(firsts, words, strict=True)
        )
    merged = AxisUnits(
        axis=units.axis,
        length=len(firsts),
        texts=texts,
        starts=spans(units.starts, 1),
        ends=spans(units.ends, 2),
        special=tuple(units.special[first] for first in firsts) if units.special else (),
        segments=spans(units.segments, 0),
        # An axis of patches has no words, so none of them were merged.
        grid=units.grid,
        leading=units.leading,
    )
    return merged, starts if len(starts) < len(ids) else None


def pooled_units(axis: str, source: AxisUnits, derived: DerivedLength) -> AxisUnits:
    """Return the units of a derived axis.

    Position j represents the source's positions from j * stride to (j + 1) * stride, exclusive. Its text is theirs,
    joined by spaces; its span is from the start of the first to the end of the last that has a span. It is special if
    all of them are. It may hold parts of two words, so merging words leaves it a unit.

    Args:
        axis: symbol of the derived axis.
        source: the units of the source axis, before merging.
        derived: the relation between the lengths. If its windows do not start at the source's first position, the
            positions cannot be matched, and the units have no texts.
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


def continued_units(axis: str, new: AxisUnits, past: int, labels: Sequence[str] = ()) -> AxisUnits:
    """Return the units of the keys of a sequence with a past: its past positions, then the new ones.

    A past position has no span and no word, is no special token, and stays a unit when words are merged.

    Args:
        axis: symbol of the axis of all positions.
        new: the units of the new positions, before merging.
        past: number of past positions, P.
        labels: their texts, (P,); empty: `past[0]` to `past[P-1]`. New positions without texts get their numbers.
    """

    def behind(past_value: int, values: tuple[int, ...]) -> tuple[int, ...]:
        return (past_value,) * past + values if values else ()

    texts = tuple(labels) or tuple(f"past[{position}]" for position in range(past))
    return AxisUnits(
        axis=axis,
        length=past + new.length,
        texts=texts + (new.texts or tuple(map(str, range(new.length)))),
        starts=behind(0, new.starts),
        ends=behind(0, new.ends),
        special=(False,) * past + new.special if new.special else (),
        segments=behind(0, new.segments),
        word_ids=behind(-1, new.word_ids),
        words=new.words,
        word_spans=new.word_spans,
    )


def check_units(
    effective: EffectiveSelection,
    sites: Sequence[SiteSpec],
    units: Mapping[str, AxisUnits],
    model: str,
    sequence: int,
) -> None:
    """Check a resolved selection against one sequence's lengths and tokens.

    Args:
        effective: the resolved selection.
        sites: the model's sites.
        units: the units of every axis of a chosen site.
        model: the model's name, for messages.
        sequence: index of the sequence in the request, for messages.

    Raises:
        AttentionUnavailable: the selection needs words or special tokens along an axis that has none.
        InvalidRequest: with every query that is out of range or repeats a row.
    """
    for axis in _axes(effective, sites):
        if effective.unit is AttentionUnit.WORD and not units[axis].word_ids:
            raise AttentionUnavailable(model, f"the words along axis {axis!r} of sequence {sequence} are not known")
        if effective.special_tokens is SpecialTokens.DROP and not units[axis].special:
            raise AttentionUnavailable(
                model, f"the special tokens along axis {axis!r} of sequence {sequence} are not known"
            )
    if not effective.queries:
        return
    violations = Violations()
    for axis in dict.fromkeys(sites[layer].query_axis for layer in effective.layers):
        merged = merge_words(units[axis])[0] if effective.unit is AttentionUnit.WORD else units[axis]
        _check_queries(effective.queries, merged, effective.unit, sequence, violations)
    violations.raise_any()


def _check_queries(
    queries: tuple[int, ...], merged: AxisUnits, unit: AttentionUnit, sequence: int, violations: Violations
) -> None:
    seen: dict[int, int] = {}
    where = f"of sequence {sequence} along axis {merged.axis!r}"
    for position, query in enumerate(queries):
        if violations.full:
            break
        field = f"attention.queries[{position}]"
        row = from_end(query, merged.length)
        if row is None:
            limit = f"it has {merged.length} {unit}s: -{merged.length} to {merged.length - 1}"
            violations.add_once(field, f"query {query} is out of range {where}; {limit}")
        elif row in seen:
            violations.add_once(field, f"query {query} is the same row {where} as query {seen[row]}")
        else:
            seen[row] = query


def _axes(effective: EffectiveSelection, sites: Sequence[SiteSpec]) -> tuple[str, ...]:
    chosen = [sites[layer] for layer in effective.layers]
    return tuple(dict.fromkeys(axis for site in chosen for axis in (site.query_axis, site.key_axis)))


def _unless_all(indices: Indices, length: int) -> Indices | None:
    """Return the indices, or None if they are 0 to length - 1 in order."""
    return None if np.array_equal(indices, np.arange(length)) else indices


def _placed(members: range, source: AxisUnits) -> list[int]:
    """Return the members from which a pooled unit takes its span.

    These are the members that are no special tokens, or all if every member is special. If they belong to two texts,
    only those of the first member's text are returned.
    """
    plain = [at for at in members if not (source.special and source.special[at])] or list(members)
    if not source.segments:
        return plain
    return [at for at in plain if source.segments[at] == source.segments[plain[0]]]
