"""The rules of quantization: scales that are constants, of one row, or of a whole batch.

A scale of a whole varying value makes the result different. Scales of blocks, and transposed integer products, raise
`NotFollowed`.

In the proof, a varying axis differs in length between a sequence alone and in a batch (or padded); a rule returns
whether its result is equal in both. `NotFollowed` becomes the verdict unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import onnx_ir as ir

from attnserve_server.conversion.proof.context import MICROSOFT, Context, rule
from attnserve_server.conversion.proof.helpers import attribute, joined, optional, required, wild_anywhere
from attnserve_server.conversion.proof.hiding import softmaxed
from attnserve_server.conversion.proof.intervals import Interval, add, multiply, subtract
from attnserve_server.conversion.proof.layout import PLAIN_ONE, NotFollowed, is_one, plain, varying
from attnserve_server.conversion.proof.rounding import rounded, scaled_up, steps_of
from attnserve_server.conversion.proof.rules.joining import together
from attnserve_server.conversion.proof.rules.normalizing import softmax_axes
from attnserve_server.conversion.proof.rules.pointwise import pointwise
from attnserve_server.conversion.proof.rules.products import biased, matmul, times
from attnserve_server.conversion.proof.sizes import Size
from attnserve_server.conversion.proof.values import Entry, Standing, Value

DYNAMIC: Final = "one scale spans all elements, {others} included (dynamic quantization)"
_BYTES: Final = Interval(-128, 255)


def spans_all(ctx: Context, value: Value) -> tuple[Standing, str]:
    """Return whether a scale computed from a whole value depends on more than the sequence's own part."""
    factors = len(varying(value.axes))
    if not factors or (factors == 1 and not ctx.is_batch and value.pad(0).only == 0):
        return Standing.EQUAL, ""  # the range of a scale always includes 0
    return Standing.DIFFERENT, DYNAMIC.format(others=ctx.others)


@rule("DynamicQuantizeLinear")
def dynamic_quantize(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Return uint8 numbers, with a scale and a zero point from the minimum and the maximum of all elements."""
    value = ctx.as_data(required(inputs, 0))
    standing, reason = spans_all(ctx, value)
    cause = ctx.cause(reason) if reason else None
    if value.standing > standing:
        standing, cause = value.standing, value.cause
    regions = {region: Entry(_BYTES, lit=_BYTES) for region in value.regions}
    integers = Value(value.layout, standing, cause, span=_BYTES, lit=_BYTES, regions=regions)
    scale = Value((), standing, cause, span=Interval(0, value.span.greatest))
    return [integers, scale, Value((), standing, cause, span=_BYTES, lit=_BYTES)]


def _along(value: Value, scale: Value, axis: int) -> Value:
    """Return a scale of one number for each channel, on the axis of the channels."""
    if len(scale.axes) != 1 or is_one(scale.axes[0]):
        return scale
    after = len(value.axes) - 1 - axis
    same = {place: place for place in range(len(varying(scale.axes)))}
    return scale.moved((scale.axes[0], *([PLAIN_ONE] * after)), same)


@rule("QuantizeLinear", "DequantizeLinear")
def quantize(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return each number scaled by a given scale."""
    value, scale = ctx.as_data(required(inputs, 0)), ctx.as_data(required(inputs, 1))
    zero = optional(inputs, 2)
    if attribute(node, "block_size", 0):
        raise NotFollowed("the proof does not support scales of blocks")
    steps = None if attribute(node, "output_dtype", 0) else steps_of(scale, zero)
    if steps is not None and value.layout is not None:
        return rounded(value, steps) if node.op_type == "QuantizeLinear" else scaled_up(value, steps)
    axis = attribute(node, "axis", 1)
    axis = axis + len(value.axes) if axis < 0 else axis
    operands = [value, _along(value, scale, axis), *([_along(value, zero, axis)] if zero is not None else [])]
    rounds = node.op_type == "QuantizeLinear"

    span = _BYTES if _is_bytes(node, zero) else Interval()

    def function(*each: Interval) -> Interval:
        if rounds:
            return span
        shifted = subtract(each[0], each[2]) if len(each) > 2 else each[0]
        most = shifted.greatest * each[1].greatest if shifted.greatest and each[1].greatest else 0.0
        return Interval(-most, most, each[1].wild)

    found = pointwise(ctx, function, operands)
    return replace(found, layout=value.layout) if found.layout == value.layout else found


def _is_bytes(node: ir.Node, zero: Value | None) -> bool:
    """Return whether numbers are rounded to 8 bits, and not to 16."""
    if attribute(node, "output_dtype", 0):
        return False
    return zero is None or (zero.constant is not None and zero.constant.dtype.itemsize == 1)


@rule("QuantizeLinear", "DequantizeLinear", domain=MICROSOFT)
def quantize_microsoft(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return the result of onnxruntime's form of the standard operators."""
    found = quantize(ctx, node, inputs)
    assert isinstance(found, Value)
    return found


@rule("MatMulInteger")
def matmul_integer(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return a product of integers, minus their zero points."""
    one, other = _shifted(ctx, inputs, 0, 2, rows=True), _shifted(ctx, inputs, 1, 3, rows=False)
    return matmul(ctx, one, other)


@rule("MatMulInteger16", domain=MICROSOFT)
def matmul_integer16(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return a product of integers."""
    return matmul(ctx, required(inputs, 0), required(inputs, 1))


def _shifted(ctx: Context, inputs: list[Value | None], at: int, zero: int, *, rows: bool) -> Value:
    value, point = ctx.as_data(required(inputs, at)), optional(inputs, zero)
    if point is None or not point.axes or is_one(point.axes[0]):
        extra = [] if point is None else [replace(point, layout=(), regions={})]
        return pointwise(ctx, subtract, [value, *extra]) if extra else value
    if rows and len(point.axes) == 1:
        point = replace(point, layout=(*point.axes, PLAIN_ONE))
    return pointwise(ctx, subtract, [value, point])


@rule("MatMulIntegerToFloat", domain=MICROSOFT)
def matmul_integer_to_float(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return a product of 8-bit integers as floats: times a scale for each operand, plus a bias."""
    one, other = _shifted(ctx, inputs, 0, 4, rows=True), _shifted(ctx, inputs, 1, 5, rows=False)
    found = matmul(ctx, one, other)
    scales = [ctx.as_data(required(inputs, at)) for at in (2, 3)]
    return biased(ctx, times(ctx, [found, *(_scalar(scale) for scale in scales)]), optional(inputs, 6))


def _scalar(value: Value) -> Value:
    return replace(value, layout=()) if all(is_one(axis) for axis in value.axes) and not value.varies else value


@rule("DynamicQuantizeMatMul", domain=MICROSOFT)
def dynamic_quantize_matmul(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return a product whose first operand is rounded with one scale for all its rows."""
    value, matrix = ctx.as_data(required(inputs, 0)), required(inputs, 1)
    standing, reason = spans_all(ctx, value)
    found = biased(ctx, matmul(ctx, value, matrix), optional(inputs, 4))
    rest = [other for other in inputs[2:4] if other is not None]
    worst, cause = joined([found, *rest])
    if standing > worst:
        worst, cause = standing, ctx.cause(reason)
    return replace(found, standing=worst, cause=cause)


@rule("QLinearMatMul")
def qlinear_matmul(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return a product of 8-bit integers with given scales, rounded to 8 bits."""
    one, other = _shifted(ctx, inputs, 0, 2, rows=True), _shifted(ctx, inputs, 3, 5, rows=False)
    return _bytes(ctx, matmul(ctx, one, other), inputs)


def _bytes(ctx: Context, found: Value, inputs: Sequence[Value | None]) -> Value:
    standing, cause = joined([ctx.as_data(value) for value in inputs if value is not None])
    regions = {region: Entry(_BYTES, lit=_BYTES) for region in found.regions}
    if found.standing > standing:
        standing, cause = found.standing, found.cause
    return Value(found.layout, standing, cause, span=_BYTES, lit=_BYTES, regions=regions)


@rule("QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu", "QGemm", domain=MICROSOFT)
def qlinear(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return elementwise operators of 8-bit integers with given scales."""
    if node.op_type == "QGemm":
        one, other = required(inputs, 0), required(inputs, 3)
        if attribute(node, "transA", 0) or attribute(node, "transB", 0):
            raise NotFollowed("the proof does not support transposed 8-bit products")
        return _bytes(ctx, matmul(ctx, one, other), inputs)
    if node.op_type in {"QLinearAdd", "QLinearMul"}:
        operands = [_numbers(ctx, inputs, at) for at in (0, 3)]
        steps = steps_of(required(inputs, 6), optional(inputs, 7))
        if steps is not None and all(operand is not None for operand in operands):
            function, op = (add, "Add") if node.op_type == "QLinearAdd" else (multiply, "Mul")
            return rounded(pointwise(ctx, function, [one for one in operands if one is not None], op=op), steps)
    wide = [required(inputs, 0), *([required(inputs, 3)] if node.op_type in {"QLinearAdd", "QLinearMul"} else [])]
    return _bytes(ctx, pointwise(ctx, lambda *_each: _BYTES, wide), inputs)


@rule("QLinearSoftmax", domain=MICROSOFT)
def qlinear_softmax(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return the softmax of integers with given scales, along one axis, or before opset 13 all axes from one on."""
    value, steps = _numbers(ctx, inputs, 0), steps_of(required(inputs, 3), optional(inputs, 4))
    if value is None or steps is None:
        raise NotFollowed("the proof does not support scales that are not constant")
    return rounded(softmaxed(ctx, value, softmax_axes(value, node, attribute(node, "opset", 13))), steps)


@rule("QLinearConcat", domain=MICROSOFT)
def qlinear_concat(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return tensors of integers with given scales, joined along an axis."""
    parts = [_numbers(ctx, inputs, at) for at in range(2, len(inputs), 3)]
    steps = steps_of(required(inputs, 0), optional(inputs, 1))
    known = [part for part in parts if part is not None]
    if steps is None or len(known) < len(parts):
        raise NotFollowed("the proof does not support scales that are not constant")
    return rounded(together(ctx, known, attribute(node, "axis") % len(known[0].axes)), steps)


def _numbers(ctx: Context, inputs: Sequence[Value | None], at: int) -> Value | None:
    """Return the numbers of integers that their scale and zero point follow; None where these are not constant."""
    steps = steps_of(required(inputs, at + 1), optional(inputs, at + 2))
    value = ctx.as_data(required(inputs, at))
    return None if steps is None or value.layout is None else scaled_up(value, steps)


@rule("MatMulNBits", "MatMulBnb4", domain=MICROSOFT)
def matmul_n_bits(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return a product with constants of few bits. Activations are rounded by blocks of one row, if at all."""
    value = ctx.as_data(required(inputs, 0))
    others = [other for other in inputs[1:] if other is not None]
    if any(other.varies for other in others[:2]):
        return ctx.unknown("multiplies with packed weights that are not constant")
    standing, cause = joined([value, *(ctx.as_data(other) for other in others)])
    places = {at: at for at in range(len(varying(value.axes[:-1])))}
    layout = (*value.axes[:-1], plain(Size.of(int(attribute(node, "N")))))
    if len(places) != len(varying(value.axes)):
        return ctx.bad(Standing.DIFFERENT, f"sums over {ctx.others} too")
    wild = Interval(wild=4 if wild_anywhere(value) else 0)
    regions = {region: Entry(replace(wild, wild=entry.interval.wild)) for region, entry in value.regions.items()}
    found = Value(layout, standing, cause, span=wild, lit=wild, regions=regions)
    return biased(ctx, found, optional(inputs, 5))
