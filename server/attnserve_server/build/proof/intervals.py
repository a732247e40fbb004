"""Intervals of numbers, with the infinities and NaNs that they may hold, and what operators by elements make of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
"""Numbers this low are written to hide something."""


@dataclass(frozen=True, slots=True)
class Interval:
    """All numbers between two bounds. A bound that is infinite only means that none is known; `wild` says what occurs.

    `masked`: among them may be numbers so low that they were made to hide something.
    """

    low: float = -math.inf
    high: float = math.inf
    wild: int = 0
    masked: bool = False

    @property
    def only(self) -> float | None:
        """The one number that it holds, if it holds one; minus infinity is such a number too."""
        return self.low if self.low == self.high and not self.wild & NAN else None

    @property
    def greatest(self) -> float:
        """The greatest absolute value."""
        return max(abs(self.low), abs(self.high))

    @property
    def has_zero(self) -> bool:
        """Whether it holds 0."""
        return self.low <= 0 <= self.high

    def hull(self, other: Interval) -> Interval:
        """The least interval that holds both."""
        masked = self.masked or other.masked
        return Interval(min(self.low, other.low), max(self.high, other.high), self.wild | other.wild, masked)


ANY: Final = Interval()
BOOLEAN: Final = Interval(0, 1)
ZERO: Final = Interval(0, 0)


def number(value: float) -> Interval:
    """The interval of one number."""
    wild = (NEGATIVE if value < 0 else POSITIVE) if math.isinf(value) else NAN if math.isnan(value) else 0
    return Interval(value, value, wild, value <= MASKED_FROM) if not math.isnan(value) else Interval(wild=wild)


def interval_of(array: Array) -> Interval:
    """The interval of an array's numbers; of one without elements, 0."""
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
    """A result of arithmetic, marked where a number that only masks have has made it low."""
    wide = any(part.only is not None and abs(part.only) >= -MASKED_FROM for part in (one, other))
    masked = found.masked or (wide and found.low <= MASKED_FROM and math.isfinite(found.low))
    return replace(found, masked=masked)


def add(one: Interval, other: Interval) -> Interval:
    """Sums."""
    wild = one.wild | other.wild
    if (one.wild & NEGATIVE and other.wild & POSITIVE) or (one.wild & POSITIVE and other.wild & NEGATIVE):
        wild |= NAN
    low, high = _plus(one.low, other.low, -math.inf), _plus(one.high, other.high, math.inf)
    if max(one.low, other.low) < _VERY_LOW and math.isfinite(low) and low < _FLOAT32_LOWEST:
        wild |= NEGATIVE  # twice the lowest number is minus infinity
    return _low(Interval(low, high, wild, one.masked or other.masked), one, other)


def negated(one: Interval) -> Interval:
    """With the other sign."""
    flipped = (one.wild & NAN) | (NEGATIVE if one.wild & POSITIVE else 0) | (POSITIVE if one.wild & NEGATIVE else 0)
    masked = one.masked or (one.only is not None and -one.only <= MASKED_FROM)
    return Interval(-one.high, -one.low, flipped, masked)


def subtract(one: Interval, other: Interval) -> Interval:
    """Differences."""
    return add(one, negated(other))


def multiply(one: Interval, other: Interval) -> Interval:
    """Products. 0 times anything finite is 0."""
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
    """Quotients."""
    if other.has_zero:
        return Interval(wild=NEGATIVE | POSITIVE | (NAN if one.has_zero or one.wild or other.wild else 0))
    wild = one.wild | (other.wild & NAN) | (NAN if one.wild and other.wild else 0)
    if other.low < 0:
        wild = negated(Interval(wild=wild)).wild
    inverse = _between(_inverse(other.low), _inverse(other.high))
    found = multiply(replace(one, wild=0), inverse)
    return replace(found, wild=wild, masked=one.masked)


def least(one: Interval, other: Interval) -> Interval:
    """The lesser of two."""
    masked = one.masked or other.masked
    return Interval(min(one.low, other.low), min(one.high, other.high), one.wild | other.wild, masked)


def most(one: Interval, other: Interval) -> Interval:
    """The greater of two."""
    wild = one.wild | other.wild
    low = max(one.low, other.low)
    if math.isfinite(low):
        wild &= ~NEGATIVE
    masked = (one.masked or other.masked) and low <= MASKED_FROM
    return Interval(low, max(one.high, other.high), wild, masked)


def power(one: Interval, other: Interval) -> Interval:
    """Powers; only even whole ones and those of positive numbers are followed."""
    exponent = other.only
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


def monotone(function: Callable[[float], float], domain: float = -math.inf) -> Callable[[Interval], Interval]:
    """An operator that keeps the order of numbers; below or at `domain` it is not defined, and gives NaN."""

    def of(one: Interval) -> Interval:
        if one.low < domain or (one.low == domain > -math.inf and math.isinf(function(domain))):
            return Interval(wild=one.wild | NAN | NEGATIVE)
        return Interval(function(one.low), function(one.high), one.wild, one.masked)

    return of


def bounded(low: float, high: float) -> Callable[[Interval], Interval]:
    """An operator whose results lie between two bounds, infinities included."""
    return lambda one: Interval(low, high, one.wild & NAN)


def absolute(one: Interval) -> Interval:
    """Absolute values."""
    low = 0.0 if one.has_zero else min(abs(one.low), abs(one.high))
    return Interval(low, one.greatest, (one.wild & NAN) | (POSITIVE if one.wild & 3 else 0))


def shrinking(one: Interval) -> Interval:
    """An operator whose results are no farther from 0 than its argument, as those of Gelu."""
    return Interval(min(one.low, 0.0), max(one.high, 0.0), one.wild | (NAN if one.wild else 0))


def _compare(one: Interval, other: Interval, *, less: bool, equal: bool) -> Interval:
    if not less:
        one, other = other, one
    surely = one.high < other.low or (equal and one.high <= other.low)
    never = one.low > other.high or (not equal and one.low >= other.high)
    if (one.wild | other.wild) & NAN:
        return BOOLEAN
    return number(1) if surely else number(0) if never else BOOLEAN


def _equal(one: Interval, other: Interval) -> Interval:
    if one.only is not None and one.only == other.only:
        return number(1)
    return number(0) if one.high < other.low or other.high < one.low else BOOLEAN


def _truth(one: Interval) -> bool | None:
    return True if not one.has_zero else False if one.only == 0 else None


def _both(one: Interval, other: Interval) -> Interval:
    truths = (_truth(one), _truth(other))
    return number(0) if False in truths else number(1) if truths == (True, True) else BOOLEAN


def _either(one: Interval, other: Interval) -> Interval:
    truths = (_truth(one), _truth(other))
    return number(1) if True in truths else number(0) if truths == (False, False) else BOOLEAN


def _unlike(one: Interval, other: Interval) -> Interval:
    truths = (_truth(one), _truth(other))
    return BOOLEAN if None in truths else number(float(truths[0] != truths[1]))


def opposite(one: Interval) -> Interval:
    """Not."""
    truth = _truth(one)
    return BOOLEAN if truth is None else number(float(not truth))


def chosen(condition: Interval, one: Interval, other: Interval) -> Interval:
    """Where: the one or the other, or both where it is not known."""
    truth = _truth(condition)
    return one.hull(other) if truth is None else one if truth else other


def as_truth(one: Interval) -> Interval:
    """Cast to a truth value."""
    truth = _truth(one)
    return BOOLEAN if truth is None else number(float(truth))


def as_whole(one: Interval) -> Interval:
    """Cast to a whole number."""
    if one.wild:
        return ANY
    low, high = (float(math.trunc(end)) if math.isfinite(end) else end for end in (one.low, one.high))
    return Interval(low, high)


def _safe_exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _sigmoid(value: float) -> float:
    return 1 / (1 + _safe_exp(-value))


def _reciprocal(one: Interval) -> Interval:
    return divide(number(1), one)


def _isnan(one: Interval) -> Interval:
    return BOOLEAN if one.wild & NAN else number(0)


def _isinf(one: Interval) -> Interval:
    if one.only is not None and math.isinf(one.only):
        return number(1)
    return BOOLEAN if one.wild else number(0)


def _exp(one: Interval) -> Interval:
    return Interval(_safe_exp(one.low), _safe_exp(one.high), one.wild & ~NEGATIVE)


UNARY: Final[Mapping[str, Callable[[Interval], Interval]]] = {
    "Abs": absolute,
    "Acos": bounded(0, math.pi),
    "Atan": bounded(-2, 2),
    "Ceil": monotone(lambda value: float(math.ceil(value)) if math.isfinite(value) else value),
    "Celu": shrinking,
    "Cos": bounded(-1, 1),
    "Elu": lambda one: Interval(max(-1.0, min(one.low, 0.0)), max(one.high, 0.0), one.wild & ~NEGATIVE),
    "Erf": bounded(-1, 1),
    "Exp": _exp,
    "Floor": monotone(lambda value: float(math.floor(value)) if math.isfinite(value) else value),
    "Gelu": shrinking,
    "FastGelu": shrinking,
    "QuickGelu": shrinking,
    "HardSigmoid": bounded(0, 1),
    "HardSwish": shrinking,
    "Identity": lambda one: one,
    "IsInf": _isinf,
    "IsNaN": _isnan,
    "LeakyRelu": shrinking,
    "Log": monotone(lambda value: -math.inf if value <= 0 else math.log(value), 0.0),
    "Mish": shrinking,
    "Neg": negated,
    "Not": opposite,
    "Reciprocal": _reciprocal,
    "Relu": lambda one: most(one, ZERO),
    "Round": monotone(lambda value: float(round(value)) if math.isfinite(value) else value),
    "Selu": lambda one: Interval(2 * min(one.low, 0.0), 2 * max(one.high, 0.0), one.wild),
    "Sigmoid": lambda one: Interval(_sigmoid(one.low), _sigmoid(one.high), one.wild & NAN),
    "Sign": bounded(-1, 1),
    "Sin": bounded(-1, 1),
    "Softplus": lambda one: Interval(0.0, max(one.high, 0.0) + 1, one.wild & ~NEGATIVE),
    "Softsign": bounded(-1, 1),
    "Sqrt": monotone(lambda value: math.sqrt(value) if value >= 0 else 0.0, 0.0),
    "Swish": shrinking,
    "Tan": lambda one: Interval(wild=one.wild),
    "Tanh": lambda one: Interval(math.tanh(one.low), math.tanh(one.high), one.wild & NAN),
    "ThresholdedRelu": shrinking,
}
"""Operators of one operand, each number by itself."""

BINARY: Final[Mapping[str, Callable[[Interval, Interval], Interval]]] = {
    "Add": add,
    "And": _both,
    "Div": divide,
    "Equal": _equal,
    "Greater": lambda one, other: _compare(one, other, less=False, equal=False),
    "GreaterOrEqual": lambda one, other: _compare(one, other, less=False, equal=True),
    "Less": lambda one, other: _compare(one, other, less=True, equal=False),
    "LessOrEqual": lambda one, other: _compare(one, other, less=True, equal=True),
    "Max": most,
    "Min": least,
    "Mod": lambda one, other: Interval(min(0.0, -other.greatest), other.greatest, one.wild),
    "Mul": multiply,
    "Or": _either,
    "Pow": power,
    "PRelu": lambda one, _slope: Interval(wild=one.wild),
    "Sub": subtract,
    "Xor": _unlike,
    "BitShift": lambda _one, _other: ANY,
    "BitwiseAnd": lambda _one, _other: ANY,
    "BitwiseOr": lambda _one, _other: ANY,
    "BitwiseXor": lambda _one, _other: ANY,
}
"""Operators of two operands, each number by itself; Min, Max, Sum and Mean fold them over more."""


def folded(function: Callable[[Interval, Interval], Interval], operands: Sequence[Interval]) -> Interval:
    """An operator of two operands over any number."""
    result = operands[0]
    for other in operands[1:]:
        result = function(result, other)
    return result


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
