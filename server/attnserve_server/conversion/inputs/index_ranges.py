"""Find the numbers that an input may hold: those for which every table lookup of the graph has a row.

following.py finds the lookups; this module evaluates their formulas for all numbers that are near the tables' rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx

from attnserve_server.conversion.inputs.carried import Element
from attnserve_server.conversion.inputs.following import Walk
from attnserve_server.conversion.inputs.formulas import MOST_REACH
from attnserve_server.conversion.inputs.lookups import Lookup
from attnserve_server.model.specs import IndexRange

_MOST_RANGES: Final = 8
"""The most ranges of one input."""
_Runs = tuple[tuple[int, int], ...]
"""Legal numbers as (least, greatest), ascending."""


@dataclass(frozen=True, slots=True)
class IndexRanges:
    """Ranges by the name of the input. `lost`: inputs that look rows up, and whose ranges are not known."""

    of: Mapping[str, tuple[IndexRange, ...]]
    lost: frozenset[str]


def index_ranges_of(graph: onnx.GraphProto, inputs: Mapping[str, np.dtype[np.generic]]) -> IndexRanges:
    """Return the ranges of inputs that lookups bound.

    Follows each input through operators that keep its numbers whole: moves, offsets, clips, selections, casts. Columns
    of a last axis of fixed size may look up different tables; each column then has its own range.

    Args:
        graph: with inferred shapes.
        inputs: the types of the inputs to follow, by name. A name that the graph has no input of raises KeyError.
    """
    walk = Walk.of(graph, inputs)
    symbols = _sequence_symbols(graph)
    columns = {value.name: _columns_of(value) for value in graph.input}
    found: dict[str, tuple[IndexRange, ...]] = {}
    lost = set(walk.lost)
    for name, dtype in inputs.items():
        needs = [(element, lookup) for element, lookup in walk.needs if element.input == name]
        fixed = [(element, lookup) for element, lookup in needs if isinstance(lookup.rows, int)]
        ranges = _ranges(fixed, dtype, columns[name])
        if ranges is None or len(fixed) < len(needs):
            along = None if fixed else _along(needs, symbols)
            ranges, lost = (along or ranges), (lost if along else lost | {name})
        if ranges:
            found[name] = ranges
    return IndexRanges(found, frozenset(lost))


def _sequence_symbols(graph: onnx.GraphProto) -> frozenset[str]:
    """Return the symbols of the axes of inputs, except those of the batch."""
    axes = [value.type.tensor_type.shape.dim for value in graph.input]
    named = {axis.dim_param for each in axes for axis in each[1:] if axis.dim_param}
    return frozenset(named - {each[0].dim_param for each in axes if each})


def _along(needs: Sequence[tuple[Element, Lookup]], symbols: frozenset[str]) -> tuple[IndexRange, ...] | None:
    """Return the range of an input that holds positions along one axis, plus a constant; None for any other."""
    tried = np.arange(-8.0, 9.0)
    known: set[tuple[int | str, float]] = set()
    for element, lookup in needs:
        moved = np.unique(element.formula(tried) - tried)
        if len(moved) > 1 or lookup.rows not in symbols or not lookup.from_end:
            return None
        known.add((lookup.rows, float(moved[0])))
    if len(known) != 1:
        return None
    [(symbol, offset)] = known
    return (IndexRange(least=-int(offset), greatest=-int(offset) - 1, along=str(symbol)),)


def _columns_of(value: onnx.ValueInfoProto) -> int:
    axes = value.type.tensor_type.shape.dim
    return int(axes[-1].dim_value) if axes else 0


def _ranges(
    needs: Sequence[tuple[Element, Lookup]], dtype: np.dtype[np.generic], columns: int
) -> tuple[IndexRange, ...] | None:
    """Return the ranges that meet all needs; empty where every number does, None where they are not known."""
    by_column: dict[int | None, list[tuple[Element, Lookup]]] = {}
    for element, lookup in needs:
        by_column.setdefault(element.column, []).append((element, lookup))
    runs: dict[int | None, _Runs] = {}
    for column, each in by_column.items():
        legal = _legal(each, dtype)
        if legal is None:
            return None
        runs[column] = legal
    if len(runs) == columns and len(set(runs.values())) == 1:
        runs = {None: next(iter(runs.values()))}
    return tuple(
        IndexRange(least=least, greatest=greatest, column=column)
        for column, each in runs.items()
        for least, greatest in each
    )


def _legal(needs: Sequence[tuple[Element, Lookup]], dtype: np.dtype[np.generic]) -> _Runs | None:
    """Return the runs of numbers for which every lookup has a row, by evaluating all numbers that are near its rows.

    Empty where all numbers of the type are legal; None where none is, or there are too many runs or numbers.
    """
    rows_of = [int(lookup.rows) for _, lookup in needs]
    reach = int(max(element.formula.reach + rows for (element, _), rows in zip(needs, rows_of, strict=True))) + 2
    if reach > MOST_REACH:
        return None
    kind = np.iinfo(dtype.name if dtype.kind in "iu" else "int64")
    numbers = np.arange(max(-reach, kind.min), min(reach, kind.max) + 1, dtype=np.float64)
    legal = np.ones(len(numbers), dtype=bool)
    for (element, lookup), count in zip(needs, rows_of, strict=True):
        rows = element.formula(numbers)
        legal &= (rows >= (-count if lookup.from_end else 0)) & (rows < count)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], legal, [False]]).astype(np.int8)))
    runs = [(int(numbers[start]), int(numbers[end - 1])) for start, end in edges.reshape(-1, 2)]
    if not 1 <= len(runs) <= _MOST_RANGES:
        return None
    # The first and the last number are beyond all rows and constants, so the same holds for all numbers past them.
    first, last, least, greatest = numbers[0], numbers[-1], int(kind.min), int(kind.max)
    widened = tuple((least if a == first else a, greatest if b == last else b) for a, b in runs)
    return () if widened == ((least, greatest),) else widened
