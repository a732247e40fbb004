"""The rules of MatMul, Gemm, Einsum and their fused forms: products, summed over an axis.

A sum over a varying axis is equal only if padded elements are 0 in one operand and finite in the other. Otherwise it is
different, or unknown where NaN may occur. Shapes that are not known to agree raise `NotFollowed`.

In the proof, a varying axis differs in length between a sequence alone and in a batch (or padded); a rule returns
whether its result is equal in both. `NotFollowed` becomes the verdict unknown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from attnserve_server.conversion.proof.context import MICROSOFT, SUM_OVER_ROWS, Context, rule
from attnserve_server.conversion.proof.helpers import attribute, joined, optional, required, wild_anywhere
from attnserve_server.conversion.proof.intervals import NAN, ZERO, Interval, add, multiply, number
from attnserve_server.conversion.proof.layout import (
    PLAIN_ONE,
    Axis,
    NotFollowed,
    alike,
    is_one,
    is_plain,
    ordinals,
    size_of,
)
from attnserve_server.conversion.proof.rules.pointwise import pointwise
from attnserve_server.conversion.proof.rules.reshaping import permuted
from attnserve_server.conversion.proof.values import Entry, Region, Standing, Value

NO_BOUND = 1e12
LARGEST_NORM = 1 << 22
"""The number of elements up to which a matrix's greatest singular value is computed. Larger ones use the Frobenius
norm."""


def product(ctx: Context, one: Value, first: str, other: Value, second: str, kept: str) -> Value:
    """Return a sum of products in Einstein's notation, with a letter for each axis.

    Args:
        ctx: The interpretation.
        one: An operand.
        first: Its axes.
        other: The other operand.
        second: Its axes.
        kept: The axes of the result. Letters that are not in it are summed over.

    Raises:
        NotFollowed: Ranks or lengths are not known to agree.
    """
    one, other = ctx.as_data(one), ctx.as_data(other)
    if len(first) != len(one.axes) or len(second) != len(other.axes):
        raise NotFollowed("multiplies tensors of unexpected rank")
    axes: dict[str, Axis] = {}
    for letters, value in ((first, one), (second, other)):
        for letter, axis in zip(letters, value.axes, strict=True):
            known = axes.get(letter)
            if known is None or is_one(known):
                axes[letter] = axis
            elif not is_one(axis) and not alike(known, axis):
                raise NotFollowed("axes of a MatMul are not known to have equal lengths")
    standing, cause = joined([one, other])
    for letter in dict.fromkeys(first + second):
        if letter in kept or is_plain(axes[letter]):
            continue
        kind, why = _summed(ctx, letter, axes[letter], (first, one), (second, other))
        if kind > standing:
            standing, cause = kind, ctx.cause(why)
    layout = tuple(axes[letter] for letter in kept)
    places_of = {letter: ordinals(layout, at) for at, letter in enumerate(kept)}
    bits = wild_anywhere(one) | wild_anywhere(other)
    # A sum of products of non-negative numbers is not negative.
    low = 0.0 if one.span.low >= 0 and other.span.low >= 0 else -math.inf
    regions = _regions(places_of, (first, one), (second, other), Interval(low, wild=NAN if bits else 0))
    most = _most(axes, kept, (first, one), (second, other))
    span = Interval(max(low, -most), most, NAN if bits else 0)
    result = Value(layout, standing, cause, span=span, lit=span, regions=regions)
    return _with_norm(ctx, result, (first, one), (second, other), kept)


Operand = tuple[str, Value]


def _summed(ctx: Context, letter: str, axis: Axis, *operands: Operand) -> tuple[Standing, str]:
    """Return the standing of a sum over a varying axis: equal if padding adds 0 times a finite number."""
    count = sum(factor.varies for factor in axis)
    if ctx.is_batch:
        return Standing.DIFFERENT, SUM_OVER_ROWS
    for place in range(count):
        entries = []
        for letters, value in operands:
            if letter not in letters:
                continue
            own = ordinals(value.axes, letters.index(letter))
            entries.append(value.pad(own[place]) if own else Entry(value.span))
        if any(entry.interval.wild for entry in entries):
            reason = f"sums over {ctx.others} too, which may hold infinities or NaN: 0 times these is NaN"
            return Standing.UNKNOWN, reason
        if not any(entry.only == 0 for entry in entries):
            return Standing.DIFFERENT, f"sums over {ctx.others} too"
    return Standing.EQUAL, ""


def _regions(places_of: dict[str, list[int]], one: Operand, other: Operand, any_: Interval) -> dict[Region, Entry]:
    regions: dict[Region, Entry] = {}
    for letter, places in places_of.items():
        for count, place in enumerate(places):
            entries = []
            for letters, value in (one, other):
                if letter in letters:
                    own = ordinals(value.axes, letters.index(letter))
                    if count < len(own):
                        entries.append(value.pad(own[count]))
            zero = any(entry.only == 0 for entry in entries) and not any_.wild
            regions["pad", place, place] = Entry(ZERO if zero else any_)
    return regions


def _most(axes: dict[str, Axis], kept: str, one: Operand, other: Operand) -> float:
    """Return the greatest absolute value of a result, by Euclidean lengths or by the number of summed products."""
    gone = [letter for letter in axes if letter not in kept]
    lengths = []
    for letters, value in (one, other):
        inside = [letter for letter in gone if letter in letters]
        if len(inside) != 1 or value.norm_axis != letters.index(inside[0]):
            lengths.append(math.inf)
        else:
            lengths.append(value.norm)
    most = lengths[0] * lengths[1] if math.inf not in lengths else math.inf
    count = 1.0
    for letter in gone:
        count *= size_of(axes[letter]).bounds()[1]
    greatest = (one[1].span.greatest, other[1].span.greatest)
    if math.inf not in greatest and count < math.inf:
        most = min(most, count * greatest[0] * greatest[1])
    # A bound this wide is no bound. With real weights, results stay far from overflow.
    return most if most < NO_BOUND else math.inf


def _with_norm(ctx: Context, result: Value, one: Operand, other: Operand, kept: str) -> Value:
    """Return the result with the length of a vector times a matrix of constants."""
    letters, matrix = other
    last = kept[-1] if kept else ""
    if matrix.constant is None or matrix.constant.ndim != 2 or letters[-1] != last:
        return result
    if one[1].norm == math.inf or one[0][one[1].norm_axis] != letters[0] or not ctx.bounds:
        return result
    greatest, widest = _matrix_norms(ctx, matrix)
    length = one[1].norm * greatest
    most = min(result.span.greatest, one[1].norm * widest)
    span = Interval(-most, most, result.span.wild)
    return replace(result, norm=length, norm_axis=len(kept) - 1, span=span, lit=span)


def _matrix_norms(ctx: Context, matrix: Value) -> tuple[float, float]:
    """Return the greatest singular value (or an upper bound), and the greatest length of a column."""
    assert matrix.constant is not None
    key = id(matrix.constant)
    if key not in ctx.norms:
        wide = matrix.constant.astype(np.float64)
        columns = float(np.sqrt((wide * wide).sum(0)).max(initial=0.0))
        if wide.size <= LARGEST_NORM and min(wide.shape, default=0):
            short = wide.T @ wide if wide.shape[0] > wide.shape[1] else wide @ wide.T
            greatest = math.sqrt(max(float(np.linalg.eigvalsh(short)[-1]), 0.0)) * (1 + 1e-6)
        else:
            greatest = float(np.sqrt((wide * wide).sum()))
        ctx.norms[key] = (matrix.constant, (greatest, columns))
    found: tuple[float, float] = ctx.norms[key][1]
    return found


def matmul(ctx: Context, one: Value, other: Value) -> Value:
    """Return a MatMul by NumPy's rules."""
    vectors = (len(one.axes) == 1, len(other.axes) == 1)
    left = one if not vectors[0] else _lifted(one)
    right = other if not vectors[1] else _lifted(other)
    leading = max(len(left.axes), len(right.axes)) - 2
    letters = "abcdefghij"[:leading]
    first = letters[leading - (len(left.axes) - 2) :] + "mk"
    second = letters[leading - (len(right.axes) - 2) :] + "kn"
    kept = letters + ("" if vectors[0] else "m") + ("" if vectors[1] else "n")
    if vectors[0]:
        first, left = first.replace("m", ""), one
    if vectors[1]:
        second, right = second.replace("n", ""), other
    return product(ctx, left, first, right, second, kept)


def _lifted(value: Value) -> Value:
    return replace(value, layout=(PLAIN_ONE, *value.axes))


@rule("MatMul")
def matmul_(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return the product of matrices."""
    return matmul(ctx, required(inputs, 0), required(inputs, 1))


@rule("FusedMatMul", "TransposeMatMul", domain=MICROSOFT)
def fused_matmul(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return the product of matrices, transposed first where attributes select it, times a number."""
    values = []
    for at, name in enumerate(("transA", "transB")):
        value = required(inputs, at)
        if attribute(node, f"transBatch{name[-1]}", 0):
            raise NotFollowed("the proof does not support a MatMul with transposed batch axes")
        if attribute(node, name, 0):
            rank = len(value.axes)
            value = permuted(value, [*range(rank - 2), rank - 1, rank - 2])
        values.append(value)
    return scaled(ctx, matmul(ctx, *values), float(attribute(node, "alpha", 1.0)))


def scaled(ctx: Context, value: Value, by: float) -> Value:
    """Return a value times a number."""
    if by == 1:
        return value
    factor = Value((), span=number(by), lit=number(by))
    found = pointwise(ctx, multiply, [value, factor], op="Mul")
    return replace(found, norm=value.norm * abs(by), norm_axis=value.norm_axis)


@rule("Gemm")
def gemm(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return a product of two matrices, plus a bias."""
    values = []
    for at, name in enumerate(("transA", "transB")):
        value = required(inputs, at)
        values.append(permuted(value, [1, 0]) if attribute(node, name, 0) else value)
    found = scaled(ctx, matmul(ctx, *values), float(attribute(node, "alpha", 1.0)))
    return biased(ctx, found, optional(inputs, 2))


def biased(ctx: Context, value: Value, bias: Value | None) -> Value:
    """Return a value plus a bias, if there is one."""
    if bias is None:
        return value
    found = pointwise(ctx, add, [value, bias], op="Add")
    if bias.constant is not None and value.norm < math.inf:
        length = float(np.sqrt((bias.constant.astype(float) ** 2).sum()))
        return replace(found, norm=value.norm + length, norm_axis=value.norm_axis)
    return found


@rule("Einsum")
def einsum(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return an Einsum of one or two operands."""
    equation = str(attribute(node, "equation")).replace(" ", "")
    left, arrow, kept = equation.partition("->")
    terms = left.split(",")
    values = [required(inputs, at) for at in range(len(terms))]
    if "." in equation or not arrow or len(terms) > 2 or any(len(set(term)) != len(term) for term in terms):
        raise NotFollowed(f"the proof does not support the equation {equation}")
    if len(terms) == 1:
        one = Value((), span=number(1), lit=number(1))
        return product(ctx, values[0], terms[0], one, "", kept)
    return product(ctx, values[0], terms[0], values[1], terms[1], kept)


def times(ctx: Context, values: Sequence[Value]) -> Value:
    """Return the elementwise product of values."""
    found = values[0]
    for other in values[1:]:
        found = pointwise(ctx, multiply, [found, other], op="Mul")
    return found
