"""The rules of operators that select elements by their content: TopK, ArgMax, NonZero, Compress.

The result is equal only if padded elements cannot be selected. A number of elements that depends on the content is
unknown.

In the proof, a varying axis differs in length between a sequence alone and in a batch (or padded); a rule returns
whether its result is equal in both. `NotFollowed` becomes the verdict unknown.
"""

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
"""The lowest finite number of the type, rounded up."""


@rule("NonZero")
def non_zero(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return the places of numbers that are not 0. For a vector of ones, these are all places in order."""
    value = ctx.as_data(required(inputs, 0))
    if len(value.axes) == 1 and value.span.only not in {None, 0}:
        layout = (PLAIN_ONE, value.axes[0])
        if not is_plain(value.axes[0]):
            return index_value(ctx, layout, {0: Size.of(1)}, Size.of(0))
        high = max(size_of(value.axes[0]).bounds()[1] - 1, 0)
        return Value(layout, span=Interval(0, high), lit=Interval(0, high))
    if value.varies:
        reason = f"counts nonzero elements, {ctx.others} included"
        return ctx.unknown(reason)
    return ctx.unknown("the number of nonzero elements is not known")


@rule("Compress", "Unique")
def choosing(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Return as many elements as a condition, or the content, selects."""
    value = required(inputs, 0)
    reason = f"selects among all elements, {ctx.others} included"
    standing = Standing.DIFFERENT if value.varies else Standing.UNKNOWN
    if not value.varies:
        reason = "selects a number of elements that depends on the content"
    return [ctx.bad(standing, reason) for _ in node.outputs]


@rule("TopK")
def top_k(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Return the greatest elements along an axis, and their places."""
    value = ctx.as_data(required(inputs, 0))
    axis = attribute(node, "axis", -1) % len(value.axes)
    number = required(inputs, 1)
    if number.sizes is None or len(number.sizes) != 1 or number.sizes[0] is None:
        standing = Standing.DIFFERENT if number.standing is Standing.DIFFERENT else Standing.UNKNOWN
        return [ctx.bad(standing, "takes a number of elements that depends on the content or the batch")] * 2
    count = number.sizes[0]
    if is_plain(value.axes[axis]):
        layout = (*value.axes[:axis], ctx.axis_of(count), *value.axes[axis + 1 :])
        if ctx.depends(count):
            return [ctx.bad(Standing.DIFFERENT, "takes a number of elements that depends on the padded length")] * 2
        same = {place: place for place in range(len(varying(value.axes)))}
        found = replace(value.moved(layout, same).bare(), regions={}, lit=value.span)
        places = Interval(0, max(size_of(value.axes[axis]).bounds()[1] - 1, 0))
        return [
            replace(found, span=replace(value.span, wild=wild_anywhere(value))),
            replace(found, span=places, lit=places, masks=frozenset()),
        ]
    if ctx.is_batch:
        return [ctx.bad(Standing.DIFFERENT, "takes the greatest elements of the whole batch")] * 2
    return _top_of_varying(ctx, node, value, axis, count)


def _top_of_varying(ctx: Context, node: ir.Node, value: Value, axis: int, count: Size) -> list[Value]:
    """Return the greatest elements of an axis. They are the sequence's own if all padded elements are below them."""
    own = ordinals(value.axes, axis)
    largest = bool(attribute(node, "largest", 1))
    entry = value.pad(own[0])
    lowest = _LOWEST_HALF if ctx.precision == "fp16" else _LOWEST
    below = entry.only is not None and (entry.only == -math.inf or (entry.only <= lowest and not value.span.wild))
    if len(own) != 1 or len(value.axes[axis]) != 1 or not largest or not below or ctx.depends(count):
        reason = f"takes the greatest elements, which may be among {ctx.others}"
        standing = Standing.DIFFERENT if not entry.lowered and not below else Standing.UNKNOWN
        return [ctx.bad(standing, reason)] * 2
    layout = (*value.axes[:axis], plain(count), *value.axes[axis + 1 :])
    places = inserted(value.axes, layout, axis)
    found = replace(value.moved(layout, places).bare(), lit=value.span, raw=f"top of {_origin(node)}")
    return [found, ctx.unknown("the places of hidden elements are not distinguished from padded ones")]


def _origin(node: ir.Node) -> str:
    """Return the name of the value whose greatest elements are taken, before a Pad extended it."""
    source = node.inputs[0]
    producer = source.producer() if source is not None else None
    if producer is not None and producer.op_type == "Pad":
        source = producer.inputs[0]
    return str(source.name) if source is not None else ""


@rule("ArgMax", "ArgMin")
def arg_max(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return the place of the greatest element.

    It is the sequence's own if no padded element is greater and the first of equal ones counts.
    """
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
            reason = f"finds the place of the greatest element, which may be among {ctx.others}"
            standing, cause = Standing.DIFFERENT, ctx.cause(reason)
    regions = {("pad", places[one], places[one]): Entry() for _, one, _ in value.regions if one in places}
    high = max(size_of(value.axes[axis]).bounds()[1] - 1, 0)
    span = Interval(0, high)
    count = size_of(value.axes[axis])
    return Value(layout, standing, cause, span=span, lit=span, regions=regions, valid=valid, below=count)
