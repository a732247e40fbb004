"""The rules of elementwise operators, from Abs to Xor, with Clip, Dropout and BatchNormalization.

Operands whose axes are not known to agree raise `NotFollowed`.

In the proof, a varying axis differs in length between a sequence alone and in a batch (or padded); a rule returns
whether its result is equal in both. `NotFollowed` becomes the verdict unknown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import onnx_ir as ir

from attnserve_server.conversion.proof.context import MICROSOFT, Context, rule
from attnserve_server.conversion.proof.functions import BINARY, UNARY, cut, folded, wrapped
from attnserve_server.conversion.proof.helpers import (
    attribute,
    joined,
    number_value,
    optional,
    required,
    whole_type,
    wild_anywhere,
)
from attnserve_server.conversion.proof.intervals import NAN, Interval, add, least, most, number
from attnserve_server.conversion.proof.rules.arithmetic import COMPARISONS, arithmetic, compared, whole_number
from attnserve_server.conversion.proof.rules.choosing import input_name
from attnserve_server.conversion.proof.rules.masking import counted
from attnserve_server.conversion.proof.rules.pointwise import Function, pointwise
from attnserve_server.conversion.proof.rules.taps import places_of_rows
from attnserve_server.conversion.proof.sizes import Size
from attnserve_server.conversion.proof.values import Entry, Standing, Value

_LARGEST_NORM: Final = 1 << 22
"""The number of elements up to which the Euclidean lengths of a constant are computed."""


@rule(*UNARY)
def unary(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return the result of an operator of one operand."""
    value = required(inputs, 0)
    op = node.op_type
    if op == "Neg":
        value_ = arithmetic(ctx, "Sub", [whole_number(0), value])
        if value_ is not None:
            return value_
    if op == "Not" and value.sizes is not None:
        sizes = tuple(None if size is None or size.number is None else Size.of(1 - size.number) for size in value.sizes)
        return replace(pointwise(ctx, UNARY[op], [replace(value, sizes=None)]), sizes=sizes)
    if op in {"Ceil", "Floor", "Identity", "Round"} and value.sizes is not None:
        return value
    if op == "Identity":
        return value
    function = UNARY[op]
    if op in {"Elu", "LeakyRelu", "Selu"} and any(
        not 0 <= attribute(node, name, 0) <= 1 for name in ("alpha", "gamma")
    ):
        function = lambda one: Interval(wild=one.wild | (NAN if one.wild else 0))  # noqa: E731 - steeper than expected
    result = pointwise(ctx, function, [value], op=op)
    if op == "IsNaN":
        return replace(result, raw=f"nan of {node.inputs[0].name if node.inputs[0] else ''}")
    if op in {"Relu", "Gelu", "Tanh", "Neg", "Erf", "Sigmoid"}:
        return replace(result, norm=value.norm, norm_axis=value.norm_axis) if op != "Sigmoid" else result
    return result


@rule("Gelu", "FastGelu", "QuickGelu", "BiasGelu", domain=MICROSOFT)
def gelu(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return onnxruntime's Gelu, with or without a bias."""
    value = required(inputs, 0)
    bias = optional(inputs, 1)
    if bias is not None:
        value = pointwise(ctx, add, [value, bias])
    return pointwise(ctx, UNARY["Gelu"], [value])


@rule("Dropout")
def dropout(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Return the input, unless an input enables training."""
    value, training = required(inputs, 0), optional(inputs, 2)
    if training is not None and training.span.only != 0:
        return [ctx.bad(Standing.DIFFERENT, "drops elements at random, different ones in every run")] * len(
            node.outputs
        )
    return [value, Value(value.layout, span=number(1), lit=number(1))][: len(node.outputs)]


@rule(*BINARY, "Sum", "Mean")
def binary(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return the result of an operator of two operands, or of any number for Max, Min, Sum and Mean."""
    op = node.op_type
    operands = [value for value in inputs if value is not None]
    by_sign = op == "Mod" and bool(attribute(node, "fmod", 0))
    symbolic = None if by_sign else places_of_rows(op, operands) or arithmetic(ctx, op, operands)
    if symbolic is not None:
        return symbolic
    if op in COMPARISONS and len(operands) == 2:
        seen = compared(ctx, op, operands) or counted(ctx, op, operands)
        if seen is not None:
            return seen
    if op == "Mean":
        return pointwise(ctx, lambda *each: Interval(wild=folded(add, each).wild), operands)
    name = "Add" if op == "Sum" else op
    function: Function = BINARY[name]
    if op in {"Max", "Min", "Sum"} or len(operands) > 2:
        result = pointwise(ctx, lambda *each: folded(BINARY[name], each), operands, op=name)
    else:
        if op == "Mul" and node.inputs[0] is node.inputs[1]:
            function = lambda one, _other: BINARY["Pow"](one, number(2))  # noqa: E731 - a square
        kind = whole_type(node, operands)
        if kind is not None:
            function = _in_type(name, function, kind)
        result = pointwise(ctx, function, operands, op=name)
    if name == "Less" and operands[1].raw == f"top of {input_name(node, 0)}":
        return replace(result, raw=f"below {operands[1].raw}")
    if name == "Greater" and operands[0].raw == f"top of {input_name(node, 1)}":
        return replace(result, raw=f"below {operands[0].raw}")
    return _more(name, operands, result)


def _in_type(op: str, function: Function, kind: np.dtype[np.generic]) -> Function:
    """Return a function of integers. Div truncates them, and a narrow type wraps around beyond its bounds."""
    if op == "Div":
        return lambda *each: cut(function(*each))
    if op not in {"Add", "Sub", "Mul"} or (kind.itemsize > 2 and kind.kind == "i"):
        return function
    bounds = np.iinfo(kind.name)
    return lambda *each: wrapped(function(*each), float(bounds.min), float(bounds.max))


def _more(op: str, operands: Sequence[Value], result: Value) -> Value:
    """Return the result with further facts: counts and Euclidean lengths."""
    if op in {"Add", "Sub"} and len(operands) == 2:
        count = _counted_back(op, operands)
        if count is not None:
            return replace(result, count=count[0], masks=count[1], lit=result.span)
    return _with_norm(op, operands, result)


def _counted_back(op: str, operands: Sequence[Value]) -> tuple[int, frozenset[str]] | None:
    """Return a count of allowed positions minus a constant, with its masks. None for other operands."""
    one, other = operands
    if op == "Add" and one.count is None:
        one, other = other, one
    by = other.span.only
    if one.count is None or by is None or not float(by).is_integer():
        return None
    return one.count + int(by if op == "Sub" else -by), one.masks


def _with_norm(op: str, operands: Sequence[Value], result: Value) -> Value:
    """Return the result with its greatest Euclidean length, where those of two operands give it."""
    if len(operands) != 2 or result.layout is None:
        return result
    one, other = operands
    (first, axis), (second, other_axis) = (_norm_within(value, len(result.axes)) for value in operands)
    if op in {"Add", "Sub"} and axis == other_axis and first + second < math.inf:
        return replace(result, norm=first + second, norm_axis=axis)
    if op == "Mul" and first < math.inf and other.span.greatest < math.inf:
        return replace(result, norm=first * other.span.greatest, norm_axis=axis)
    if op == "Mul" and second < math.inf and one.span.greatest < math.inf:
        return replace(result, norm=second * one.span.greatest, norm_axis=other_axis)
    if op == "Div" and first < math.inf and not other.span.has_zero:
        nearest = max(min(abs(other.span.low), abs(other.span.high)), 1e-300)
        return replace(result, norm=first / nearest, norm_axis=axis)
    return result


def _norm_within(value: Value, rank: int) -> tuple[float, int]:
    """Return the greatest Euclidean length of an operand's vectors, and their axis after broadcasting to a rank."""
    if value.norm < math.inf:
        return value.norm, value.norm_axis + rank - len(value.axes)
    content = value.constant
    if content is None or content.size >= _LARGEST_NORM or not content.ndim or content.shape[-1] <= 1:
        return math.inf, -1
    return float(((content.astype(float) ** 2).sum(-1) ** 0.5).max(initial=0.0)), rank - 1


@rule("Clip")
def clip(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return the value between two bounds, which are attributes in old operator sets."""
    result = required(inputs, 0)
    for at, (name, op, function) in enumerate((("min", "Max", most), ("max", "Min", least)), 1):
        given, bound = attribute(node, name), optional(inputs, at)
        if bound is None and given is not None:
            bound = number_value(float(given))
        if bound is None:
            continue
        sizes = result.sizes is not None and bound.sizes is not None
        symbolic = arithmetic(ctx, op, [result, bound]) if sizes else None
        result = pointwise(ctx, function, [result, bound]) if symbolic is None else symbolic
    return result


@rule("HardSwish", "BatchNormalization")
def by_channel(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return each number scaled by constants of its channel. At inference the statistics are constants."""
    value = ctx.as_data(required(inputs, 0))
    others = [other for other in inputs[1:] if other is not None]
    standing, cause = joined([value, *(ctx.as_data(other) for other in others)])
    if attribute(node, "training_mode", 0):
        return ctx.bad(Standing.DIFFERENT, f"normalises over {ctx.others} too, as in training")
    entries = {region: Entry(Interval(wild=entry.interval.wild)) for region, entry in value.regions.items()}
    return Value(value.layout, standing, cause, span=Interval(wild=wild_anywhere(value)), regions=entries)
