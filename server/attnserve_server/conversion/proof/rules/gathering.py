"""The rules of operators that take elements by index: tables, rows, positions.

Along a plain axis, equal indices give equal elements. Along the varying axis, an index must be known to point at the
sequence's own positions. An index that points at others makes the result different, an index of unknown places
unknown. Indices of sizes that are not constant, and axes that are not known, raise `NotFollowed`.

In the proof, a varying axis differs in length between a sequence alone and in a batch (or padded); a rule returns
whether its result is equal in both. `NotFollowed` becomes the verdict unknown.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from attnserve_server.conversion.proof.context import Context, rule
from attnserve_server.conversion.proof.helpers import (
    attribute,
    constant,
    joined,
    numbers,
    required,
    sizes_value,
    wild_anywhere,
)
from attnserve_server.conversion.proof.intervals import Interval
from attnserve_server.conversion.proof.layout import NotFollowed, Places, is_plain, ordinals, size_of, varying
from attnserve_server.conversion.proof.rules.slicing import sliced
from attnserve_server.conversion.proof.rules.taps import rows_of_items
from attnserve_server.conversion.proof.sizes import ONE, Size
from attnserve_server.conversion.proof.values import Entry, Standing, Value


@rule("Gather")
def gather(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return slices of a tensor along one axis, by index."""
    data, index = required(inputs, 0), required(inputs, 1)
    axis = attribute(node, "axis", 0)
    axis = axis + len(data.axes) if axis < 0 else axis
    if data.sizes is not None and index.sizes is not None and len(data.axes) == 1:
        return _of_sizes(data, index)
    if index.items:
        return rows_of_items(ctx, data, index, axis)
    if is_plain(data.axes[axis]):
        return from_table(ctx, ctx.as_data(data), index, axis)
    return _of_varying(ctx, data, index, axis)


def _of_sizes(data: Value, index: Value) -> Value:
    places = numbers(index)
    if places is None:
        raise NotFollowed("takes a size at a place that is not known")
    sizes = data.sizes or ()
    return sizes_value(Value(index.layout, floating=data.floating), [sizes[at] for at in places])


def from_table(ctx: Context, data: Value, index: Value, axis: int) -> Value:
    """Return elements of an axis that is the same in both runs, where equal indices give equal elements."""
    index = ctx.as_data(index)
    if index.layout is None:
        raise NotFollowed("the axes of an index are not known")
    layout = (*data.axes[:axis], *index.axes, *data.axes[axis + 1 :])
    own = len(varying(data.axes[:axis]))
    more = len(varying(index.axes))
    data_places = {at: at if at < own else at + more for at in range(len(varying(data.axes)))}
    result = data.moved(layout, data_places)
    regions = dict(result.regions)
    for place in range(more):
        regions["pad", own + place, own + place] = Entry(Interval(data.span.low, data.span.high, data.span.wild))
    standing, cause = joined([data, index])
    found = replace(result.bare(), standing=standing, cause=cause, regions=regions)
    if size_of(data.axes[axis]).number != 1 or more:
        found = replace(found, lit=data.span, masks=frozenset(), structured=frozenset(), along=frozenset())
    if data.constant is not None and index.sizes is not None:
        places = numbers(index)
        if places is not None and not data.varies:
            shape = [size_of(a).number or 0 for a in index.axes]
            taken = np.take(data.constant, np.array(places, np.int64).reshape(shape), axis=axis)
            return replace(constant(taken), standing=standing, cause=cause)
    return _table_norm(ctx, data, found, axis)


def _table_norm(ctx: Context, data: Value, found: Value, axis: int) -> Value:
    if not ctx.bounds or data.constant is None or data.constant.dtype.kind != "f" or axis or data.constant.ndim != 2:
        return found
    key = id(data.constant)
    if key not in ctx.norms:
        wide = data.constant.astype(np.float64)
        ctx.norms[key] = (data.constant, float(np.sqrt((wide * wide).sum(-1)).max(initial=0.0)))
    return replace(found, norm=ctx.norms[key][1], norm_axis=len(found.axes) - 1)


def _of_varying(ctx: Context, data: Value, index: Value, axis: int) -> Value:
    """Return elements of the varying axis. The index must be known to stay within the sequence's own part."""
    folded = _within_fold(data, index, axis)
    if folded is not None:
        return _read_along(data, index, axis, folded[1])
    if ctx.is_batch:
        return _rows(ctx, data, index, axis)
    if _own_within_fold(data, index, axis):
        return _own_positions(ctx, data, replace(index, outer=None, below=None, index=None, offset=None), axis)
    places = numbers(index)
    if places is not None and not index.varies and len(places) == 1 and places[0] == 0:
        return _squeezed(sliced(ctx, data, axis, Size.of(0), ONE, 1), axis, index)
    if index.sizes is not None and any(ctx.depends(size) or (size and size.bounds()[1] < 0) for size in index.sizes):
        reason = f"takes a position counted from the end, where {ctx.others} are"
        return ctx.bad(Standing.DIFFERENT, reason)
    if is_identity(data, index, axis):
        return _along_index(data, index, axis)
    if (index.valid and index.outer is None) or index.count == 1:
        return _own_positions(ctx, data, index, axis)
    return ctx.unknown("takes positions at places that are not known to be the sequence's own")


def _rows(ctx: Context, data: Value, index: Value, axis: int) -> Value:
    if is_identity(data, index, axis):
        return _along_index(data, index, axis)
    return ctx.bad(Standing.DIFFERENT, "takes fixed rows of the batch, regardless of their sequence")


def is_identity(data: Value, index: Value, axis: int) -> bool:
    """Return whether an index counts the positions of the axis that it is applied to."""
    if index.counts != 1 or index.offset is None or index.offset.number != 0:
        return False
    (place,) = index.index or {}
    at, factor = varying(index.axes)[place]
    return data.axes[axis] == (factor,) and index.axes[at] == (factor,)


def _within_fold(data: Value, index: Value, axis: int) -> tuple[int, int] | None:
    """Find out whether an index into a folded axis of rows and positions stays in the same row or position.

    Returns:
        The varying factor of the axis, and the factor of the index that counts it. None where it does not stay.
    """
    parts = data.axes[axis]
    if len(parts) != 2 or not index.index or index.offset is None or index.offset.number != 0:
        return None
    outer, inner = parts
    counted = list(index.index.items())
    own = ordinals(data.axes, axis)
    if len(counted) != 1 or len(own) != 1:
        return None
    place, by = counted[0]
    if varying(index.axes)[place][1] != (outer if outer.varies else inner):
        return None
    if outer.varies:
        fits = by == inner.size and index.below == inner.size and index.outer is None
    else:
        fits = by.number == 1 and index.outer == inner.size and index.below is None
    return (own[0], place) if fits else None


def _own_within_fold(data: Value, index: Value, axis: int) -> bool:
    """Return whether an index into a folded axis of rows and positions points at one of the own positions."""
    parts = data.axes[axis]
    if len(parts) != 2 or not parts[1].varies or index.index or index.offset is None or index.offset.number != 0:
        return False
    return index.valid and index.outer == parts[1].size and index.below == parts[1].size


def _along_index(data: Value, index: Value, axis: int) -> Value:
    (place,) = index.index or {}
    return _read_along(data, index, axis, place)


def _read_along(data: Value, index: Value, axis: int, place: int) -> Value:
    """Return the elements along an axis, with its varying factor in the place of the index's."""
    layout = (*data.axes[:axis], *index.axes, *data.axes[axis + 1 :])
    before = len(varying(data.axes[:axis]))
    own, more = ordinals(data.axes, axis), len(varying(index.axes))
    places: Places = {}
    for at in range(len(varying(data.axes))):
        if at in own:
            places[at] = before + place
        else:
            places[at] = at if at < before else at - len(own) + more
    return replace(data.moved(layout, places), raw=data.raw)


def _squeezed(value: Value, axis: int, index: Value) -> Value:
    """Return the value with its axis of one position replaced by the index's own axes."""
    if value.layout is None:
        return value
    layout = (*value.axes[:axis], *index.axes, *value.axes[axis + 1 :])
    same = {place: place for place in range(len(varying(value.axes)))}
    shift = len(index.axes) - 1
    moved = value.moved(layout, same)
    return replace(moved, norm=value.norm, norm_axis=value.norm_axis + shift)


def _own_positions(ctx: Context, data: Value, index: Value, axis: int) -> Value:
    """Return elements at the sequence's own positions, counted from a mask or found by ArgMax."""
    ctx.need(index.masks, everything=False)
    index = ctx.as_data(replace(index, count=None))
    layout = (*data.axes[:axis], *index.axes, *data.axes[axis + 1 :])
    standing, cause = joined([data, index])
    gone = set(ordinals(data.axes, axis))
    before, more = len(varying(data.axes[:axis])), len(varying(index.axes))
    places = {
        at: at if at < before else at - len(gone) + more for at in range(len(varying(data.axes))) if at not in gone
    }
    result = data.moved(layout, places)
    regions = {
        ("pad", before + at, before + at): Entry(Interval(wild=wild_anywhere(data))) for at in range(more)
    } | dict(result.regions)
    return replace(result.bare(), lit=data.span, standing=standing, cause=cause, regions=regions, norm=data.norm)


@rule("GatherElements")
def gather_elements(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return, for each element of the index, the element at that place along an axis."""
    data, index = required(inputs, 0), required(inputs, 1)
    axis = attribute(node, "axis", 0)
    axis = axis + len(data.axes) if axis < 0 else axis
    if not is_plain(data.axes[axis]):
        if ctx.is_batch:
            return ctx.bad(Standing.DIFFERENT, "takes elements of other rows of the batch")
        return ctx.unknown("takes positions at places that are not known to be the sequence's own")
    for at, (one, other) in enumerate(zip(data.axes, index.axes, strict=True)):
        if at != axis and one != other:
            raise NotFollowed("an index has other axes than its data")
    data, index = ctx.as_data(data), ctx.as_data(index)
    standing, cause = joined([data, index])
    span = Interval(data.span.low, data.span.high, wild_anywhere(data))
    return Value(index.layout, standing, cause, span=span, lit=span)


@rule("CategoryMapper", "LabelEncoder", domain="ai.onnx.ml")
def labels(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return each element mapped separately."""
    value = ctx.as_data(required(inputs, 0))
    return replace(value.bare(), regions={}, lit=Interval(), span=Interval())
