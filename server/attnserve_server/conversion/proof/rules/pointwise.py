"""Elementwise functions: each element of the result depends on the elements in its own place, so nothing is mixed.

The proof compares a sequence alone with the same sequence in a batch (or padded); a varying axis differs in length
between the two, and `NotFollowed` becomes the verdict unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from attnserve_server.conversion.proof.context import Context
from attnserve_server.conversion.proof.helpers import aligned, entry_at, joined, regions_over
from attnserve_server.conversion.proof.intervals import Interval, add, negated, number
from attnserve_server.conversion.proof.layout import Layout, varying
from attnserve_server.conversion.proof.values import Entry, Value

Function = Callable[..., Interval]
_LOWERS_FROM: Final = 1.0
"""The minimum that a mask subtracts from a score. A smaller number is an ordinary bias."""


def pointwise(ctx: Context, function: Function, operands: Sequence[Value], *, op: str = "") -> Value:
    """Return the value of a function of the operands, element by element, after broadcasting.

    Args:
        ctx: The interpretation.
        function: Maps the operands' intervals to the result's interval.
        operands: The operands.
        op: The operator, where masks need its meaning: `Add`, `Sub`, `Mul`, `Div`, `Where` or `Same`.

    Raises:
        NotFollowed: The operands' axes are not known to agree.
    """
    operands = [ctx.as_data(value) for value in operands]
    layout, placed = aligned(operands)
    span = function(*(value.span for value in operands))
    lit = function(*(value.lit for value in operands))
    regions = {}
    for region in regions_over(placed):
        entry = _entry(function, op, [entry_at(value, places, region) for value, places in placed])
        regions[region] = entry
    hides = any(entry.only is not None or entry.lowered for entry in regions.values())
    hides = hides or (bool(span.wild or not layout_varies(layout)) and any(value.masks for value in operands))
    # A window has no facts about regions, and yet every position attends to itself.
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
    """Return whether any axis of a layout varies."""
    return bool(varying(layout))


def _entry(function: Function, op: str, entries: Sequence[Entry]) -> Entry:
    """Return what holds of the elements of one region."""
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
    if op == "Same" and entries[0].lowered:
        return replace(entries[0], lit=lit)
    return Entry(function(*(_plain(entry) for entry in entries)), lit=lit)


def _plain(entry: Entry) -> Interval:
    """Return the interval of a region's elements, with `lowered` subtracted."""
    return entry.interval if not entry.lowered else add(entry.interval, number(-entry.lowered))


def _lowered(op: str, one: Entry, other: Entry) -> Entry | None:
    """Return the sum of a score and a mask, or of two masks. None for other operands."""
    if op == "Sub":
        if other.lowered:
            return None
        other = Entry(negated(other.interval))
    for score, mask in ((one, other), (other, one)):
        taken = mask.interval.only
        if mask.lowered or taken is None or taken > -_LOWERS_FROM:
            continue
        if score.interval.only is not None and not score.lowered:
            return None  # the sum of two known numbers is a known number
        if math.isinf(taken):
            bad = score.interval.wild & ~1
            return Entry(number(-math.inf)) if not bad else None
        return Entry(score.interval, score.lowered - taken)
    if one.lowered or other.lowered:
        return Entry(add(one.interval, other.interval), one.lowered + other.lowered)
    return None


def _scaled(function: Function, op: str, one: Entry, other: Entry) -> Entry | None:
    """Return a lowered score times a positive constant. None for other operands."""
    if op == "Mul" and other.lowered and not one.lowered:
        one, other = other, one
    by = other.interval.only
    if not one.lowered or other.lowered or by is None or by <= 0 or math.isinf(by):
        return None
    return Entry(function(one.interval, other.interval), function(number(one.lowered), other.interval).low)
