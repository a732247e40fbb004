"""Operators by elements: each number of the result depends on the numbers in its own place, so nothing is mixed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import onnx_ir as ir

from attnserve_server.build.proof.context import (
    MICROSOFT,
    MOST_SIZES,
    Context,
    aligned,
    attribute,
    entry_at,
    index_value,
    joined,
    numbers,
    optional,
    regions_over,
    required,
    rule,
    wild_anywhere,
)
from attnserve_server.build.proof.intervals import (
    BINARY,
    BOOLEAN,
    NAN,
    UNARY,
    Interval,
    add,
    as_truth,
    as_whole,
    chosen,
    folded,
    least,
    most,
    negated,
    number,
    subtract,
)
from attnserve_server.build.proof.layout import Layout, NotFollowed, varying
from attnserve_server.build.proof.rules.counting import counted, places_of_rows
from attnserve_server.build.proof.rules.sized import of_sizes, sizes_array, sizes_value
from attnserve_server.build.proof.sizes import Size, floor_div, greater, lesser, modulo
from attnserve_server.build.proof.values import Entry, Standing, Value

Function = Callable[..., Interval]

_COMPARISONS: Final = {"Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"}
_LOWERS_FROM: Final = 1.0
"""What a mask takes off a score is at least this much; less is an ordinary bias."""


def pointwise(ctx: Context, function: Function, operands: Sequence[Value], *, op: str = "") -> Value:
    """The result of a function of the operands' numbers, place by place."""
    operands = [ctx.as_data(value) for value in operands]
    layout, placed = aligned(operands)
    span = function(*(value.span for value in operands))
    lit = function(*(value.lit for value in operands))
    regions = {}
    for region in regions_over(placed):
        entry = _entry(function, op, [entry_at(value, places, region) for value, places in placed])
        regions[region] = entry
    hides = any(entry.only is not None or entry.lowered for entry in regions.values())
    hides = hides or bool(span.wild or not layout_varies(layout)) and any(value.masks for value in operands)
    # A window says nothing of regions, and yet that every position sees itself.
    hides = hides or (lit.only is not None and any(value.structured for value in operands))
    standing, cause = joined(operands)
    result = Value(layout, standing, cause, span=span, lit=lit if hides else span, regions=regions)
    if not hides:
        return result
    return replace(
        result,
        masks=frozenset().union(*(value.masks for value in operands)),
        along=frozenset(places[factor] for value, places in placed for factor in value.along if factor in places),
        structured=frozenset(places[at] for value, places in placed for at in value.structured if at in places),
    )


def layout_varies(layout: Layout) -> bool:
    """Whether any axis of a layout varies."""
    return bool(varying(layout))


def _entry(function: Function, op: str, entries: Sequence[Entry]) -> Entry:
    """What is known of the elements of one region."""
    lit = function(*(entry.lit for entry in entries))
    if op in {"Add", "Sub"} and len(entries) == 2:
        lowered = _lowered(op, *entries)
        if lowered is not None:
            return replace(lowered, lit=lit)
    if op in {"Mul", "Div"} and len(entries) == 2:
        scaled = _scaled(function, op, *entries)
        if scaled is not None:
            return replace(scaled, lit=lit)
    if op == "Where":
        condition, one, other = entries
        picked = one if condition.interval.only == 1 else other if condition.interval.only == 0 else None
        if picked is not None:
            return replace(picked, lit=lit)
    if op == "Same":
        return replace(entries[0], lit=lit)
    return Entry(function(*(_plain(entry) for entry in entries)), lit=lit)


def _plain(entry: Entry) -> Interval:
    """The interval of a region's elements, what was taken off included."""
    return entry.interval if not entry.lowered else add(entry.interval, number(-entry.lowered))


def _lowered(op: str, one: Entry, other: Entry) -> Entry | None:
    """The sum of a score and a mask, or of two masks."""
    if op == "Sub":
        if other.lowered:
            return None
        other = Entry(negated(other.interval))
    for score, mask in ((one, other), (other, one)):
        taken = mask.interval.only
        if mask.lowered or taken is None or taken > -_LOWERS_FROM:
            continue
        if score.interval.only is not None and not score.lowered:
            return None  # a number plus a number is a number
        if math.isinf(taken):
            bad = score.interval.wild & ~1
            return Entry(number(-math.inf)) if not bad else None
        return Entry(score.interval, score.lowered - taken)
    if one.lowered or other.lowered:
        return Entry(add(one.interval, other.interval), one.lowered + other.lowered)
    return None


def _scaled(function: Function, op: str, one: Entry, other: Entry) -> Entry | None:
    """A lowered score times a positive constant."""
    if op == "Mul" and other.lowered and not one.lowered:
        one, other = other, one
    by = other.interval.only
    if not one.lowered or other.lowered or by is None or by <= 0 or math.isinf(by):
        return None
    return Entry(function(one.interval, other.interval), function(number(one.lowered), other.interval).low)


@rule(*UNARY)
def unary(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """One operand."""
    value = required(inputs, 0)
    op = node.op_type
    if op == "Neg":
        value_ = _arithmetic(ctx, "Sub", [_whole(0), value])
        if value_ is not None:
            return value_
    if op == "Not" and value.sizes is not None:
        sizes = tuple(None if size is None or size.number is None else Size.of(1 - size.number) for size in value.sizes)
        return replace(pointwise(ctx, UNARY[op], [replace(value, sizes=None)]), sizes=sizes)
    if op in {"Ceil", "Floor", "Identity", "Round"} and value.sizes is not None:
        return value
    if op == "Identity":
        return value
    result = pointwise(ctx, UNARY[op], [value], op=op)
    if op == "IsNaN":
        return replace(result, raw=f"nan of {node.inputs[0].name if node.inputs[0] else ''}")
    if op in {"Relu", "Gelu", "Tanh", "Neg", "Erf", "Sigmoid"}:
        return replace(result, norm=value.norm, norm_axis=value.norm_axis) if op != "Sigmoid" else result
    return result


@rule("Gelu", "FastGelu", "QuickGelu", "BiasGelu", domain=MICROSOFT)
def gelu(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Gelu of onnxruntime, with or without a bias."""
    value = required(inputs, 0)
    bias = optional(inputs, 1)
    if bias is not None:
        value = pointwise(ctx, add, [value, bias])
    return pointwise(ctx, UNARY["Gelu"], [value])


@rule("Dropout")
def dropout(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Identity: a graph that is served does not train."""
    value = required(inputs, 0)
    return [value, Value(value.layout, span=number(1), lit=number(1))][: len(node.outputs)]


@rule("Cast", "CastLike")
def cast(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Another type: sizes, positions and masks stay what they are."""
    value = required(inputs, 0)
    kind = ir.DataType(attribute(node, "to", int(ir.DataType.FLOAT))) if node.op_type == "Cast" else None
    if kind is ir.DataType.BOOL:
        found = pointwise(ctx, as_truth, [value])
        sizes = None
        if value.sizes is not None:
            sizes = tuple(_truth_of(size) for size in value.sizes)
        return replace(found, sizes=sizes, raw=value.raw if value.raw.startswith("below ") else "")
    whole = kind is not None and kind not in {
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.DOUBLE,
        ir.DataType.BFLOAT16,
    }
    function = as_whole if whole else (lambda interval: interval)
    if value.symbols or value.sizes is not None or value.index is not None or value.count is not None or value.raw:
        return replace(value, constant=None if value.constant is None else value.constant)
    result = pointwise(ctx, function, [value], op="" if whole else "Same")
    return replace(result, norm=value.norm, norm_axis=value.norm_axis) if not whole else result


def _truth_of(size: Size | None) -> Size | None:
    if size is None:
        return None
    low, high = size.bounds()
    return Size.of(1) if low > 0 or high < 0 else Size.of(0) if size.number == 0 else None


@rule(*BINARY, "Sum", "Mean")
def binary(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Two operands, or any number for Max, Min, Sum and Mean."""
    op = node.op_type
    operands = [value for value in inputs if value is not None]
    by_sign = op == "Mod" and bool(attribute(node, "fmod", 0))
    symbolic = None if by_sign else _arithmetic(ctx, op, operands) or places_of_rows(op, operands)
    if symbolic is not None:
        return symbolic
    if op in _COMPARISONS and len(operands) == 2:
        seen = _compared(ctx, op, operands) or counted(ctx, op, operands)
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
        result = pointwise(ctx, function, operands, op=name)
    if name == "Less" and operands[1].raw == f"top of {_name(node, 0)}":
        return replace(result, raw=f"below {operands[1].raw}")
    if name == "Greater" and operands[0].raw == f"top of {_name(node, 1)}":
        return replace(result, raw=f"below {operands[0].raw}")
    return _more(ctx, name, operands, result)


def _more(ctx: Context, op: str, operands: Sequence[Value], result: Value) -> Value:
    """What else follows: positions, counts, Euclidean lengths."""
    if op in {"Add", "Sub"} and len(operands) == 2:
        count = _counted_back(op, operands)
        if count is not None:
            return replace(result, count=count[0], masks=count[1], lit=result.span)
    return _with_norm(op, operands, result)


def _counted_back(op: str, operands: Sequence[Value]) -> tuple[int, frozenset[str]] | None:
    """A count of allowed positions, minus a constant."""
    one, other = operands
    if op == "Add" and one.count is None:
        one, other = other, one
    by = other.span.only
    if one.count is None or by is None or not float(by).is_integer():
        return None
    return one.count + int(by if op == "Sub" else -by), one.masks


def _with_norm(op: str, operands: Sequence[Value], result: Value) -> Value:
    if len(operands) != 2 or result.layout is None:
        return result
    one, other = operands
    rank = len(result.axes)

    def norm_of(value: Value) -> tuple[float, int]:
        if value.norm < math.inf:
            return value.norm, value.norm_axis + rank - len(value.axes)
        if value.layout is not None and value.constant is not None and value.constant.size < 1 << 22:
            axis = rank - 1
            wide = value.constant.astype(float)
            if wide.ndim and wide.shape[-1] > 1:
                return float(((wide**2).sum(-1) ** 0.5).max(initial=0.0)), axis
        return math.inf, -1

    (first, axis), (second, other_axis) = norm_of(one), norm_of(other)
    if op in {"Add", "Sub"} and axis == other_axis and first + second < math.inf:
        return replace(result, norm=first + second, norm_axis=axis)
    if op in {"Mul", "Div"}:
        for norm, at, by in ((first, axis, other.span), (second, other_axis, one.span)):
            if op == "Div" and by is one.span:
                continue
            factor = by.greatest if op == "Mul" else 1 / max(min(abs(by.low), abs(by.high)), 1e-300)
            if op == "Div" and by.has_zero:
                continue
            if norm < math.inf and factor < math.inf:
                return replace(result, norm=norm * factor, norm_axis=at)
    return result


@rule("Where")
def where(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """One of two operands, by a condition."""
    condition, one, other = (required(inputs, at) for at in range(3))
    symbolic = _chosen_sizes(condition, one, other)
    if symbolic is not None:
        return symbolic
    if one.items == "rows" and other.sizes is not None and _is_lesser(node):
        return one
    condition = ctx.as_data(condition)
    if condition.raw.startswith("below ") and condition.raw == f"below top of {_name(node, 2)}":
        # What is below the k-th greatest is hidden: the greatest is not.
        found = pointwise(ctx, chosen, [condition, one, other], op="Where")
        return replace(found, lit=other.lit, masks=other.masks, along=other.along, structured=other.structured)
    if condition.raw == f"nan of {node.inputs[2].name if node.inputs[2] else ''}" and condition.raw != "nan of ":
        other = _without_nan(other)
    if condition.standing is Standing.EQUAL and condition.span.only is not None and not condition.varies:
        picked = one if condition.span.only else other
        layout, placed = aligned([condition, one, other])
        if picked.layout == layout:
            return picked
    return pointwise(ctx, chosen, [condition, one, other], op="Where")


def _is_lesser(node: ir.Node) -> bool:
    """Whether a node chooses the lesser of its two operands."""
    condition = node.inputs[0]
    less = condition.producer() if condition is not None else None
    return less is not None and less.op_type == "Less" and list(less.inputs) == list(node.inputs[1:])


def _name(node: ir.Node, at: int) -> str:
    value = node.inputs[at] if at < len(node.inputs) else None
    return str(value.name) if value is not None else ""


def _without_nan(value: Value) -> Value:
    def tame(interval: Interval) -> Interval:
        return replace(interval, wild=interval.wild & ~NAN)

    regions = {
        region: replace(entry, interval=tame(entry.interval), lit=tame(entry.lit))
        for region, entry in value.regions.items()
    }
    return replace(value, span=tame(value.span), lit=tame(value.lit), regions=regions)


def _chosen_sizes(condition: Value, one: Value, other: Value) -> Value | None:
    if condition.sizes is None or one.sizes is None or other.sizes is None:
        return None
    count = max(len(condition.sizes), len(one.sizes), len(other.sizes))
    wide = [_repeated(value.sizes, count) for value in (condition, one, other) if value.sizes is not None]
    sizes = tuple(
        (yes if truth.number else no) if truth is not None and truth.number is not None else yes if yes == no else None
        for truth, yes, no in zip(*wide, strict=True)
    )
    if any(size is None for size in sizes):
        return None
    longest = max((condition, one, other), key=lambda value: len(value.axes))
    return sizes_value(longest, sizes)


def _whole(value: int) -> Value:
    return Value((), span=number(value), lit=number(value), sizes=(Size.of(value),))


def _repeated(sizes: Sequence[Size | None] | None, count: int) -> list[Size | None]:
    found = list(sizes or ())
    return found * count if len(found) == 1 else found


def _arithmetic(ctx: Context, op: str, operands: Sequence[Value]) -> Value | None:
    """Arithmetic with sizes, and with positions; None where there is neither."""
    if len(operands) < 2 or any(value.layout is None for value in operands):
        return None
    if all(value.sizes is not None for value in operands):
        arrays = [array for array in map(sizes_array, operands) if array is not None]
        if len(arrays) != len(operands):
            return None
        wide = np.broadcast_arrays(*arrays)
        if wide[0].size > MOST_SIZES:
            return None
        sizes = [_of_sizes(ctx, op, each) for each in zip(*(array.reshape(-1) for array in wide), strict=True)]
        if all(size is not None for size in sizes):
            return of_sizes(sizes, wide[0].shape)
        symbols = [size.symbols for value in operands for size in value.sizes or () if size is not None]
        if not any(symbols):
            return None
        longest, _ = aligned(operands)
        # A number of sizes that is no polynomial: as a shape it is not followed, as a number it depends on them.
        span = BOOLEAN if op in _COMPARISONS else Interval()
        symbols += [value.symbols for value in operands]
        return Value(longest, span=span, lit=span, symbols=frozenset().union(*symbols))
    if all(value.sizes is not None or value.symbols for value in operands):
        symbols = [value.symbols for value in operands]
        symbols += [size.symbols for value in operands for size in value.sizes or () if size is not None]
        layout, _ = aligned(operands)
        return Value(layout, symbols=frozenset().union(*symbols))
    return _positions(ctx, op, operands) if len(operands) == 2 else None


def _of_sizes(ctx: Context, op: str, each: Sequence[Size | None]) -> Size | None:
    known = [size for size in each if size is not None]
    if len(known) != len(each):
        return None
    if op in {"Add", "Sum", "Mul", "Min", "Max"}:
        fold = {"Mul": lambda one, other: one * other, "Min": lesser, "Max": greater}.get(
            op, lambda one, other: one + other
        )
        result = known[0]
        for other in known[1:]:
            result = fold(result, other)
        return result
    one, other = known[0], known[1]
    if op == "Sub":
        return one - other
    if op in {"Div", "Mod"}:
        if other.bounds()[0] < 1:
            return None
        if op == "Mod":
            return modulo(one, other)
        return None if one.bounds()[0] < 0 and one.over(other) is None else floor_div(one, other)
    if op in _COMPARISONS:
        return _compared_sizes(ctx, op, one, other)
    if op in {"And", "Or"} and one.number is not None and other.number is not None:
        truths = (bool(one.number), bool(other.number))
        return Size.of(int(all(truths) if op == "And" else any(truths)))
    return None


def _compared_sizes(ctx: Context, op: str, one: Size, other: Size) -> Size | None:
    difference = (one - other).bounds()
    for size, against in ((one, other), (other, one)):
        if ctx.depends(size) and against.number is not None and against.number > 0:
            ctx.thresholds.add(against.number)
    found = BINARY[op](Interval(*difference), number(0)).only
    return None if found is None else Size.of(int(found))


def _positions(ctx: Context, op: str, operands: Sequence[Value]) -> Value | None:
    """Sums of positions, and their products with sizes."""
    if op not in {"Add", "Sub", "Mul"} or any(value.standing is not Standing.EQUAL for value in operands):
        return None
    if all(value.index is None and value.below is None for value in operands):
        return None
    layout, placed = aligned(operands)
    places = [_place(value, there) for value, there in placed]
    if places[0] is None or places[1] is None:
        return None
    found = _scaled_place(places[0], places[1]) if op == "Mul" else _summed_places(places[0], places[1], op)
    if found is None or (not found.index and found.outer is None and found.below is None and not found.plain):
        return None
    whole = index_value(ctx, layout, found.index, found.offset, outer=found.outer, below=found.below)
    return replace(whole, valid=found.valid) if found.valid else whole


@dataclass(frozen=True)
class _Place:
    """Positions along factors, an offset, multiples of `outer` by plain numbers, and a plain number below `below`."""

    index: dict[int, Size]
    offset: Size
    outer: Size | None = None
    below: Size | None = None
    plain: bool = False
    valid: bool = False


def _place(value: Value, places: Mapping[int, int]) -> _Place | None:
    if value.index is not None:
        index = {places[at]: by for at, by in value.index.items()}
        return _Place(index, value.offset or Size.of(0), value.outer, value.below)
    if value.below is not None:
        return _Place({}, Size.of(0), below=value.below, valid=value.valid)
    if value.offset is not None:
        return _Place({}, value.offset, plain=True)
    if value.sizes is not None and len(value.sizes) == 1 and value.sizes[0] is not None:
        return _Place({}, value.sizes[0], plain=True)
    return None


def _scaled_place(one: _Place, other: _Place) -> _Place | None:
    if one.plain:
        one, other = other, one
    if not other.plain or one.outer is not None:
        return None
    by = other.offset
    index = {at: times * by for at, times in one.index.items()}
    # A plain number times a size is a multiple of it.
    return _Place(index, one.offset * by, outer=by if one.below is not None else None, plain=one.plain)


def _summed_places(one: _Place, other: _Place, op: str) -> _Place | None:
    if (one.outer and other.outer) or (one.below and other.below):
        return None
    if op == "Sub" and (other.outer is not None or other.below is not None):
        return None
    sign = Size.of(1 if op != "Sub" else -1)
    zero = Size.of(0)
    index = {at: one.index.get(at, zero) + sign * other.index.get(at, zero) for at in {*one.index, *other.index}}
    offset = one.offset + sign * other.offset
    plain = one.plain and other.plain
    valid = one.valid or other.valid
    return _Place(index, offset, one.outer or other.outer, one.below or other.below, plain, valid)


def distance(ctx: Context, queries: Value, keys: Value) -> Value:
    """How far each query stands behind each key, with what is known by that alone."""
    found = _positions(ctx, "Sub", [queries, keys])
    if found is None:
        raise NotFollowed("positions of queries and keys cannot be compared")
    return found


def _compared(ctx: Context, op: str, operands: Sequence[Value]) -> Value | None:
    """Positions compared with positions, or with a size."""
    if all(value.index is None for value in operands):
        return None
    if any(value.outer is not None or value.below is not None for value in operands):
        return None
    difference = _positions(ctx, "Sub", operands)
    if difference is None:
        return None
    by = numbers(operands[1]) or numbers(operands[0])
    if by and len(by) == 1 and by[0] > 1:
        ctx.thresholds.add(by[0])
    zero = Value((), span=number(0), lit=number(0))
    return pointwise(ctx, BINARY[op], [difference, zero], op=op)


@rule("Clip")
def clip(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Between two bounds, which are attributes in old operator sets."""
    value = required(inputs, 0)
    low, high = optional(inputs, 1), optional(inputs, 2)
    bounds = []
    for given, name in ((low, "min"), (high, "max")):
        plain = attribute(node, name)
        bounds.append(given if given is not None else None if plain is None else _number_value(float(plain)))
    result = value
    for bound, function in ((bounds[0], most), (bounds[1], least)):
        if bound is not None:
            if result.sizes is not None and bound.sizes is not None:
                folded_ = _arithmetic(ctx, "Max" if function is most else "Min", [result, bound])
                if folded_ is not None:
                    result = folded_
                    continue
            result = pointwise(ctx, function, [result, bound])
    return result


def _number_value(value: float) -> Value:
    return Value((), span=number(value), lit=number(value))


@rule("HardSwish", "BatchNormalization")
def by_channel(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Each number scaled by constants of its channel: statistics are the constants' own at inference."""
    value = ctx.as_data(required(inputs, 0))
    others = [other for other in inputs[1:] if other is not None]
    standing, cause = joined([value, *others])
    entries = {region: Entry(Interval(wild=entry.interval.wild)) for region, entry in value.regions.items()}
    return Value(value.layout, standing, cause, span=Interval(wild=wild_anywhere(value)), regions=entries)


__all__ = ["pointwise", "sizes_value", "subtract"]
