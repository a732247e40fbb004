"""The rules of operators that make shapes, and tensors from shapes, such as Shape, Range, Expand, Tile and Trilu.

Ranges, triangles and fillings whose length cannot be represented raise `NotFollowed` or are unknown.

In the proof, a varying axis differs in length between a sequence alone and in a batch (or padded); a rule returns
whether its result is equal in both. `NotFollowed` becomes the verdict unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from attnserve_server.conversion.proof.context import Context, rule
from attnserve_server.conversion.proof.functions import BINARY, chosen
from attnserve_server.conversion.proof.helpers import (
    aligned,
    attribute,
    constant,
    joined,
    numbers,
    required,
    sizes_of,
    sizes_value,
)
from attnserve_server.conversion.proof.intervals import BOOLEAN, ZERO, Interval, number
from attnserve_server.conversion.proof.layout import (
    Axis,
    Layout,
    NotFollowed,
    Places,
    is_plain,
    merged,
    ordinals,
    plain,
    size_of,
    varying,
)
from attnserve_server.conversion.proof.positions import index_value
from attnserve_server.conversion.proof.rules.pointwise import pointwise
from attnserve_server.conversion.proof.sizes import Size, product
from attnserve_server.conversion.proof.values import Entry, Standing, Value


@rule("Shape", shapes_only=True)
def shape(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return the sizes of all axes, or of some."""
    value = required(inputs, 0)
    if value.layout is None:
        return ctx.unknown("uses the shape of a value whose axes are not known")
    sizes = [size_of(axis) for axis in value.layout]
    start, end = attribute(node, "start", 0), attribute(node, "end")
    return _sizes(sizes[slice(start, end)])


@rule("Size", shapes_only=True)
def size(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return the number of elements."""
    value = required(inputs, 0)
    if value.layout is None:
        return ctx.unknown("uses the size of a value whose axes are not known")
    return replace(_sizes([product(size_of(axis) for axis in value.layout)]), layout=())


def _sizes(sizes: Sequence[Size]) -> Value:
    return sizes_value(Value((plain(Size.of(len(sizes))),)), sizes)


def filled(ctx: Context, sizes: Sequence[Size], interval: Interval) -> Value:
    """Return a tensor of numbers of one interval."""
    return Value(tuple(ctx.axis_of(size) for size in sizes), span=interval, lit=interval)


@rule("ConstantOfShape")
def constant_of_shape(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return a tensor of one number."""
    tensor = attribute(node, "value")
    content = np.zeros(1, np.float32) if tensor is None else tensor.numpy()
    sizes = sizes_of(required(inputs, 0))
    if len(sizes) <= 1 and all(one.number is not None and one.number <= 64 for one in sizes):
        return constant(np.full([one.number or 0 for one in sizes], content.reshape(-1)[0]))
    return filled(ctx, sizes, number(float(content.reshape(-1)[0])))


@rule("Range")
def range_(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return consecutive positions."""
    start, limit, step = (required(inputs, at) for at in range(3))
    by = numbers(step) if step.sizes is not None else None
    if by is None and step.span.only is not None:
        by = [int(step.span.only)] if float(step.span.only).is_integer() else None
    first, last = (_only_size(value) for value in (start, limit))
    if by != [1] or first is None or last is None:
        if all(value.standing is Standing.EQUAL and not _uses(ctx, value) for value in (start, limit, step)):
            raise NotFollowed("the proof cannot follow a range of these bounds")
        return ctx.unknown("a range depends on a length in a way that the proof cannot follow")
    count = last - first
    layout = (ctx.axis_of(count),)
    if len(layout[0]) != 1:
        raise NotFollowed("a range over a folded axis")
    if not ctx.depends(count):
        if ctx.depends(first):
            return Value(layout, offset=first)
        span = Interval(first.bounds()[0], max(last.bounds()[1] - 1, first.bounds()[0]))
        whole = count.number
        sizes = None
        if whole is not None and whole <= 64:
            sizes = tuple(first + Size.of(at) for at in range(whole))
        from_zero = first.number == 0
        return Value(layout, span=span, lit=span, sizes=sizes, below=last if from_zero else None)
    return index_value(ctx, layout, {0: Size.of(1)}, first)


def _only_size(value: Value) -> Size | None:
    if value.sizes is not None and len(value.sizes) == 1:
        return value.sizes[0]
    only = value.span.only
    return Size.of(int(only)) if only is not None and float(only).is_integer() else None


def _uses(ctx: Context, value: Value) -> bool:
    return value.sizes is not None and any(ctx.depends(one) for one in value.sizes)


@rule("Expand")
def expand(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return the value broadcast to a shape."""
    value = required(inputs, 0)
    return expanded(ctx, value, sizes_of(required(inputs, 1)))


def expanded(ctx: Context, value: Value, sizes: Sequence[Size]) -> Value:
    """Return a value broadcast with a shape."""
    layout = value.axes
    target: Layout = tuple(ctx.axis_of(one) for one in sizes)
    shift = len(target) - len(layout)
    fitted = tuple(
        layout[at - shift] if at >= shift and size_of(layout[at - shift]) == size_of(axis) else axis
        for at, axis in enumerate(target)
    )
    blank = Value(fitted, span=ZERO, lit=ZERO)
    wide, placed = aligned([value, blank])
    if value.sizes is not None and len(value.sizes) == 1 and len(wide) <= 1:
        count = product(size_of(axis) for axis in wide).number
        if count is not None and count <= 64:
            return sizes_value(Value(wide, floating=value.floating), value.sizes * count)
    result = value.moved(wide, placed[0][1])
    if value.offset is not None and result.index is None and value.index is None:
        result = replace(result, offset=value.offset)
    shifted = value.norm_axis + shift
    kept = replace(result, norm=value.norm, norm_axis=shifted, valid=value.valid, raw=value.raw)
    return replace(kept, outer=value.outer, below=value.below)


@rule("Tile")
def tile(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return the value repeated along axes. A varying axis cannot be repeated in place."""
    value = required(inputs, 0)
    axes: list[Axis] = []
    places: Places = {}
    count = 0
    for at, (axis, by) in enumerate(zip(value.axes, sizes_of(required(inputs, 1)), strict=True)):
        if by.number != 1 and not is_plain(axis):
            return ctx.bad(Standing.DIFFERENT, f"repeats positions in the place of {ctx.others}")
        repeated = axis if by.number == 1 else merged((*ctx.axis_of(by), *axis))
        for place in ordinals(value.axes, at):
            places[place] = count + place - ordinals(value.axes, at)[0]
        count += sum(factor.varies for factor in repeated)
        axes.append(repeated)
    return value.moved(tuple(axes), places)


@rule("Trilu")
def trilu(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return one triangle of the value, with zeros elsewhere."""
    value = ctx.as_data(required(inputs, 0))
    shift = numbers(inputs[1]) if len(inputs) > 1 and inputs[1] is not None else [0]
    if shift is None or len(shift) != 1:
        raise NotFollowed("keeps a triangle whose diagonal is not known")
    upper = bool(attribute(node, "upper", 1))
    layout = value.axes
    rows, columns = len(layout) - 2, len(layout) - 1
    factors = [at for at, (axis, _) in enumerate(varying(layout)) if axis in {rows, columns}]
    found = varying(layout)
    whole = all(len(layout[axis]) == 1 and not layout[axis][0].tail for axis in (rows, columns))
    if len(factors) != 2 or not whole or found[factors[0]][1].real != found[factors[1]][1].real:
        if not factors:
            span = value.span.hull(ZERO)
            return Value(layout, value.standing, value.cause, span=span, lit=span)
        if len(factors) == 1 or not whole:
            return ctx.unknown("the proof cannot follow a triangle of unequal sides")
        return ctx.unknown("the proof cannot follow a triangle of unequal lengths")
    row, column = factors
    # The index is columns minus rows. It is kept where it is at least (upper) or at most (lower) the shift.
    index = index_value(ctx, layout, {column: Size.of(1), row: Size.of(-1)}, Size.of(-shift[0]))
    if ctx.is_batch:
        return ctx.bad(Standing.DIFFERENT, "keeps a triangle over the rows of the batch")
    zero = Value((), span=number(0), lit=number(0))
    kept = pointwise(ctx, BINARY["GreaterOrEqual" if upper else "LessOrEqual"], [index, zero])
    return pointwise(ctx, chosen, [kept, value, zero], op="Where")


@rule("EyeLike", shapes_only=True)
def eye_like(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return ones on a diagonal."""
    value = required(inputs, 0)
    factors = varying(value.axes)
    if ctx.is_batch and factors:
        return ctx.bad(Standing.DIFFERENT, "marks the place of the row in the batch")
    regions = {}
    if not attribute(node, "k", 0):
        regions = {("pad", at, at): Entry(ZERO, lit=ZERO) for at in range(len(factors))}
    return Value(value.layout, span=BOOLEAN, lit=BOOLEAN, regions=regions)


@rule("RandomNormalLike", "RandomUniformLike", "RandomNormal", "RandomUniform", "Bernoulli", "Multinomial")
def random(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return random numbers, which differ between any two runs."""
    value = inputs[0] if inputs else None
    layout = value.layout if value is not None else None
    return ctx.bad(Standing.DIFFERENT, "draws random numbers, which differ from run to run", layout)


@rule("OneHot")
def one_hot(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return one marked place for each index, along a new axis."""
    value = ctx.as_data(required(inputs, 0))
    depth = sizes_of(required(inputs, 1))[0]
    if ctx.depends(depth):
        return ctx.unknown("marks places along an axis as long as the padded one")
    axis = attribute(node, "axis", -1)
    at = axis if axis >= 0 else len(value.axes) + 1 + axis
    layout = (*value.axes[:at], plain(depth), *value.axes[at:])
    marks = ctx.as_data(required(inputs, 2))
    standing, cause = joined([value, marks])
    span = marks.span
    places = {place: place for place in range(len(varying(value.axes)))}
    moved = value.moved(layout, places)
    return Value(moved.layout, standing, cause, span=span, lit=span)
