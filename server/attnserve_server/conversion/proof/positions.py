"""Values that count positions along axes, and their bounds in the padding and beyond a causal frontier.

The proof uses them to follow indices that a graph computes. Where a bound is not known, the value has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from attnserve_server.conversion.proof.context import Context
from attnserve_server.conversion.proof.intervals import Interval
from attnserve_server.conversion.proof.layout import Layout, varying
from attnserve_server.conversion.proof.sizes import Size
from attnserve_server.conversion.proof.values import Entry, Region, Value


def index_value(
    ctx: Context,
    layout: Layout,
    index: Mapping[int, Size],
    offset: Size,
    *,
    outer: Size | None = None,
    below: Size | None = None,
) -> Value:
    """Return integers that count positions along varying factors, with their bounds in each region.

    Args:
        ctx: The interpretation.
        layout: The axes of the value.
        index: The step of one position, for each varying factor that is counted.
        offset: The summand.
        outer: The factor of a plain number that is added. None: none.
        below: The bound of a plain number from 0 on that is added. None: none.
    """
    index = {factor: by for factor, by in index.items() if by.terms}
    if not index and outer is None and below is None:
        least, greatest = offset.bounds()
        span = Interval(least, greatest)
        return Value(layout, span=span, lit=span, offset=offset if ctx.depends(offset) else None)
    blank = Value(layout, index=index, offset=offset, outer=outer, below=below)
    plus, steps = offset.number, {factor: by.number for factor, by in index.items()}
    if plus is None or ctx.is_batch or outer is not None or below is not None or None in steps.values():
        return blank
    known = {factor: by for factor, by in steps.items() if by is not None}
    if len(known) == 1:
        return _along_one(blank, known, plus)
    factors = list(known)
    if len(known) == 2 and known[factors[0]] == -known[factors[1]] and _one_length(layout, factors):
        return _between_two(blank, known, plus)
    return blank


def _along_one(value: Value, index: Mapping[int, int], plus: int) -> Value:
    ((factor, by),) = index.items()
    span = Interval(plus, math.inf) if by > 0 else Interval(-math.inf, plus)
    behind = Interval(plus + by, math.inf) if by > 0 else Interval(-math.inf, plus + by)
    regions = {("pad", factor, factor): Entry(behind, lit=behind)}
    return replace(value, span=span, lit=span, regions=regions)


def _between_two(value: Value, index: Mapping[int, int], plus: int) -> Value:
    """Return the distance of two positions, times a number. It has a sign above and below the diagonal."""
    factors = list(index)
    regions: dict[Region, Entry] = {}
    for first, last in (factors, factors[::-1]):
        by = index[last]
        # Here the position along `last` exceeds the one along `first`, by one or more.
        interval = Interval(plus + by, math.inf) if by > 0 else Interval(-math.inf, plus + by)
        entry = Entry(interval, lit=interval)
        regions["above", first, last] = entry
        regions["pad", last, last] = entry
    return replace(value, lit=Interval(plus, plus), regions=regions, structured=frozenset(factors))


def _one_length(layout: Layout, factors: Sequence[int]) -> bool:
    real = [factor.real for _, factor in varying(layout)]
    return real[factors[0]] == real[factors[1]]
