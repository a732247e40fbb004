"""Operators that select elements by their content: TopK, ArgMax, NonZero, Compress."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

import onnx_ir as ir

from attnserve_server.conversion.proof.context import Context, rule
from attnserve_server.conversion.proof.helpers import attribute, required, wild_anywhere
from attnserve_server.conversion.proof.intervals import Interval
from attnserve_server.conversion.proof.layout import PLAIN_ONE, is_plain, ordinals, plain, size_of, varying
from attnserve_server.conversion.proof.positions import index_value
from attnserve_server.conversion.proof.rules.reducing import without
from attnserve_server.conversion.proof.rules.taps import inserted
from attnserve_server.conversion.proof.sizes import Size
from attnserve_server.conversion.proof.values import Entry, Standing, Value

_LOWEST: Final = -3.4e38
_LOWEST_HALF: Final = -65504.0
"""No finite number of the type is lower, but for rounding in its name."""


@rule("NonZero")
def non_zero(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Places of numbers that are not 0. Of a vector of ones, all places, one after another."""
    value = ctx.as_data(required(inputs, 0))
    if len(value.axes) == 1 and value.span.only not in {None, 0}:
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
    places = inserted(value.axes, layout, axis)
    found = replace(value.moved(layout, places).bare(), lit=value.span, raw=f"top of {_origin(node)}")
    return [found, ctx.unknown("places of elements that masks hide are not told apart from padded ones")]


def _origin(node: ir.Node) -> str:
    """The value whose greatest elements are taken, before it was filled up to have enough of them."""
    source = node.inputs[0]
    producer = source.producer() if source is not None else None
    if producer is not None and producer.op_type == "Pad":
        source = producer.inputs[0]
    return str(source.name) if source is not None else ""


@rule("ArgMax", "ArgMin")
def arg_max(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """The place of the greatest: the sequence's own, where nothing padded is greater and the first of equals counts."""
    value = ctx.as_data(required(inputs, 0))
    axis = attribute(node, "axis", 0) % len(value.axes)
    layout, places = without(value.axes, [axis], keep=bool(attribute(node, "keepdims", 1)))
    standing, cause = value.standing, value.cause
    own = ordinals(value.axes, axis)
    valid = False
    if own:
        entry = value.pad(own[0])
        lowest = node.op_type == "ArgMin"
        below = entry.interval.low >= value.span.high if lowest else entry.high <= value.span.low
        first = not attribute(node, "select_last_index", 0)
        whole = len(value.axes[axis]) == 1 and not value.axes[axis][0].tail
        valid = below and first and not ctx.is_batch and whole and not entry.interval.wild
        if not valid:
            said = f"finds the place of the greatest, which may be among {ctx.others}"
            standing, cause = Standing.DIFFERENT, ctx.cause(said)
    regions = {("pad", places[one], places[one]): Entry() for _, one, _ in value.regions if one in places}
    high = max(size_of(value.axes[axis]).bounds()[1] - 1, 0)
    span = Interval(0, high)
    count = size_of(value.axes[axis])
    return Value(layout, standing, cause, span=span, lit=span, regions=regions, valid=valid, below=count)
