"""The interval of each elementwise operator's result, given the intervals of its operands.

Each function returns an interval that holds every possible result, with the infinities and NaN that may occur. Nothing
here raises, except `folded` without an operand (IndexError).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from attnserve_server.conversion.proof.intervals import (
    ANY,
    BOOLEAN,
    NAN,
    NEGATIVE,
    POSITIVE,
    ZERO,
    Interval,
    add,
    divide,
    least,
    most,
    multiply,
    negated,
    number,
    power,
    subtract,
)


def monotone(function: Callable[[float], float], domain: float = -math.inf) -> Callable[[Interval], Interval]:
    """Return the function of an operator that keeps the order of numbers. At or below `domain` it may give NaN."""

    def of(one: Interval) -> Interval:
        if one.low < domain or (one.low == domain > -math.inf and math.isinf(function(domain))):
            return Interval(wild=one.wild | NAN | NEGATIVE)
        return Interval(function(one.low), function(one.high), one.wild, one.masked)

    return of


def bounded(low: float, high: float) -> Callable[[Interval], Interval]:
    """Return the function of an operator whose results are between two bounds, for infinite arguments too."""
    return lambda one: Interval(low, high, one.wild & NAN)


def absolute(one: Interval) -> Interval:
    """Return the interval of absolute values."""
    low = 0.0 if one.has_zero else min(abs(one.low), abs(one.high))
    return Interval(low, one.greatest, (one.wild & NAN) | (POSITIVE if one.wild & 3 else 0))


def shrinking(one: Interval) -> Interval:
    """Return the interval of an operator whose results are no farther from 0 than its argument, such as Gelu."""
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
    """Return the interval of Not."""
    truth = _truth(one)
    return BOOLEAN if truth is None else number(float(not truth))


def chosen(condition: Interval, one: Interval, other: Interval) -> Interval:
    """Return the interval of Where: one operand where the condition is known, otherwise the hull of both."""
    truth = _truth(condition)
    return one.hull(other) if truth is None else one if truth else other


def as_truth(one: Interval) -> Interval:
    """Return the interval of a cast to bool."""
    truth = _truth(one)
    return BOOLEAN if truth is None else number(float(truth))


def as_half(one: Interval) -> Interval:
    """Return the interval of a cast to float16, where a number beyond 65504 is infinite."""
    if one.only is None or abs(one.only) <= _HALF_MOST:
        return one
    return replace(one, wild=one.wild | (NEGATIVE if one.only < 0 else POSITIVE))


def cut(one: Interval) -> Interval:
    """Return the interval of an integer quotient, truncated to an integer."""
    low = 0.0 if 0 < one.low < 1 else float(math.floor(one.low)) if one.low > 0 and math.isfinite(one.low) else one.low
    high = float(math.ceil(one.high)) if one.high < 0 and math.isfinite(one.high) else one.high
    return replace(one, low=low, high=high) if one.only is None or not float(one.low).is_integer() else one


def wrapped(one: Interval, least: float, greatest: float) -> Interval:
    """Return the interval of integers of a type that wraps around beyond its bounds."""
    return one if one.low >= least and one.high <= greatest and not one.wild else Interval(least, greatest)


def as_whole(one: Interval) -> Interval:
    """Return the interval of a cast to an integer."""
    if one.wild:
        return ANY
    low, high = (float(math.trunc(end)) if math.isfinite(end) else end for end in (one.low, one.high))
    return Interval(low, high)


_HALF_MOST: Final = 65504.0


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


_OVERFLOWS: Final = 88.72
"""Exp of a greater number overflows float32. Source: log(3.4028235e38)."""


def _exp(one: Interval) -> Interval:
    overflow = POSITIVE if one.low > _OVERFLOWS else 0
    return Interval(_safe_exp(one.low), _safe_exp(one.high), (one.wild & ~NEGATIVE) | overflow)


UNARY: Final[Mapping[str, Callable[[Interval], Interval]]] = {
    "Abs": absolute,
    "Acos": lambda one: Interval(0, math.pi, 0 if one.low >= -1 and one.high <= 1 and not one.wild else NAN),
    "Atan": bounded(-2, 2),
    "Ceil": monotone(lambda value: float(math.ceil(value)) if math.isfinite(value) else value),
    "Celu": shrinking,
    "Cos": lambda one: Interval(-1, 1, NAN if one.wild else 0),
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
    "Sin": lambda one: Interval(-1, 1, NAN if one.wild else 0),
    "Softplus": lambda one: Interval(0.0, max(one.high, 0.0) + 1, one.wild & ~NEGATIVE),
    "Softsign": lambda one: Interval(-1, 1, NAN if one.wild else 0),
    "Sqrt": monotone(lambda value: math.sqrt(value) if value >= 0 else 0.0, 0.0),
    "Swish": shrinking,
    "Tan": lambda one: Interval(wild=NAN if one.wild else 0),
    "Tanh": lambda one: Interval(math.tanh(one.low), math.tanh(one.high), one.wild & NAN),
    "ThresholdedRelu": shrinking,
}
"""Elementwise operators of one operand."""
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
    "Mod": lambda one, other: Interval(
        -other.greatest, other.greatest, NAN if one.wild or other.wild or other.has_zero else 0
    ),
    "Mul": multiply,
    "Or": _either,
    "Pow": power,
    "PRelu": lambda one, slope: Interval(wild=NAN | NEGATIVE | POSITIVE if one.wild or slope.wild else 0),
    "Sub": subtract,
    "Xor": _unlike,
    "BitShift": lambda _one, _other: ANY,
    "BitwiseAnd": lambda _one, _other: ANY,
    "BitwiseOr": lambda _one, _other: ANY,
    "BitwiseXor": lambda _one, _other: ANY,
}
"""Elementwise operators of two operands. Min, Max, Sum and Mean fold them over more."""


def folded(function: Callable[[Interval, Interval], Interval], operands: Sequence[Interval]) -> Interval:
    """Return the interval of a two-operand operator that is folded over any number of operands."""
    result = operands[0]
    for other in operands[1:]:
        result = function(result, other)
    return result
