"""The rules of Where and Cast. Sizes, positions and masks pass through them.

A cast to a type that is not known raises `NotFollowed`.

In the proof, a varying axis differs in length between a sequence alone and in a batch (or padded); a rule returns
whether its result is equal in both. `NotFollowed` becomes the verdict unknown.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

import numpy as np
import onnx_ir as ir

from attnserve_server.conversion.proof.context import Context, rule
from attnserve_server.conversion.proof.functions import as_half, as_truth, as_whole, chosen, wrapped
from attnserve_server.conversion.proof.helpers import aligned, attribute, required, sizes_value, without_nan
from attnserve_server.conversion.proof.intervals import Interval
from attnserve_server.conversion.proof.layout import NotFollowed
from attnserve_server.conversion.proof.rules.arithmetic import repeated
from attnserve_server.conversion.proof.rules.pointwise import Function, pointwise
from attnserve_server.conversion.proof.sizes import Size
from attnserve_server.conversion.proof.values import Standing, Value

_FLOATING: Final = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16}
_WRAPS: Final = {
    *(ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16, ir.DataType.UINT32),
    ir.DataType.UINT64,
}
_EXACT: Final = {
    ir.DataType.FLOAT16: 2048,
    ir.DataType.BFLOAT16: 256,
    ir.DataType.INT8: 127,
    ir.DataType.UINT8: 127,
    ir.DataType.INT16: 32767,
    ir.DataType.UINT16: 32767,
}
"""The greatest integer up to which a narrow type holds all integers. Other types hold all that occur."""


@rule("Cast", "CastLike")
def cast(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return the value in another type. Sizes, positions and masks are kept where the type can hold them."""
    value = required(inputs, 0)
    kind = _kind_of(node, inputs)
    if kind is ir.DataType.BOOL:
        found = pointwise(ctx, as_truth, [value])
        sizes = None
        if value.sizes is not None:
            sizes = tuple(_truth_of(size) for size in value.sizes)
        return replace(found, sizes=sizes, raw=value.raw if value.raw.startswith("below ") else "")
    whole = kind not in _FLOATING
    if _rounds(kind, value):
        return pointwise(ctx, lambda one: Interval(wild=one.wild), [value])
    function: Function = as_half if kind is ir.DataType.FLOAT16 else lambda interval: interval
    if whole:
        function = _whole_function(kind)
    if value.symbols or value.sizes is not None or value.index is not None or value.count is not None or value.raw:
        return replace(value, floating=kind in _FLOATING)
    result = pointwise(ctx, function, [value], op="" if whole else "Same")
    return replace(result, norm=value.norm, norm_axis=value.norm_axis) if not whole else result


def _kind_of(node: ir.Node, inputs: list[Value | None]) -> ir.DataType:
    if node.op_type == "Cast":
        return ir.DataType(attribute(node, "to", int(ir.DataType.FLOAT)))
    like, known = node.inputs[1], required(inputs, 1).constant
    if like is not None and like.dtype is not None:
        return like.dtype
    if known is None:
        raise NotFollowed("a cast to a type that is not known")
    return ir.DataType.from_numpy(known.dtype)


def _whole_function(kind: ir.DataType) -> Function:
    """Return a cast to integers. Numbers beyond the bounds of a narrow or unsigned type wrap around."""
    if kind not in _WRAPS:
        return as_whole
    bounds = np.iinfo(kind.numpy().name)
    return lambda one: wrapped(as_whole(one), float(bounds.min), float(bounds.max))


def _rounds(kind: ir.DataType, value: Value) -> bool:
    """Return whether a type cannot hold the integers of a value, so that unequal positions or ids become equal."""
    ids = bool(value.raw) and not value.raw.startswith(("below ", "top of ", "nan of "))
    counts = value.sizes is not None or value.index is not None or value.count is not None
    # Floating-point positions are exact up to 2048, the greatest length that is assumed of fp16.
    return (ids or (counts and kind not in _FLOATING)) and value.span.greatest > _EXACT.get(kind, math.inf)


def _truth_of(size: Size | None) -> Size | None:
    if size is None:
        return None
    low, high = size.bounds()
    return Size.of(1) if low > 0 or high < 0 else Size.of(0) if size.number == 0 else None


@rule("Where")
def where(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return one of two operands, by a condition."""
    condition, one, other = (required(inputs, at) for at in range(3))
    symbolic = _chosen_sizes(condition, one, other)
    if symbolic is not None:
        return symbolic
    if one.items == "rows" and other.sizes is not None and _is_lesser(node):
        return one
    condition = ctx.as_data(condition)
    if condition.raw.startswith("below ") and condition.raw == f"below top of {input_name(node, 2)}":
        # Elements below the k-th greatest are hidden, and the greatest one is not.
        found = pointwise(ctx, chosen, [condition, one, other], op="Where")
        return replace(found, lit=other.lit, masks=other.masks, along=other.along, structured=other.structured)
    if condition.raw == f"nan of {node.inputs[2].name if node.inputs[2] else ''}" and condition.raw != "nan of ":
        other = without_nan(other)
    if condition.standing is Standing.EQUAL and condition.span.only is not None and not condition.varies:
        picked = one if condition.span.only else other
        layout, _ = aligned([condition, one, other])
        if picked.layout == layout:
            return picked
    return pointwise(ctx, chosen, [condition, one, other], op="Where")


def _is_lesser(node: ir.Node) -> bool:
    """Return whether a node selects the minimum of its two operands."""
    condition = node.inputs[0]
    less = condition.producer() if condition is not None else None
    return less is not None and less.op_type == "Less" and list(less.inputs) == list(node.inputs[1:])


def input_name(node: ir.Node, at: int) -> str:
    """Return the name of an input, or an empty string where it is omitted."""
    value = node.inputs[at] if at < len(node.inputs) else None
    return str(value.name) if value is not None else ""


def _chosen_sizes(condition: Value, one: Value, other: Value) -> Value | None:
    if condition.sizes is None or one.sizes is None or other.sizes is None:
        return None
    count = max(len(condition.sizes), len(one.sizes), len(other.sizes))
    wide = [repeated(value.sizes, count) for value in (condition, one, other) if value.sizes is not None]
    sizes = tuple(
        (yes if truth.number else no) if truth is not None and truth.number is not None else yes if yes == no else None
        for truth, yes, no in zip(*wide, strict=True)
    )
    if any(size is None for size in sizes):
        return None
    longest = max((condition, one, other), key=lambda value: len(value.axes))
    return sizes_value(longest, sizes)
