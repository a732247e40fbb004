"""Intervals hold every result of an operator on the numbers in them, and mark infinities and NaN.

The proof of batching bounds values by them. Each operator is compared with NumPy on drawn numbers; one without a
reference here fails `test_every_operator_is_compared_with_numpy`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from attnserve_server.conversion.proof import intervals
from attnserve_server.conversion.proof.functions import BINARY, UNARY, as_truth, as_whole, chosen, folded
from attnserve_server.conversion.proof.intervals import (
    MASKED_FROM,
    NAN,
    NEGATIVE,
    POSITIVE,
    Interval,
    interval_of,
    number,
)
from hypothesis import given, settings
from hypothesis import strategies as st

FINITE = st.one_of(
    st.integers(-5, 5).map(float), st.floats(-60, 60).map(lambda value: value if abs(value) > 1e-9 else 0.0)
)
"""No numbers so small that their inverses overflow: intervals do not cover these."""
NUMBERS = st.one_of(FINITE, st.sampled_from([math.inf, -math.inf, math.nan]))


def between(ends: tuple[float, float], share: float) -> float:
    """Return a number between two, either end included."""
    low, high = min(ends), max(ends)
    return min(max(low + share * (high - low), low), high)


def interval(*values: float) -> Interval:
    """Return the smallest interval that holds all the numbers."""
    found = number(values[0])
    for value in values[1:]:
        found = found.hull(number(value))
    return found


def holds(found: Interval, value: float) -> bool:
    """Return whether an interval admits a number, an infinity or NaN."""
    if math.isnan(value):
        return bool(found.wild & NAN)
    if math.isinf(value):
        return bool(found.wild & (POSITIVE if value > 0 else NEGATIVE))
    room = 1e-9 * max(1.0, abs(value))
    return found.low - room <= value <= found.high + room


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def erf(x: Any) -> Any:
    return np.float64(math.erf(x))


def relu(x: Any) -> Any:
    return np.maximum(x, 0)


ALPHA, GAMMA = 1.6732632423543772, 1.0507009873554805
UNARY_BY_NUMPY: dict[str, Callable[[Any], Any]] = {
    "Abs": np.abs,
    "Acos": np.arccos,
    "Atan": np.arctan,
    "Ceil": np.ceil,
    "Celu": lambda x: np.maximum(x, 0) + np.minimum(0, np.expm1(x)),
    "Cos": np.cos,
    "Elu": lambda x: np.where(x < 0, np.expm1(x), x),
    "Erf": erf,
    "Exp": np.exp,
    "Floor": np.floor,
    "Gelu": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "FastGelu": lambda x: 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3))),
    "QuickGelu": lambda x: x * sigmoid(1.702 * x),
    "HardSigmoid": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
    "HardSwish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "Identity": lambda x: x,
    "IsInf": lambda x: np.float64(np.isinf(x)),
    "IsNaN": lambda x: np.float64(np.isnan(x)),
    "LeakyRelu": lambda x: np.where(x < 0, 0.01 * x, x),
    "Log": np.log,
    "Mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
    "Neg": np.negative,
    "Not": lambda x: np.float64(not x),
    "Reciprocal": lambda x: 1 / x,
    "Relu": relu,
    "Round": np.round,
    "Selu": lambda x: GAMMA * np.where(x < 0, ALPHA * np.expm1(x), x),
    "Sigmoid": sigmoid,
    "Sign": np.sign,
    "Sin": np.sin,
    "Softplus": lambda x: np.logaddexp(x, 0),
    "Softsign": lambda x: x / (1 + np.abs(x)),
    "Sqrt": np.sqrt,
    "Swish": lambda x: x * sigmoid(x),
    "Tan": np.tan,
    "Tanh": np.tanh,
    "ThresholdedRelu": lambda x: np.where(x > 1, x, 0.0),
}
BINARY_BY_NUMPY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": np.add,
    "And": lambda x, y: np.float64(bool(x) and bool(y)),
    "Div": np.divide,
    "Equal": np.equal,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Max": np.maximum,
    "Min": np.minimum,
    "Mod": np.fmod,
    "Mul": np.multiply,
    "Or": lambda x, y: np.float64(bool(x) or bool(y)),
    "Pow": np.float_power,
    "PRelu": lambda x, y: np.where(x < 0, x * y, x),
    "Sub": np.subtract,
    "Xor": lambda x, y: np.float64(bool(x) != bool(y)),
}
NOT_OF_NUMBERS = {"BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor"}


def test_every_operator_is_compared_with_numpy() -> None:
    assert set(UNARY) == set(UNARY_BY_NUMPY)
    assert set(BINARY) == set(BINARY_BY_NUMPY) | NOT_OF_NUMBERS


@pytest.mark.parametrize("name", UNARY_BY_NUMPY)
@settings(max_examples=40)
@given(ends=st.tuples(FINITE, FINITE), share=st.floats(0, 1))
def test_unary_results_of_finite_numbers_lie_within_the_interval(
    name: str, ends: tuple[float, float], share: float
) -> None:
    if name == "Acos":
        ends = (math.tanh(ends[0]), math.tanh(ends[1]))
    with np.errstate(all="ignore"):
        value = float(UNARY_BY_NUMPY[name](np.float64(between(ends, share))))
    assert holds(UNARY[name](interval(*ends)), value)


@pytest.mark.parametrize("name", UNARY_BY_NUMPY)
def test_unary_results_of_infinities_and_nan_are_marked(name: str) -> None:
    for value in (math.inf, -math.inf, math.nan, 2.0, -2.0, 0.0):
        for other in (value, 0.0, 1.0, -3.0, math.inf, -math.inf):
            with np.errstate(all="ignore"):
                made = float(UNARY_BY_NUMPY[name](np.float64(value)))
            assert holds(UNARY[name](interval(value, other)), made), (value, other, made)


@pytest.mark.parametrize("name", BINARY_BY_NUMPY)
@settings(max_examples=40)
@given(
    one=st.tuples(FINITE, FINITE), other=st.tuples(FINITE, FINITE), shares=st.tuples(st.floats(0, 1), st.floats(0, 1))
)
def test_binary_results_of_finite_numbers_lie_within_the_interval(
    name: str, one: tuple[float, float], other: tuple[float, float], shares: tuple[float, float]
) -> None:
    left, right = between(one, shares[0]), between(other, shares[1])
    if name == "Mod" and min(other) <= 0 <= max(other):
        return  # a remainder by 0 is in the test below
    if name == "Pow" and 0 < abs(left) < 1e-4:
        return  # inverses of small numbers overflow
    with np.errstate(all="ignore"):
        value = float(BINARY_BY_NUMPY[name](np.float64(left), np.float64(right)))
    assert holds(BINARY[name](interval(*one), interval(*other)), value)


@pytest.mark.parametrize("name", BINARY_BY_NUMPY)
def test_binary_results_of_infinities_and_nan_are_marked(name: str) -> None:
    values = (math.inf, -math.inf, math.nan, 0.0, 1.0, -2.0)
    for left in values:
        for right in values:
            for wider in (left, 0.0, 1.0):
                with np.errstate(all="ignore"):
                    made = float(BINARY_BY_NUMPY[name](np.float64(left), np.float64(right)))
                found = BINARY[name](interval(left, wider), interval(right))
                assert holds(found, made), (left, right, wider, made, found)


@given(st.lists(NUMBERS, max_size=5))
def test_the_interval_of_an_array_holds_each_element(values: list[float]) -> None:
    found = interval_of(np.array(values, np.float64))
    assert all(holds(found, value) for value in values)


@given(st.lists(st.tuples(FINITE, FINITE), min_size=2, max_size=4), st.floats(0, 1))
def test_a_hull_holds_the_numbers_of_both_intervals(pairs: list[tuple[float, float]], share: float) -> None:
    hull = interval(*pairs[0]).hull(interval(*pairs[1]))
    assert holds(hull, between(pairs[0], share))
    assert holds(hull, between(pairs[1], share))


@given(st.lists(FINITE, min_size=1, max_size=5))
def test_a_folded_sum_holds_the_sum(values: list[float]) -> None:
    assert holds(folded(BINARY["Add"], [number(value) for value in values]), math.fsum(values))


@given(st.sampled_from([0.0, 1.0]), FINITE, FINITE)
def test_a_choice_holds_the_chosen_number(condition: float, one: float, other: float) -> None:
    assert chosen(number(condition), number(one), number(other)).only == (one if condition else other)
    both = chosen(intervals.BOOLEAN, number(one), number(other))
    assert holds(both, one)
    assert holds(both, other)


@given(FINITE, FINITE, st.floats(0, 1))
def test_casts_hold_the_cast_number(low: float, high: float, share: float) -> None:
    value = between((low, high), share)
    assert holds(as_whole(interval(low, high)), float(np.trunc(value)))
    assert holds(as_truth(interval(low, high)), float(bool(value)))


@pytest.mark.parametrize(
    ("value", "masked"), [(MASKED_FROM, True), (-1e9, True), (-math.inf, True), (-10.0, False), (math.nan, False)]
)
def test_low_numbers_are_marked_as_masked(value: float, masked: bool) -> None:
    assert number(value).masked is masked


def test_twice_the_lowest_number_is_minus_infinity() -> None:
    lowest = number(float(np.finfo(np.float32).min))
    assert intervals.add(lowest, lowest).wild & NEGATIVE


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_zero_times_infinity_is_marked_as_nan(sign: float) -> None:
    assert intervals.multiply(number(0), number(sign * math.inf)).wild & NAN


def test_an_unknown_bound_does_not_mark_infinity() -> None:
    assert intervals.multiply(number(0), intervals.ANY) == intervals.ZERO
