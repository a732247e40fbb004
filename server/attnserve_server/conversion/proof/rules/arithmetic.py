"""Exact arithmetic of sizes and positions, which elementwise operators try first. Other numbers have intervals only.

The functions return None where no operand holds sizes or positions. The caller then computes intervals.

The proof compares a sequence alone with the same sequence in a batch (or padded); a varying axis differs in length
between the two, and `NotFollowed` becomes the verdict unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from attnserve_server.conversion.proof.context import Context
from attnserve_server.conversion.proof.functions import BINARY
from attnserve_server.conversion.proof.helpers import MOST_SIZES, aligned, numbers
from attnserve_server.conversion.proof.intervals import BOOLEAN, Interval, number
from attnserve_server.conversion.proof.layout import NotFollowed
from attnserve_server.conversion.proof.positions import index_value
from attnserve_server.conversion.proof.rules.pointwise import pointwise
from attnserve_server.conversion.proof.rules.sized import of_sizes, sizes_array
from attnserve_server.conversion.proof.sizes import Size, floor_div, greater, lesser, modulo
from attnserve_server.conversion.proof.values import Standing, Value

COMPARISONS: Final = {"Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"}


def whole_number(value: int) -> Value:
    """Return a scalar that counts as a size."""
    return Value((), span=number(value), lit=number(value), sizes=(Size.of(value),))


def repeated(sizes: Sequence[Size | None] | None, count: int) -> list[Size | None]:
    """Return sizes broadcast to a count."""
    found = list(sizes or ())
    return found * count if len(found) == 1 else found


def arithmetic(ctx: Context, op: str, operands: Sequence[Value]) -> Value | None:
    """Return the result of arithmetic with sizes or positions, or None where the operands hold neither."""
    if len(operands) < 2 or any(value.layout is None for value in operands):
        return None
    if all(value.sizes is not None for value in operands):
        return _of_arrays(ctx, op, operands)
    if all(value.sizes is not None or value.symbols for value in operands):
        return _lost(op, operands)
    return _positions(ctx, op, operands) if len(operands) == 2 else None


def _of_arrays(ctx: Context, op: str, operands: Sequence[Value]) -> Value | None:
    arrays = [array for array in map(sizes_array, operands) if array is not None]
    if len(arrays) != len(operands):
        return None
    wide = np.broadcast_arrays(*arrays)
    if wide[0].size > MOST_SIZES:
        return None
    floating = any(value.floating for value in operands)
    flat = [array.reshape(-1) for array in wide]
    sizes = [_of_sizes(ctx, op, each, floating=floating) for each in zip(*flat, strict=True)]
    if all(size is not None for size in sizes):
        return of_sizes(sizes, wide[0].shape, floating=floating)
    return _lost(op, operands) if any(value.dependence for value in operands) else None


def _lost(op: str, operands: Sequence[Value]) -> Value:
    """Return a number computed from sizes that is no polynomial.

    As a shape it is not supported; as data it depends on them.
    """
    layout, _ = aligned(operands)
    span = BOOLEAN if op in COMPARISONS else Interval()
    return Value(layout, span=span, lit=span, symbols=frozenset().union(*(value.dependence for value in operands)))


def _of_sizes(ctx: Context, op: str, each: Sequence[Size | None], *, floating: bool) -> Size | None:
    known = [size for size in each if size is not None]
    if len(known) != len(each):
        return None
    if op in {"Add", "Sum", "Mul", "Min", "Max"}:
        fold = {"Mul": lambda one, other: one * other, "Min": lesser, "Max": greater}.get(
            op, lambda one, other: one + other
        )
        result = known[0]
        for other in known[1:]:
            result = fold(result, other)
        return result
    one, other = known[0], known[1]
    if op == "Sub":
        return one - other
    if op in {"Div", "Mod"}:
        return _divided(op, one, other, floating=floating)
    if op in COMPARISONS:
        return _compared_sizes(ctx, op, one, other)
    if op in {"And", "Or"} and one.number is not None and other.number is not None:
        truths = (bool(one.number), bool(other.number))
        return Size.of(int(all(truths) if op == "And" else any(truths)))
    return None


def _divided(op: str, one: Size, other: Size, *, floating: bool) -> Size | None:
    if other.bounds()[0] < 1:
        return None
    if op == "Mod":
        return modulo(one, other)
    if floating or one.bounds()[0] < 0:
        return one.over(other)
    return floor_div(one, other)


def _compared_sizes(ctx: Context, op: str, one: Size, other: Size) -> Size | None:
    difference = (one - other).bounds()
    for size, against in ((one, other), (other, one)):
        if ctx.depends(size) and against.number is not None and against.number > 0:
            ctx.thresholds.add(against.number)
    found = BINARY[op](Interval(*difference), number(0)).only
    return None if found is None else Size.of(int(found))


def _positions(ctx: Context, op: str, operands: Sequence[Value]) -> Value | None:
    """Return sums and differences of positions, and their products with sizes."""
    if op not in {"Add", "Sub", "Mul"} or any(value.standing is not Standing.EQUAL for value in operands):
        return None
    if all(value.index is None and value.below is None for value in operands):
        return None
    layout, placed = aligned(operands)
    places = [_place(value, there) for value, there in placed]
    if places[0] is None or places[1] is None:
        return None
    found = _scaled_place(places[0], places[1]) if op == "Mul" else _summed_places(places[0], places[1], op)
    if found is None or (not found.index and found.outer is None and found.below is None and not found.plain):
        return None
    whole = index_value(ctx, layout, found.index, found.offset, outer=found.outer, below=found.below)
    return replace(whole, valid=found.valid) if found.valid else whole


@dataclass(frozen=True)
class _Place:
    """An index: positions along factors, an offset, multiples of `outer`, and a plain number below `below`."""

    index: dict[int, Size]
    offset: Size
    outer: Size | None = None
    below: Size | None = None
    plain: bool = False
    valid: bool = False


def _place(value: Value, places: Mapping[int, int]) -> _Place | None:
    if value.index is not None:
        index = {places[at]: by for at, by in value.index.items()}
        return _Place(index, value.offset or Size.of(0), value.outer, value.below)
    if value.below is not None:
        return _Place({}, Size.of(0), below=value.below, valid=value.valid)
    if value.offset is not None:
        return _Place({}, value.offset, plain=True)
    if value.sizes is not None and len(value.sizes) == 1 and value.sizes[0] is not None:
        return _Place({}, value.sizes[0], plain=True)
    return None


def _scaled_place(one: _Place, other: _Place) -> _Place | None:
    if one.plain:
        one, other = other, one
    if not other.plain or one.outer is not None:
        return None
    by = other.offset
    index = {at: times * by for at, times in one.index.items()}
    # A plain number times a size is a multiple of it.
    return _Place(index, one.offset * by, outer=by if one.below is not None else None, plain=one.plain)


def _summed_places(one: _Place, other: _Place, op: str) -> _Place | None:
    if (one.outer and other.outer) or (one.below and other.below):
        return None
    if op == "Sub" and (other.outer is not None or other.below is not None):
        return None
    sign = Size.of(1 if op != "Sub" else -1)
    zero = Size.of(0)
    index = {at: one.index.get(at, zero) + sign * other.index.get(at, zero) for at in {*one.index, *other.index}}
    offset = one.offset + sign * other.offset
    plain = one.plain and other.plain
    valid = (one.valid or other.valid) and offset.number == 0 and not index
    return _Place(index, offset, one.outer or other.outer, one.below or other.below, plain, valid)


def distance(ctx: Context, queries: Value, keys: Value) -> Value:
    """Return the distance of each query from each key, in positions. Raise NotFollowed where it is not known."""
    found = _positions(ctx, "Sub", [queries, keys])
    if found is None:
        raise NotFollowed("positions of queries and keys cannot be compared")
    return found


def compared(ctx: Context, op: str, operands: Sequence[Value]) -> Value | None:
    """Return a comparison of positions with positions or with a size. None for other operands."""
    if all(value.index is None for value in operands):
        return None
    if any(value.outer is not None or value.below is not None for value in operands):
        return None
    difference = _positions(ctx, "Sub", operands)
    if difference is None:
        return None
    by = numbers(operands[1]) or numbers(operands[0])
    if by and len(by) == 1 and by[0] > 1:
        ctx.thresholds.add(by[0])
    zero = Value((), span=number(0), lit=number(0))
    return pointwise(ctx, BINARY[op], [difference, zero], op=op)
