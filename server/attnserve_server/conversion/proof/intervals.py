"""Intervals of numbers, with the infinities and NaN that they may hold, and arithmetic on them.

Each function returns an interval that holds every possible result. An operation without a bound returns infinite
bounds. Nothing here raises.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from attnserve_server.domain.values import Array

NEGATIVE: Final = 1
POSITIVE: Final = 2
NAN: Final = 4
"""Bits of `wild`: minus infinity, infinity and NaN may occur."""
_FLOAT32_LOWEST: Final = float(np.finfo(np.float32).min)
_VERY_LOW: Final = -1e37
MASKED_FROM: Final = -1e3
"""A number this low is taken for a mask's, which hides something."""


@dataclass(frozen=True, slots=True)
class Interval:
    """All numbers between two bounds.

    Args:
        low: The lower bound. Minus infinity: no bound is known.
        high: The upper bound. Infinity: no bound is known.
        wild: Which infinities and NaN may occur, as bits.
        masked: True if it may hold numbers so low that they are a mask's.
    """

    low: float = -math.inf
    high: float = math.inf
    wild: int = 0
    masked: bool = False

    @property
    def only(self) -> float | None:
        """The one number that it holds, minus infinity included. None where it holds more, or NaN."""
        return self.low if self.low == self.high and not self.wild & NAN else None

    @property
    def greatest(self) -> float:
        """The greatest absolute value."""
        return max(abs(self.low), abs(self.high))

    @property
    def has_zero(self) -> bool:
        """True if it holds 0."""
        return self.low <= 0 <= self.high

    def hull(self, other: Interval) -> Interval:
        """Return the smallest interval that holds both."""
        masked = self.masked or other.masked
        return Interval(min(self.low, other.low), max(self.high, other.high), self.wild | other.wild, masked)


ANY: Final = Interval()
BOOLEAN: Final = Interval(0, 1)
ZERO: Final = Interval(0, 0)


def number(value: float) -> Interval:
    """Return the interval of one number."""
    wild = (NEGATIVE if value < 0 else POSITIVE) if math.isinf(value) else NAN if math.isnan(value) else 0
    return Interval(value, value, wild, value <= MASKED_FROM) if not math.isnan(value) else Interval(wild=wild)


def interval_of(array: Array) -> Interval:
    """Return the interval of an array's numbers. Without elements it is 0."""
    if array.dtype.kind not in "biuf":
        return ANY
    if not array.size:
        return ZERO
    if array.dtype.kind != "f":
        return Interval(float(array.min()), float(array.max()))
    wild = NAN if np.isnan(array).any() else 0
    wild |= (NEGATIVE if np.isneginf(array).any() else 0) | (POSITIVE if np.isposinf(array).any() else 0)
    if wild & NAN:
        return Interval(wild=wild)
    low = float(array.min())
    return Interval(low, float(array.max()), wild, low <= MASKED_FROM)


def _low(found: Interval, one: Interval, other: Interval) -> Interval:
    """Return a result of arithmetic, marked as masked where a number of a mask's size has made it low."""
    wide = any(part.only is not None and abs(part.only) >= -MASKED_FROM for part in (one, other))
    masked = found.masked or (wide and found.low <= MASKED_FROM and math.isfinite(found.low))
    return replace(found, masked=masked)


def add(one: Interval, other: Interval) -> Interval:
    """Return the interval of sums."""
    wild = one.wild | other.wild
    if (one.wild & NEGATIVE and other.wild & POSITIVE) or (one.wild & POSITIVE and other.wild & NEGATIVE):
        wild |= NAN
    low, high = _plus(one.low, other.low, -math.inf), _plus(one.high, other.high, math.inf)
    if max(one.low, other.low) < _VERY_LOW and math.isfinite(low) and low < _FLOAT32_LOWEST:
        wild |= NEGATIVE  # twice the lowest number is minus infinity
    return _low(Interval(low, high, wild, one.masked or other.masked), one, other)


def negated(one: Interval) -> Interval:
    """Return the interval with the other sign."""
    flipped = (one.wild & NAN) | (NEGATIVE if one.wild & POSITIVE else 0) | (POSITIVE if one.wild & NEGATIVE else 0)
    masked = one.masked or (one.only is not None and -one.only <= MASKED_FROM)
    return Interval(-one.high, -one.low, flipped, masked)


def subtract(one: Interval, other: Interval) -> Interval:
    """Return the interval of differences."""
    return add(one, negated(other))


def multiply(one: Interval, other: Interval) -> Interval:
    """Return the interval of products. 0 times any finite number is 0."""
    wild = (one.wild | other.wild) & NAN
    for infinite, by in ((one, other), (other, one)):
        bits = infinite.wild & (NEGATIVE | POSITIVE)
        if not bits:
            continue
        if by.has_zero:
            wild |= NAN | NEGATIVE | POSITIVE
        else:
            wild |= bits if by.low > 0 else negated(Interval(wild=bits)).wild
    if not wild and (one.only == 0 or other.only == 0):
        return ZERO
    corners = [_times(left, right) for left in (one.low, one.high) for right in (other.low, other.high)]
    masked = one.masked or other.masked
    return _low(Interval(min(corners), max(corners), wild, masked), one, other)


def divide(one: Interval, other: Interval) -> Interval:
    """Return the interval of quotients."""
    if other.has_zero:
        return Interval(wild=NEGATIVE | POSITIVE | (NAN if one.has_zero or one.wild or other.wild else 0))
    wild = one.wild | (other.wild & NAN) | (NAN if one.wild and other.wild else 0)
    if other.low < 0:
        wild = negated(Interval(wild=wild)).wild
    inverse = _between(_inverse(other.low), _inverse(other.high))
    found = multiply(replace(one, wild=0), inverse)
    return replace(found, wild=wild, masked=one.masked)


def least(one: Interval, other: Interval) -> Interval:
    """Return the interval of the minimum of two numbers."""
    masked = one.masked or other.masked
    return Interval(min(one.low, other.low), min(one.high, other.high), one.wild | other.wild, masked)


def most(one: Interval, other: Interval) -> Interval:
    """Return the interval of the maximum of two numbers."""
    wild = one.wild | other.wild
    low = max(one.low, other.low)
    if math.isfinite(low):
        wild &= ~NEGATIVE
    masked = (one.masked or other.masked) and low <= MASKED_FROM
    return Interval(low, max(one.high, other.high), wild, masked)


def power(one: Interval, other: Interval) -> Interval:
    """Return the interval of powers.

    It has bounds only for exponents that are even integers, and for positive bases.
    """
    exponent = other.only
    if other.wild:
        return Interval(wild=one.wild | NAN | POSITIVE)
    if exponent == 1:
        return one
    if exponent is not None and exponent > 0 and float(exponent).is_integer():
        if int(exponent) % 2 == 0:
            greatest = _power(one.greatest, exponent)
            return Interval(0.0, greatest, (one.wild & NAN) | (POSITIVE if one.wild & 3 else 0))
        return Interval(wild=one.wild)
    if one.low > 0:
        return Interval(0.0, math.inf, one.wild)
    return Interval(wild=one.wild | NAN | POSITIVE)


def _plus(one: float, other: float, unknown: float) -> float:
    return unknown if math.isinf(one) and math.isinf(other) and one != other else one + other


def _times(one: float, other: float) -> float:
    return 0.0 if one == 0 or other == 0 else one * other


def _inverse(value: float) -> float:
    return 0.0 if math.isinf(value) else 1.0 / value


def _between(one: float, other: float) -> Interval:
    return Interval(min(one, other), max(one, other))


def _power(value: float, exponent: float) -> float:
    try:
        return float(value**exponent)
    except OverflowError:
        return math.inf
