"""Quantizers with one constant scale: what holds of the integers that they round to, and of the numbers of these.

Rounding keeps the order of numbers, so that bounds follow from bounds. A result at a tie may be either neighbour,
because kernels round float32 quotients. A mask that subtracts more than the quantizer's whole range leaves the least
number that the quantizer represents. Nothing here raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from attnserve_server.conversion.proof.intervals import NAN, Interval, number
from attnserve_server.conversion.proof.values import EXACTLY_HIDDEN, Entry, Value

_TIE: Final = 0.51
"""Half a step and the error of a float32 quotient below 2**16."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """A quantizer: integers from `low` to `high` represent (integer - zero) * scale."""

    scale: float
    zero: float
    low: int
    high: int

    def bounds(self, one: Interval) -> Interval:
        """Return the integers that numbers are rounded to."""
        if one.wild & NAN:
            return Interval(self.low, self.high)
        return Interval(
            self._clipped(one.low, lambda x: math.ceil(x - _TIE)),
            self._clipped(one.high, lambda x: math.floor(x + _TIE)),
        )

    def _clipped(self, bound: float, rounds: Callable[[float], int]) -> float:
        quotient = bound / self.scale + self.zero
        if quotient <= self.low or quotient >= self.high:
            return self.low if quotient <= self.low else self.high
        return min(max(rounds(quotient), self.low), self.high)

    def numbers(self, one: Interval) -> Interval:
        """Return the numbers that integers represent."""
        return Interval((one.low - self.zero) * self.scale, (one.high - self.zero) * self.scale, one.wild, one.masked)


def steps_of(scale: Value, zero: Value | None) -> Rounding | None:
    """Return a quantizer of integers of 8 or 16 bits with one constant scale above 0; None for any other."""
    if scale.constant is None or scale.constant.size != 1 or (zero is not None and zero.constant is None):
        return None
    by = float(scale.constant.reshape(-1)[0])
    point = np.zeros((), np.uint8) if zero is None or zero.constant is None else zero.constant
    if not (0 < by < math.inf) or point.size != 1 or point.dtype.kind not in "iu" or point.dtype.itemsize > 2:
        return None
    limits = np.iinfo(point.dtype)
    return Rounding(by, float(point.reshape(-1)[0]), int(limits.min), int(limits.max))


def rounded(value: Value, steps: Rounding) -> Value:
    """Return the integers that a value's elements are rounded to."""

    def entry(of: Entry) -> Entry:
        lit = steps.bounds(_visible(of.lit))
        if of.lowered >= -EXACTLY_HIDDEN:
            return Entry(number(steps.low), lit=lit)
        if of.lowered:
            # An element is at most the greatest integer, less what the mask takes from it.
            taken = min(of.lowered / steps.scale, float(steps.high - steps.low))
            return Entry(steps.bounds(of.interval), taken, lit)
        return Entry(steps.bounds(of.interval), lit=lit)

    return _mapped(value, steps.bounds, lambda lit: steps.bounds(_visible(lit)), entry)


def scaled_up(value: Value, steps: Rounding) -> Value:
    """Return the numbers that a value's integers represent."""

    def entry(of: Entry) -> Entry:
        return Entry(steps.numbers(of.interval), of.lowered * steps.scale, steps.numbers(of.lit))

    return _mapped(value, steps.numbers, steps.numbers, entry)


def _visible(lit: Interval) -> Interval:
    """Return the interval with the bound that the proof assumes of the scores of visible keys, if they have none."""
    return lit if math.isfinite(lit.low) or lit.wild else Interval(EXACTLY_HIDDEN, lit.high, lit.wild, lit.masked)


def _mapped(
    value: Value,
    function: Callable[[Interval], Interval],
    visible: Callable[[Interval], Interval],
    entry: Callable[[Entry], Entry],
) -> Value:
    regions = {region: entry(of) for region, of in value.regions.items()}
    hides = any(of.only is not None or of.lowered for of in regions.values())
    hides = hides or (bool(value.structured) and value.lit.only is not None)
    span = function(value.span)
    return Value(
        value.layout,
        value.standing,
        value.cause,
        span=span,
        lit=visible(value.lit) if hides else span,
        regions=regions,
        masks=value.masks if hides else frozenset(),
        along=value.along if hides else frozenset(),
        structured=value.structured if hides else frozenset(),
    )
