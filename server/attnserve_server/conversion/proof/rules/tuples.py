"""The rules of GatherND and the Scatter operators: elements at places that tuples of indices give.

Along the varying axis, places must be known to be the sequence's own. Tuples of unknown length, and forms that no
exporter writes, raise `NotFollowed`.

In the proof, a varying axis differs in length between a sequence alone and in a batch (or padded); a rule returns
whether its result is equal in both. `NotFollowed` becomes the verdict unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from attnserve_server.conversion.proof.context import Context, rule
from attnserve_server.conversion.proof.helpers import attribute, joined, numbers, required, wild_anywhere
from attnserve_server.conversion.proof.intervals import Interval
from attnserve_server.conversion.proof.layout import Layout, NotFollowed, is_plain, ordinals, size_of, varying
from attnserve_server.conversion.proof.rules.gathering import is_identity
from attnserve_server.conversion.proof.values import Standing, Value


@rule("GatherND")
def gather_nd(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return elements or slices at places given by tuples of indices, along the last axis of the index."""
    data, index = required(inputs, 0), required(inputs, 1)
    shared = int(attribute(node, "batch_dims", 0))
    if shared:
        return _of_own_rows(ctx, data, index, shared)
    width = size_of(index.axes[-1]).number
    if width is None:
        raise NotFollowed("gathers by tuples of unknown length")
    columns = index.columns if index.columns is not None and len(index.columns) == width else None
    if width == 1 and columns is None:
        columns = (index,)
    if columns is None:
        return _any_tuples(ctx, data, index, width)
    return _by_columns(ctx, data, index, columns)


def _by_columns(ctx: Context, data: Value, index: Value, columns: Sequence[Value]) -> Value:
    """Return elements or slices of data, with the places of each axis in one column."""
    width, leading = len(columns), index.axes[:-1]
    standing = [data]
    targets: dict[int, int] = {}
    for axis, column in enumerate(columns):
        if is_plain(data.axes[axis]):
            standing.append(ctx.as_data(column))
        elif column.valid or column.count == 1:
            ctx.need(column.masks, everything=False)
            standing.append(ctx.as_data(replace(column, count=None)))
        elif is_identity(data, column, axis):
            (place,) = column.index or {}
            targets[ordinals(data.axes, axis)[0]] = _place_of_column(column, place, leading)
        else:
            return _any_tuples(ctx, data, index, width)
    if len(set(targets.values())) < len(targets):
        return ctx.unknown("takes a diagonal of two axes that both vary")
    first = len(varying(data.axes[:width]))
    more = len(varying(leading))
    for at in range(first, len(varying(data.axes))):
        targets[at] = at - first + more
    worst, cause = joined(standing)
    moved = data.moved((*leading, *data.axes[width:]), targets)
    if len(targets) < len(varying(data.axes)):
        moved = replace(moved, lit=data.span)  # a mask may hide the places that are taken
    return replace(moved, standing=worst, cause=cause, raw=data.raw)


def _of_own_rows(ctx: Context, data: Value, index: Value, shared: int) -> Value:
    """Return the rule for `batch_dims` > 0: each row of the index picks elements of the same row of the data.

    `shared` is `batch_dims`. The index gives places along the one data axis that follows the shared axes.
    """
    if size_of(index.axes[-1]).number != 1 or data.axes[:shared] != index.axes[:shared]:
        raise NotFollowed("the proof does not support GatherND with batch axes unlike the data's")
    rest = len(index.axes) - 1 - shared
    own = ordinals(data.axes, shared)
    if own and not (index.valid or index.count == 1):
        return ctx.unknown("takes positions at places that are not known to be the sequence's own")
    ctx.need(index.masks if own else frozenset(), everything=False)
    places = ctx.as_data(replace(index, count=None))
    if places.layout is None or any(not is_plain(axis) for axis in index.axes[shared:]):
        raise NotFollowed("the proof cannot follow places along a varying axis of an index")
    data = ctx.as_data(data)
    standing, cause = joined([data, places])
    layout = (*data.axes[:shared], *index.axes[shared : shared + rest], *data.axes[shared + 1 :])
    left = [at for at in range(len(varying(data.axes))) if at not in own]
    found = data.moved(layout, {place: at for at, place in enumerate(left)})
    return replace(found.bare(), standing=standing, cause=cause)


def _place_of_column(column: Value, place: int, leading: Layout) -> int:
    """Return which varying factor of the whole index is the given varying factor of one of its columns.

    Args:
        column: one column of the index.
        place: the number of a varying factor of the column.
        leading: the axes of the index without its last one. They broadcast the column.
    """
    axis, _ = varying(column.axes)[place]
    same = ordinals(leading, axis)
    if not same:
        raise NotFollowed("the proof cannot follow the places of a GatherND")
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


@rule("ScatterND", "ScatterElements", "Scatter")
def scatter(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return a tensor with some elements replaced."""
    data, index, updates = (ctx.as_data(required(inputs, at)) for at in range(3))
    standing, cause = joined([data, index, updates])
    if _replaces_everything(node, inputs):
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


def _replaces_everything(node: ir.Node, inputs: list[Value | None]) -> bool:
    """Return whether the updates cover the whole tensor in its own order, as exporters write `x[:] = y`."""
    data, index, updates = inputs[0], inputs[1], inputs[2]
    if data is None or index is None or updates is None or node.op_type != "ScatterND":
        return False
    if data.layout is None or data.layout != updates.layout or index.columns is None:
        return False
    return all(_runs_along(data, column, axis) for axis, column in enumerate(index.columns))


def _runs_along(data: Value, column: Value, axis: int) -> bool:
    """Return whether a column of places counts all of an axis of the data, along the same axis of the index."""
    if is_identity(data, column, axis):
        return varying(column.axes)[next(iter(column.index or {}))][0] == axis
    known, size = numbers(column), size_of(data.axes[axis]).number
    shape = [size_of(each).number for each in column.axes[:-1]]
    if known is None or size is None or None in shape or axis >= len(shape) or shape[axis] != size:
        return False
    counted = np.arange(size).reshape([size if at == axis else 1 for at in range(len(shape))])
    found = np.array(known).reshape([number or 0 for number in shape])
    return bool((found == np.broadcast_to(counted, found.shape)).all())
