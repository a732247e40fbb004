"""What the rows and columns of a map stand for: positions merged into units, and which of the units are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from attnserve_server.attention.resolve import from_end
from attnserve_server.domain.errors import AttentionUnavailable, Violations
from attnserve_server.domain.selection import AttentionUnit, EffectiveSelection, SpecialTokens
from attnserve_server.domain.values import AxisUnits
from attnserve_server.model.manifest import SiteSpec

Indices = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True, eq=False)
class AxisPlan:
    """One axis of one sequence after merging, U units over N positions.

    `starts` (U,) is the first position of each unit, or None where every position is a unit of its own. `rows` and
    `columns` are the units asked for as queries and as keys; None: all of them, in order.
    """

    merged: AxisUnits
    starts: Indices | None
    positions: int
    rows: Indices | None
    columns: Indices | None

    @property
    def row_count(self) -> int:
        """How many units are asked for as queries."""
        return self.merged.length if self.rows is None else len(self.rows)

    @property
    def column_count(self) -> int:
        """How many units are asked for as keys."""
        return self.merged.length if self.columns is None else len(self.columns)

    def sizes(self) -> Indices:
        """How many positions each unit has, (U,)."""
        if self.starts is None:
            return np.ones(self.merged.length, dtype=np.intp)
        return np.diff(self.starts, append=self.positions)

    def row_positions(self) -> Indices | None:
        """The positions that the asked rows are made of, unit after unit; None: all, in order."""
        if self.rows is None or self.starts is None:
            return self.rows
        sizes = self.sizes()[self.rows]
        firsts = np.repeat(self.starts[self.rows], sizes)
        return firsts + np.arange(len(firsts)) - np.repeat(np.cumsum(sizes) - sizes, sizes)

    def row_sizes(self) -> Indices | None:
        """How many positions each asked row is the mean of; None where each is one position."""
        if self.starts is None:
            return None
        sizes = self.sizes()
        return sizes if self.rows is None else sizes[self.rows]


def plan_axis(effective: EffectiveSelection, units: AxisUnits) -> AxisPlan:
    """Merge an axis as the selection asks, and find the units asked for. The selection must have been checked."""
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
    """A plan for every axis that a chosen site names, in the order in which they are first named.

    The rows of an axis that is only ever a key axis mean nothing: queries are indices into query axes.
    """
    return {axis: plan_axis(effective, units[axis]) for axis in _axes(effective, sites)}


def merge_words(units: AxisUnits) -> tuple[AxisUnits, Indices | None]:
    """Merge the pieces of each word; special tokens and positions without a word stay units of their own.

    Pieces of a word stand side by side, so a unit is a run of positions with one word id.

    Args:
        units: N positions, with `word_ids`.

    Returns:
        The U units, and the first position of each, (U,); None where no unit has two positions.
    """
    ids = np.array(units.word_ids, dtype=np.intp)
    begins = np.ones(len(ids), dtype=bool)
    begins[1:] = (ids[1:] != ids[:-1]) | (ids[1:] < 0)
    starts = np.flatnonzero(begins)
    firsts = starts.tolist()
    words = [units.word_ids[first] for first in firsts]
    # Where there is no word there is none whose text or place could be unknown.
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
        # Patches are no words, so that none of them were merged.
        grid=units.grid,
        leading=units.leading,
    )
    return merged, starts if len(starts) < len(ids) else None


def check_units(
    effective: EffectiveSelection,
    sites: Sequence[SiteSpec],
    units: Mapping[str, AxisUnits],
    model: str,
    sequence: int,
) -> None:
    """Check what could not be checked before the sequence's lengths and tokens were known.

    Args:
        effective: the resolved selection.
        sites: the model's sites.
        units: the units of every axis that a chosen site names.
        model: the model's name, for messages.
        sequence: position of the sequence in the request, for messages.

    Raises:
        AttentionUnavailable: words are asked of an axis whose words are not known, or special tokens are to be dropped
            from one whose special tokens are not known.
        InvalidRequest: with every query that is out of range, or names a row that another names too.
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
    """None where the indices are all of them, in order."""
    return None if np.array_equal(indices, np.arange(length)) else indices
