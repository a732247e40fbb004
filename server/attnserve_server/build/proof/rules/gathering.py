"""Operators that take elements by index: tables, rows, positions. What an index may point at decides."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

import numpy as np
import onnx_ir as ir

from attnserve_server.build.proof.context import (
    Context,
    attribute,
    constant,
    joined,
    numbers,
    required,
    rule,
    wild_anywhere,
)
from attnserve_server.build.proof.intervals import Interval
from attnserve_server.build.proof.layout import (
    PLAIN_ONE,
    Axis,
    Layout,
    NotFollowed,
    Places,
    is_plain,
    ordinals,
    plain,
    size_of,
    varying,
)
from attnserve_server.build.proof.rules.moving import sliced
from attnserve_server.build.proof.rules.pointwise import sizes_value
from attnserve_server.build.proof.sizes import ONE, Size
from attnserve_server.build.proof.values import Entry, Standing, Value

_LOWEST: Final = -3.4e38
_LOWEST_HALF: Final = -65504.0
"""No finite number of the type is lower, but for rounding in its name."""


@rule("Gather")
def gather(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Slices of a tensor along one axis, by index."""
    data, index = required(inputs, 0), required(inputs, 1)
    axis = attribute(node, "axis", 0)
    axis = axis + len(data.axes) if axis < 0 else axis
    if data.sizes is not None and index.sizes is not None and len(data.axes) == 1:
        return _of_sizes(data, index)
    if index.items:
        return _rows_of_items(ctx, data, index, axis)
    if is_plain(data.axes[axis]):
        return from_table(ctx, ctx.as_data(data), index, axis)
    return _of_varying(ctx, data, index, axis)


def _of_sizes(data: Value, index: Value) -> Value:
    places = numbers(index)
    if places is None:
        raise NotFollowed("a size is taken at a place that is not known")
    sizes = data.sizes or ()
    return sizes_value(Value(index.layout), [sizes[at] for at in places])


def _rows_of_items(ctx: Context, data: Value, index: Value, axis: int) -> Value:
    """The rows of a tap: those of the batch that ask. In one row's own answer, the row itself."""
    data = ctx.as_data(data)
    if ctx.is_batch and not _has_items(data.axes[axis], index.items):
        return ctx.unknown("takes rows of a tensor that has none for each sequence of the batch")
    layout = (*data.axes[:axis], *index.axes, *data.axes[axis + 1 :])
    if len(varying(layout)) != len(varying(data.axes)):
        places = _inserted(data.axes, layout, axis)
    else:
        places = {place: place for place in range(len(varying(data.axes)))}
    result = data.moved(layout, places)
    return replace(result, norm=data.norm, norm_axis=data.norm_axis)


def _has_items(axis: Axis, items: str) -> bool:
    """Whether places of rows are places of rows along this axis."""
    if size_of(axis).number == 1:
        return items == "rows"
    kind, _, heads = items.partition(":")
    if kind == "rows":
        return len(axis) == 1 and axis[0].varies
    if len(axis) != 2 or kind == "times":
        return False
    row, head = axis if kind == "outer" else axis[::-1]
    return row.varies and not head.varies and head.size.number == int(heads)


def _inserted(old: Layout, new: Layout, axis: int) -> Places:
    before = sum(1 for at, _ in varying(old) if at < axis)
    gone = sum(1 for at, _ in varying(old) if at == axis)
    more = sum(1 for at, _ in varying(new) if at == axis)
    return {
        place: place if place < before else place - gone + more
        for place in range(len(varying(old)))
        if not before <= place < before + gone
    }


def from_table(ctx: Context, data: Value, index: Value, axis: int) -> Value:
    """Along an axis that is the same in both runs, equal indices give equal elements."""
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
        ctx.norms[key] = float(np.sqrt((wide * wide).sum(-1)).max(initial=0.0))
    return replace(found, norm=ctx.norms[key], norm_axis=len(found.axes) - 1)


def _of_varying(ctx: Context, data: Value, index: Value, axis: int) -> Value:
    """Along the axis that varies: the index must be known to stay within the sequence's own part."""
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
        said = f"takes a position counted from the end, where {ctx.others} stand"
        return ctx.bad(Standing.DIFFERENT, said)
    if _is_identity(ctx, data, index, axis):
        return _along_index(ctx, data, index, axis)
    if index.valid or index.count == 1:
        return _own_positions(ctx, data, index, axis)
    return ctx.unknown("takes positions at places that are not known to be the sequence's own")


def _rows(ctx: Context, data: Value, index: Value, axis: int) -> Value:
    if _is_identity(ctx, data, index, axis):
        return _along_index(ctx, data, index, axis)
    return ctx.bad(Standing.DIFFERENT, "takes certain rows of the batch, whichever sequence they belong to")


def _is_identity(ctx: Context, data: Value, index: Value, axis: int) -> bool:
    """Whether an index counts the positions of the very axis that it takes them from."""
    if index.counts != 1 or index.offset is None or index.offset.number != 0:
        return False
    (place,) = index.index or {}
    at, factor = varying(index.axes)[place]
    return data.axes[axis] == (factor,) and index.axes[at] == (factor,)


def _within_fold(data: Value, index: Value, axis: int) -> tuple[int, int] | None:
    """Where an axis of rows and positions folded into one is read at places of the same row or position.

    Returns:
        The varying factor of the axis, and the one of the index that counts it; None where it is read elsewhere.
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
    """Whether an axis of rows and positions folded into one is read at one of the sequence's own positions."""
    parts = data.axes[axis]
    if len(parts) != 2 or not parts[1].varies or index.index or index.offset is None or index.offset.number != 0:
        return False
    return index.valid and index.outer == parts[1].size and index.below == parts[1].size


def _along_index(ctx: Context, data: Value, index: Value, axis: int) -> Value:
    (place,) = index.index or {}
    return _read_along(data, index, axis, place)


def _read_along(data: Value, index: Value, axis: int, place: int) -> Value:
    """What is read along an axis, its varying factor in the place of the index's."""
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
    """The axis of one position replaced by the index's own axes."""
    if value.layout is None:
        return value
    layout = (*value.axes[:axis], *index.axes, *value.axes[axis + 1 :])
    same = {place: place for place in range(len(varying(value.axes)))}
    shift = len(index.axes) - 1
    moved = value.moved(layout, same)
    return replace(moved, norm=value.norm, norm_axis=value.norm_axis + shift)


def _own_positions(ctx: Context, data: Value, index: Value, axis: int) -> Value:
    """Positions that are counted from a mask, or found as that of the greatest: the sequence's own ones."""
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
    return replace(result.bare(), standing=standing, cause=cause, regions=regions, norm=data.norm)


@rule("GatherElements")
def gather_elements(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """For each element of the index, the one at that place along an axis."""
    data, index = required(inputs, 0), required(inputs, 1)
    axis = attribute(node, "axis", 0)
    axis = axis + len(data.axes) if axis < 0 else axis
    if not is_plain(data.axes[axis]):
        if ctx.is_batch:
            return ctx.bad(Standing.DIFFERENT, "takes elements of other rows of the batch")
        return ctx.unknown("takes positions at places that are not known to be the sequence's own")
    for at, (one, other) in enumerate(zip(data.axes, index.axes, strict=True)):
        if at != axis and one != other:
            raise NotFollowed("an index has other axes than what it takes from")
    data, index = ctx.as_data(data), ctx.as_data(index)
    standing, cause = joined([data, index])
    span = Interval(data.span.low, data.span.high, wild_anywhere(data))
    return Value(index.layout, standing, cause, span=span, lit=span)


@rule("GatherND")
def gather_nd(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Elements or slices at places that are given by tuples of indices, along the last axis of the index."""
    data, index = required(inputs, 0), required(inputs, 1)
    shared = int(attribute(node, "batch_dims", 0))
    if shared:
        return _of_own_rows(ctx, data, index, shared)
    width = size_of(index.axes[-1]).number
    if width is None:
        raise NotFollowed("a gather by tuples of unknown length")
    columns = index.columns if index.columns is not None and len(index.columns) == width else None
    if width == 1 and columns is None:
        columns = (index,)
    if columns is None:
        return _any_tuples(ctx, data, index, width)
    leading = index.axes[:-1]
    layout = (*leading, *data.axes[width:])
    result, standing = data, [data]
    targets: dict[int, int] = {}
    for axis, column in enumerate(columns):
        if is_plain(data.axes[axis]):
            standing.append(ctx.as_data(column))
        elif column.valid or column.count == 1:
            ctx.need(column.masks, everything=False)
            standing.append(ctx.as_data(replace(column, count=None)))
        elif _is_identity(ctx, data, column, axis):
            (place,) = column.index or {}
            targets[ordinals(data.axes, axis)[0]] = _place_of_column(column, place, leading)
        else:
            return _any_tuples(ctx, data, index, width)
    first = len(varying(data.axes[:width]))
    more = len(varying(leading))
    for at in range(first, len(varying(data.axes))):
        targets[at] = at - first + more
    worst, cause = joined(standing)
    return replace(result.moved(layout, targets), standing=worst, cause=cause, raw=data.raw)


def _of_own_rows(ctx: Context, data: Value, index: Value, shared: int) -> Value:
    """Each row of the index takes one place of the same row of the data, along the axis behind the shared ones."""
    if size_of(index.axes[-1]).number != 1 or data.axes[:shared] != index.axes[:shared]:
        raise NotFollowed("a gather by tuples with batch axes of its own is not followed")
    rest = len(index.axes) - 1 - shared
    own = ordinals(data.axes, shared)
    if own and not (index.valid or index.count == 1):
        return ctx.unknown("takes positions at places that are not known to be the sequence's own")
    ctx.need(index.masks if own else frozenset(), everything=False)
    places = ctx.as_data(replace(index, count=None))
    if places.layout is None or any(not is_plain(axis) for axis in index.axes[shared:]):
        raise NotFollowed("places along a varying axis of an index are not followed")
    data = ctx.as_data(data)
    standing, cause = joined([data, places])
    layout = (*data.axes[:shared], *index.axes[shared : shared + rest], *data.axes[shared + 1 :])
    left = [at for at in range(len(varying(data.axes))) if at not in own]
    found = data.moved(layout, {place: at for at, place in enumerate(left)})
    return replace(found.bare(), standing=standing, cause=cause)


def _place_of_column(column: Value, place: int, leading: Layout) -> int:
    """Where a varying factor of a column is among those of the whole index, whose axes broadcast it."""
    axis, _ = varying(column.axes)[place]
    same = ordinals(leading, axis)
    if not same:
        raise NotFollowed("the places of a gather by tuples cannot be followed")
    return same[0]


def _any_tuples(ctx: Context, data: Value, index: Value, width: int) -> Value:
    if not all(is_plain(axis) for axis in data.axes[:width]):
        if ctx.is_batch:
            return ctx.unknown("takes elements at places that are not known to be of the same row")
        return ctx.unknown("takes positions at places that are not known to be the sequence's own")
    data, index = ctx.as_data(data), ctx.as_data(index)
    standing, cause = joined([data, index])
    layout = (*index.axes[:-1], *data.axes[width:])
    span = Interval(data.span.low, data.span.high, wild_anywhere(data))
    return Value(layout, standing, cause, span=span, lit=span)


@rule("NonZero")
def non_zero(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Places of numbers that are not 0. Of a vector of ones, all places, one after another."""
    value = ctx.as_data(required(inputs, 0))
    if len(value.axes) == 1 and value.span.only not in {None, 0}:
        from attnserve_server.build.proof.context import index_value  # noqa: PLC0415 - only here

        layout = (PLAIN_ONE, value.axes[0])
        if not is_plain(value.axes[0]):
            return index_value(ctx, layout, {0: Size.of(1)}, Size.of(0))
        high = max(size_of(value.axes[0]).bounds()[1] - 1, 0)
        return Value(layout, span=Interval(0, high), lit=Interval(0, high))
    if value.varies:
        said = f"counts what is not zero, {ctx.others} included"
        return ctx.unknown(said)
    return ctx.unknown("counts what is not zero: how much that is, is not followed")


@rule("Compress", "Unique")
def choosing(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """As many elements as a condition, or the content, chooses."""
    value = required(inputs, 0)
    said = f"chooses among all elements, {ctx.others} included"
    standing = Standing.DIFFERENT if value.varies else Standing.UNKNOWN
    if not value.varies:
        said = "chooses as many elements as the content says, which is not followed"
    return [ctx.bad(standing, said) for _ in node.outputs]


@rule("ScatterND", "ScatterElements", "Scatter")
def scatter(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """A tensor with some elements replaced."""
    data, index, updates = (ctx.as_data(required(inputs, at)) for at in range(3))
    standing, cause = joined([data, index, updates])
    if _replaces_everything(ctx, node, inputs):
        return replace(updates, standing=standing, cause=cause)
    span = data.span.hull(updates.span)
    bits = wild_anywhere(data) | wild_anywhere(updates)
    span = replace(span, wild=bits)
    axis = attribute(node, "axis", 0) % max(len(data.axes), 1)
    elements = node.op_type != "ScatterND"
    if elements:
        written = [axis]
        rest = all(
            one == other for at, (one, other) in enumerate(zip(data.axes, index.axes, strict=True)) if at != axis
        )
    else:
        width = size_of(index.axes[-1]).number or len(data.axes)
        written = list(range(width))
        rest = not any(not is_plain(a) for a in index.axes)
    plain_there = all(is_plain(data.axes[at]) for at in written)
    if plain_there and rest:
        return Value(data.layout, standing, cause, span=span, lit=span)
    if not data.varies and not index.varies and not updates.varies:
        return Value(data.layout, standing, cause, span=span, lit=span)
    kind = Standing.DIFFERENT if ctx.is_batch and not plain_there else Standing.UNKNOWN
    if ctx.is_batch:
        return ctx.bad(kind, "writes to places in the batch that may belong to other rows")
    return ctx.bad(kind, "writes to places along the padded axis that are not known to be the sequence's own")


def _replaces_everything(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> bool:
    """Whether the updates cover the whole tensor in its own order, as exporters write `x[:] = y`."""
    data, index, updates = inputs[0], inputs[1], inputs[2]
    if data is None or index is None or updates is None or node.op_type != "ScatterND":
        return False
    if data.layout is None or data.layout != updates.layout or index.columns is None:
        return False
    for axis, column in enumerate(index.columns):
        size = size_of(data.axes[axis])
        counts = column.index is not None and _is_identity(ctx, data, column, axis)
        known = numbers(column)
        number = size.number
        if not counts and not (known is not None and number is not None and sorted(set(known)) == list(range(number))):
            return False
    return True


@rule("TopK")
def top_k(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """The greatest elements along an axis, and where they are."""
    value = ctx.as_data(required(inputs, 0))
    axis = attribute(node, "axis", -1) % len(value.axes)
    wanted = required(inputs, 1)
    if wanted.sizes is None or len(wanted.sizes) != 1 or wanted.sizes[0] is None:
        standing = Standing.DIFFERENT if wanted.standing is Standing.DIFFERENT else Standing.UNKNOWN
        return [ctx.bad(standing, "takes a number of elements that depends on the content or the batch")] * 2
    count = wanted.sizes[0]
    if is_plain(value.axes[axis]):
        layout = (*value.axes[:axis], ctx.axis_of(count), *value.axes[axis + 1 :])
        if ctx.depends(count):
            return [ctx.bad(Standing.DIFFERENT, "takes as many elements as the padded length says")] * 2
        same = {place: place for place in range(len(varying(value.axes)))}
        found = replace(value.moved(layout, same).bare(), regions={}, lit=value.span)
        places = Interval(0, max(size_of(value.axes[axis]).bounds()[1] - 1, 0))
        return [
            replace(found, span=replace(value.span, wild=wild_anywhere(value))),
            replace(found, span=places, lit=places, masks=frozenset()),
        ]
    if ctx.is_batch:
        return [ctx.bad(Standing.DIFFERENT, "takes the greatest of the whole batch")] * 2
    return _top_of_varying(ctx, node, value, axis, count)


def _top_of_varying(ctx: Context, node: ir.Node, value: Value, axis: int, count: Size) -> list[Value]:
    """Of an axis whose padded elements are below all others, the greatest are the sequence's own."""
    own = ordinals(value.axes, axis)
    largest = bool(attribute(node, "largest", 1))
    entry = value.pad(own[0])
    lowest = _LOWEST_HALF if ctx.precision == "fp16" else _LOWEST
    below = entry.only is not None and (entry.only == -math.inf or (entry.only <= lowest and not value.span.wild))
    if len(own) != 1 or len(value.axes[axis]) != 1 or not largest or not below or ctx.depends(count):
        said = f"takes the greatest elements, {ctx.others} among them"
        standing = Standing.DIFFERENT if not entry.lowered and not below else Standing.UNKNOWN
        return [ctx.bad(standing, said)] * 2
    layout = (*value.axes[:axis], plain(count), *value.axes[axis + 1 :])
    places = _inserted(value.axes, layout, axis)
    found = replace(value.moved(layout, places).bare(), lit=value.span, raw=f"top of {_origin(node)}")
    return [found, ctx.unknown("places of elements that masks hide are not told apart from padded ones")]


def _origin(node: ir.Node) -> str:
    """The value whose greatest elements are taken, before it was filled up to have enough of them."""
    source = node.inputs[0]
    producer = source.producer() if source is not None else None
    if producer is not None and producer.op_type == "Pad":
        source = producer.inputs[0]
    return str(source.name) if source is not None else ""


@rule("CategoryMapper", "LabelEncoder", domain="ai.onnx.ml")
def labels(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Each element by itself."""
    value = ctx.as_data(required(inputs, 0))
    return replace(value.bare(), regions={}, lit=Interval(), span=Interval())
