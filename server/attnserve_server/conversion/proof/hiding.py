"""When a mask hides padded positions from a softmax: exactly, by enough, or only while scores are small.

The result is a standing: EQUAL where padded elements get no weight, ASSUMED where a finite mask hides them if scores
are small enough, DIFFERENT where they get weight, UNKNOWN otherwise. Where a query needs an allowed key, a mask need is
recorded in the context.

`softmaxed` asserts that the axes of its value are known; nothing else here raises.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from attnserve_server.conversion.proof.context import SOFTMAX_OVER_ROWS, Context
from attnserve_server.conversion.proof.intervals import NAN, NEGATIVE, ZERO, Interval
from attnserve_server.conversion.proof.layout import ordinals
from attnserve_server.conversion.proof.values import (
    EXACTLY_HIDDEN,
    HALF_HIDDEN,
    Cause,
    Entry,
    Region,
    Standing,
    Value,
)

_NO_MASK = -1.0
"""Padding above this number is not a mask's."""
MOST_POSITIONS = 512
"""The number of padded positions that is assumed where no maximum is known."""


def softmaxed(ctx: Context, value: Value, axes: Sequence[int]) -> Value:
    """Return the softmax of a value over some axes. It is equal where padding along them gets no weight."""
    factors = [factor for at in axes for factor in ordinals(value.axes, at)]
    standing, cause = value.standing, value.cause
    hidden: dict[int, bool] = {}
    for factor in factors:
        verdict, why = hides(ctx, value, factor)
        hidden[factor] = verdict <= Standing.ASSUMED
        if verdict > standing:
            standing, cause = verdict, why
    regions: dict[Region, Entry] = {}
    for region, entry in value.regions.items():
        kind, one, other = region
        below = other in factors and kind == "above" and _far_below(ctx, value, entry)
        if below or (kind == "pad" and one in factors and hidden.get(one)):
            regions[region] = Entry(ZERO, lit=ZERO)
        elif kind == "pad" and one not in factors:
            wild = NAN if _may_be_empty(entry) else 0
            regions[region] = Entry(Interval(0, 1, wild), lit=Interval(0, 1, wild))
    wild = value.span.wild & (NAN | 2)
    if not factors and value.span.wild:
        if value.masks and not value.lit.wild:
            ctx.need(value.masks, everything=len(value.masks) > 1 or bool(value.structured))
        else:
            wild = NAN  # a row of minus infinity only
    span = Interval(0, 1, NAN if wild else 0)
    norm = 1.0 if len(axes) == 1 else math.inf
    return Value(value.layout, standing, cause, span=span, lit=span, regions=regions, norm=norm, norm_axis=axes[-1])


def _may_be_empty(entry: Entry) -> bool:
    """Return whether a row may hold only minus infinity, or holds NaN."""
    if entry.interval.wild & (NAN | 2):
        return True
    return bool(entry.lit.wild)


def hides(ctx: Context, value: Value, factor: int) -> tuple[Standing, Cause | None]:
    """Return whether padded elements along a factor get no weight in a softmax over it, and why they do."""
    if ctx.is_batch:
        return Standing.DIFFERENT, ctx.cause(SOFTMAX_OVER_ROWS)
    entry = value.pad(factor)
    keys = _named(ctx)
    if entry.interval.wild & (NAN | 2):
        return Standing.UNKNOWN, ctx.cause(f"{keys} may hold infinities or NaN")
    lowest = HALF_HIDDEN if ctx.precision == "fp16" else EXACTLY_HIDDEN
    if entry.high <= lowest or entry.lowered >= -lowest:
        return _with_a_key(ctx, value, factor)
    if not entry.lowered and entry.interval.high >= _NO_MASK:
        return Standing.DIFFERENT, ctx.cause(f"{keys} get weight: no mask hides them")
    return _finite(ctx, value, factor, entry)


def _named(ctx: Context) -> str:
    return "padded keys" if ctx.node is None or ctx.node.op_type in {"Softmax", "Attention"} else "padded positions"


def _with_a_key(ctx: Context, value: Value, factor: int) -> tuple[Standing, Cause | None]:
    """Return the standing of an exact mask: equal if every query has a visible key."""
    lit = value.lit
    if lit.masked or lit.wild & NEGATIVE:
        reason = "a mask may leave a query without any key, and then padded keys get weight too"
        return Standing.UNKNOWN, ctx.cause(reason)
    _take_masks(ctx, value, factor)
    return Standing.EQUAL, None


def _take_masks(ctx: Context, value: Value, factor: int) -> None:
    if value.masks:
        alone = len(value.masks) == 1 and value.along <= {factor} and not value.structured
        ctx.need(value.masks, everything=not alone)


def _finite(ctx: Context, value: Value, factor: int, entry: Entry) -> tuple[Standing, Cause | None]:
    """Return the standing of a finite mask: equal if scores are bounded, different if it is too small, else assumed."""
    keys = _named(ctx)
    length = ctx.lengths.get(ctx.varied, MOST_POSITIONS)
    needed = math.log(max(length, 2) / ctx.weight_tolerance)
    taken = entry.lowered or -entry.interval.high
    if taken < needed:
        reason = f"a mask subtracts only {taken:g} from the scores of {keys}: each keeps a share of e^-{taken:g} even "
        return Standing.DIFFERENT, ctx.cause(f"{reason}where scores are equal, more than {length} of them may keep")
    if value.lit.wild or value.lit.masked:
        return Standing.UNKNOWN, ctx.cause("a mask may leave a query without any key")
    _take_masks(ctx, value, factor)
    margin = value.lit.low - entry.high
    if math.isfinite(margin) and margin >= needed:
        return Standing.EQUAL, None
    bound = max(abs(entry.interval.low), abs(entry.interval.high)) if entry.lowered else abs(value.lit.low)
    reason = f"finite mask, unbounded scores: a mask subtracts {taken:g}"
    if math.isfinite(bound):
        return Standing.ASSUMED, ctx.cause(f"{reason}, and scores are only known to be below {bound:.3g}")
    return Standing.ASSUMED, ctx.cause(f"{reason} from scores without a known bound")


def _far_below(ctx: Context, value: Value, entry: Entry) -> bool:
    lowest = HALF_HIDDEN if ctx.precision == "fp16" else EXACTLY_HIDDEN
    if entry.interval.wild & (NAN | 2):
        return False
    if entry.high <= lowest or entry.lowered >= -lowest:
        return not (value.lit.wild & NEGATIVE or value.lit.masked)
    margin = value.lit.low - entry.high
    return math.isfinite(margin) and margin >= 104  # e^-104 is 0 in float32
