"""The rules of reductions and running sums. Padded elements must be neutral, or the result is different.

Axes that are computed raise `NotFollowed`.

In the proof, a varying axis differs in length between a sequence alone and in a batch (or padded); a rule returns
whether its result is equal in both. `NotFollowed` becomes the verdict unknown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import onnx_ir as ir

from attnserve_server.conversion.proof.context import Context, rule
from attnserve_server.conversion.proof.helpers import (
    attribute,
    numbers,
    optional,
    required,
    sizes_value,
    wild_anywhere,
)
from attnserve_server.conversion.proof.intervals import MASKED_FROM, NAN, NEGATIVE, Interval
from attnserve_server.conversion.proof.layout import (
    PLAIN_ONE,
    Layout,
    NotFollowed,
    Places,
    ordinals,
    size_of,
    varying,
)
from attnserve_server.conversion.proof.rules.masking import as_count
from attnserve_server.conversion.proof.sizes import product
from attnserve_server.conversion.proof.values import EXACTLY_HIDDEN, HALF_HIDDEN, Entry, Standing, Value

_NEUTRAL: Final = {
    "ReduceSum": 0.0,
    "ReduceL1": 0.0,
    "ReduceL2": 0.0,
    "ReduceSumSquare": 0.0,
    "ReduceProd": 1.0,
    "ReduceLogSumExp": -math.inf,
    "ReduceMax": -math.inf,
    "ReduceMin": math.inf,
}
"""The neutral number. A mean has none, because it divides by the number of elements."""
_WORDS: Final = {
    "ReduceMean": "takes the mean over",
    "ReduceSum": "sums over",
    "ReduceMax": "takes the maximum over",
    "ReduceMin": "takes the minimum over",
}


@rule(
    "ReduceSum",
    "ReduceMean",
    "ReduceMax",
    "ReduceMin",
    "ReduceProd",
    "ReduceL1",
    "ReduceL2",
    "ReduceSumSquare",
    "ReduceLogSum",
    "ReduceLogSumExp",
)
def reduce(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return the reduction of a value along some axes."""
    given = required(inputs, 0)
    op = node.op_type
    if op == "ReduceProd" and given.sizes is not None and all(size is not None for size in given.sizes):
        total = product(size for size in given.sizes if size is not None)
        keep = bool(attribute(node, "keepdims", 1))
        return sizes_value(Value((PLAIN_ONE,) if keep else (), floating=given.floating), [total])
    value = ctx.as_data(given)
    rank = len(value.axes)
    axes = attribute(node, "axes")
    if axes is None and optional(inputs, 1) is not None:
        axes = numbers(inputs[1])
        if axes is None:
            raise NotFollowed("the proof cannot follow computed axes")
    if not axes:
        if attribute(node, "noop_with_empty_axes", 0):
            if op in {"ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd"}:
                return value
            raise NotFollowed("reduces along no axes")
        axes = list(range(rank))
    axes = sorted({axis % rank for axis in axes})
    return reduced(ctx, op, value, axes, keep=bool(attribute(node, "keepdims", 1)))


def reduced(ctx: Context, op: str, value: Value, axes: Sequence[int], *, keep: bool) -> Value:
    """Return the reduction of a value along known axes."""
    layout, places = without(value.axes, axes, keep=keep)
    gone = [place for at in axes for place in ordinals(value.axes, at)]
    standing, cause = value.standing, value.cause
    for place in gone:
        if not _neutral(op, value, place, HALF_HIDDEN if ctx.precision == "fp16" else EXACTLY_HIDDEN):
            word = _WORDS.get(op, f"reduces ({op})")
            worse, reason = Standing.DIFFERENT, f"{word} {ctx.others} too"
            if op == "ReduceMax" and not ctx.is_batch and value.pad(place).high <= MASKED_FROM:
                worse, reason = Standing.ASSUMED, f"finite mask, unbounded values: {word} {ctx.others} too"
            if worse > standing:
                standing, cause = worse, ctx.cause(reason)
    regions = {}
    for (kind, one, other), entry in value.regions.items():
        if one in places and other in places and kind == "pad":
            interval = _plain(entry)
            known = _span(op, interval, value, axes)
            regions[kind, places[one], places[other]] = Entry(known, lit=entry.lit)
    count = _span(op, replace(value.span, wild=wild_anywhere(value)), value, axes)
    if op == "ReduceMax" and not value.lit.wild and count.wild == NEGATIVE:
        # The maximum is no less than the visible elements.
        ctx.need(value.masks, everything=len(value.masks) > 1 or bool(value.structured))
        count = Interval(max(count.low, value.lit.low), count.high)
        regions = {region: _of_rows_with_a_key(entry) for region, entry in regions.items()}
    result = Value(layout, standing, cause, span=count, lit=count, regions=regions)
    if (
        op == "ReduceSum"
        and len(gone) == 1
        and not any(is_wide(value.axes, at, ordinals(value.axes, at)) for at in axes)
    ):
        return as_count(value, result)
    return result


def _of_rows_with_a_key(entry: Entry) -> Entry:
    """Return the maximum of rows, each with a visible element."""
    return entry if entry.lit.wild else Entry(replace(entry.interval, wild=0))


def is_wide(layout: Layout, axis: int, own: Sequence[int]) -> bool:
    """Return whether an axis consists of more than one varying factor."""
    return not own and size_of(layout[axis]).number != 1


def without(layout: Layout, axes: Sequence[int], *, keep: bool) -> tuple[Layout, Places]:
    """Return a layout without some axes, or with one position on each, and the places of its varying factors."""
    kept = [at for at in range(len(varying(layout))) if varying(layout)[at][0] not in axes]
    places = {place: at for at, place in enumerate(kept)}
    if keep:
        return tuple(PLAIN_ONE if at in axes else axis for at, axis in enumerate(layout)), places
    return tuple(axis for at, axis in enumerate(layout) if at not in axes), places


def _plain(entry: Entry) -> Interval:
    return entry.interval if not entry.lowered else Interval(wild=entry.interval.wild)


def _neutral(op: str, value: Value, place: int, lowest: float) -> bool:
    """Return whether the padded elements do not change the result."""
    neutral = _NEUTRAL.get(op)
    entry = value.pad(place)
    if neutral is None or entry.lowered or entry.interval.wild & NAN:
        return False
    if op == "ReduceMax":
        return entry.high <= value.span.low or (entry.only is not None and entry.only <= lowest)
    if op == "ReduceMin":
        return entry.interval.low >= value.span.high or (entry.only is not None and entry.only >= -lowest)
    return entry.only == neutral


def _span(op: str, span: Interval, value: Value, axes: Sequence[int]) -> Interval:
    if op in {"ReduceMax", "ReduceMin", "ReduceMean"}:
        return span
    most = math.prod(max(size_of(value.axes[at]).bounds()[1], 0) for at in axes)
    if op in {"ReduceSum", "ReduceL1"}:
        low = span.low * most if span.low < 0 else 0.0
        high = span.high * most if span.high > 0 else 0.0
        only = span.only
        if only == 0:
            return Interval(0.0, 0.0, span.wild)
        if op == "ReduceL1":
            return Interval(0.0, span.greatest * most, span.wild)
        # A sum over at least one position of positive numbers is no less than their minimum.
        low = span.low if span.low > 0 else low
        return Interval(low, high, span.wild | (NAN if span.wild & 3 == 3 else 0))
    if op in {"ReduceL2", "ReduceSumSquare"}:
        return Interval(0.0, math.inf, span.wild)
    return Interval(wild=span.wild)


@rule("CumSum")
def cumulative_sum(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return sums up to each position. Later positions count only in reverse."""
    value = ctx.as_data(required(inputs, 0))
    axes = numbers(required(inputs, 1))
    if axes is None or len(axes) != 1:
        raise NotFollowed("computes a running sum along an axis that is not known")
    axis = axes[0] % len(value.axes)
    standing, cause = value.standing, value.cause
    own = ordinals(value.axes, axis)
    if own and ctx.is_batch:
        standing, cause = Standing.DIFFERENT, ctx.cause("computes a running sum over the rows of the batch")
    elif own and attribute(node, "reverse", 0) and value.pad(own[0]).only != 0:
        standing, cause = Standing.DIFFERENT, ctx.cause("computes a running sum from the end, where the padding is")
    elif own and (len(value.axes[axis]) != 1 or value.axes[axis][0].tail):
        return ctx.unknown("computes a running sum over a folded axis")
    most = max(size_of(value.axes[axis]).bounds()[1], 0)
    wild = wild_anywhere(value)
    low = min(value.span.low, value.span.low * most if value.span.low else 0.0)
    high = max(value.span.high, value.span.high * most if value.span.high else 0.0)
    span = Interval(low, high, wild | (NAN if wild & 3 else 0))
    return Value(value.layout, standing, cause, span=span, lit=span)
