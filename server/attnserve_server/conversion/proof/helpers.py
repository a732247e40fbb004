"""Helpers that the rules of the proof share: read a node's inputs and attributes, and combine values.

Helpers that need a fact that is not known raise `NotFollowed` with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from attnserve_server.conversion.proof.intervals import NAN, Interval, interval_of, number
from attnserve_server.conversion.proof.layout import Layout, NotFollowed, Places, broadcast, plain, size_of
from attnserve_server.conversion.proof.sizes import Size
from attnserve_server.conversion.proof.values import Cause, Entry, Region, Standing, Value, worst
from attnserve_server.domain.values import Array

MOST_SIZES: Final = 64
"""The number of elements up to which each element of an integer constant is followed as a size."""


def constant(array: Array) -> Value:
    """Return the value of a constant."""
    layout = tuple(plain(Size.of(extent)) for extent in array.shape)
    sizes = None
    if array.dtype.kind in "biu" and array.size <= MOST_SIZES:
        sizes = tuple(Size.of(int(number)) for number in array.reshape(-1))
    span = interval_of(array)
    return Value(layout, span=span, lit=span, constant=array, sizes=sizes)


def required(inputs: Sequence[Value | None], at: int) -> Value:
    """Return a required input. Raise NotFollowed where it is omitted."""
    found = inputs[at] if at < len(inputs) else None
    if found is None:
        raise NotFollowed(f"input {at} is omitted")
    return found


def optional(inputs: Sequence[Value | None], at: int) -> Value | None:
    """Return an optional input, or None where it is omitted."""
    return inputs[at] if at < len(inputs) else None


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Return an attribute's value, or the default."""
    found = node.attributes.get(name)
    if found is None:
        return default
    value = found.value
    return list(value) if isinstance(value, (tuple, list)) else value


def numbers(value: Value | None) -> list[int] | None:
    """Return the integers of a constant, or of constant sizes. None where one is not known."""
    if value is None or value.sizes is None:
        return None
    found = [None if size is None else size.number for size in value.sizes]
    return None if any(number is None for number in found) else [int(number or 0) for number in found]


def sizes_of(value: Value | None) -> list[Size]:
    """Return the sizes that a value holds. Raise NotFollowed where one is not known."""
    if value is not None and value.sizes is not None and all(size is not None for size in value.sizes):
        return [size for size in value.sizes if size is not None]
    only = value.span.only if value is not None else None
    if value is None or only is None or not float(only).is_integer() or value.layout is None or len(value.layout) > 1:
        raise NotFollowed("the proof cannot follow a computed shape")
    count = size_of(value.layout[0]).number if value.layout else 1
    if count is None or value.symbols:
        raise NotFollowed("the proof cannot follow a computed shape")
    return [Size.of(int(only))] * count


def aligned(values: Sequence[Value]) -> tuple[Layout, list[tuple[Value, Places]]]:
    """Return the broadcast layout, and each value with the places of its varying factors in it."""
    if any(value.layout is None for value in values):
        raise NotFollowed("the axes of an operand are not known")
    layout, places = broadcast([value.axes for value in values])
    return layout, list(zip(values, places, strict=True))


def entry_at(value: Value, places: Places, region: Region) -> Entry:
    """Return what holds of a broadcast operand in a region of the result."""
    kind, one, other = region
    back = {there: here for here, there in places.items()}
    if one in back and other in back:
        found = value.regions.get((kind, back[one], back[other]))
        if found is not None:
            return found
    return Entry(value.span, lit=value.lit)


def regions_over(operands: Sequence[tuple[Value, Places]]) -> set[Region]:
    """Return all regions of a result that any operand has facts about."""
    return {
        (kind, places[one], places[other])
        for value, places in operands
        for kind, one, other in value.regions
        if one in places and other in places
    }


def joined(values: Sequence[Value]) -> tuple[Standing, Cause | None]:
    """Return the worst standing of several values, and its cause."""
    return worst(list(values))


def wild_anywhere(value: Value) -> int:
    """Return the infinities and NaN that a value may hold in any region, as bits."""
    bits = value.span.wild
    for entry in value.regions.values():
        bits |= entry.interval.wild
    return bits


def sizes_value(like: Value, sizes: Sequence[Size | None]) -> Value:
    """Return integers computed from sizes, on the axes of another value."""
    bounds = [size.bounds() for size in sizes if size is not None]
    span = Interval()
    if len(bounds) == len(sizes) and bounds:
        span = Interval(min(low for low, _ in bounds), max(high for _, high in bounds))
    return Value(like.layout, span=span, lit=span, sizes=tuple(sizes), floating=like.floating)


def whole_type(node: ir.Node, operands: Sequence[Value]) -> np.dtype[np.generic] | None:
    """Return the integer type that a node computes in, if an input or a constant shows it."""
    types = [value.dtype.numpy() for value in node.inputs if value is not None and value.dtype is not None]
    types += [value.constant.dtype for value in operands if value.constant is not None]
    return next((kind for kind in types if kind.kind in "iu"), None)


def number_value(value: float) -> Value:
    """Return the value of a scalar."""
    return Value((), span=number(value), lit=number(value))


def without_nan(value: Value) -> Value:
    """Return the value without NaN."""

    def without(interval: Interval) -> Interval:
        return replace(interval, wild=interval.wild & ~NAN)

    regions = {
        region: replace(entry, interval=without(entry.interval), lit=without(entry.lit))
        for region, entry in value.regions.items()
    }
    return replace(value, span=without(value.span), lit=without(value.lit), regions=regions)
