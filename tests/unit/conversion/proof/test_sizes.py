"""Sizes agree with the integers that they represent, for all lengths.

A `Size` is the size of an axis as a polynomial of symbols, such as 4 seq + 1. Pairs of a size and a function of lengths
are drawn and compared. An operation without an exact result returns None, or a size with an opaque part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
from attnserve_server.conversion.proof.sizes import (
    ONE,
    Atom,
    Size,
    floor_div,
    function,
    greater,
    lesser,
    modulo,
    product,
)
from hypothesis import given
from hypothesis import strategies as st

MOST = 20
SYMBOLS = ("batch", "frames", "seq")
Number = Callable[[Mapping[str, int]], int]
Pair = tuple[Size, Number]
LENGTHS = st.fixed_dictionaries({symbol: st.integers(1, MOST) for symbol in SYMBOLS})


def symbol(name: str) -> Size:
    return Size.atom(Atom(name, frozenset({name}), 1, MOST))


SEQ, BATCH, FRAMES = symbol("seq"), symbol("batch"), symbol("frames")


def _sum(pair: tuple[Pair, Pair]) -> Pair:
    (one, first), (other, second) = pair
    return one + other, lambda at: first(at) + second(at)


def _difference(pair: tuple[Pair, Pair]) -> Pair:
    (one, first), (other, second) = pair
    return one - other, lambda at: first(at) - second(at)


def _product(pair: tuple[Pair, Pair]) -> Pair:
    (one, first), (other, second) = pair
    return one * other, lambda at: first(at) * second(at)


def _least(pair: tuple[Pair, Pair]) -> Pair:
    (one, first), (other, second) = pair
    return lesser(one, other), lambda at: min(first(at), second(at))


def _greatest(pair: tuple[Pair, Pair]) -> Pair:
    (one, first), (other, second) = pair
    return greater(one, other), lambda at: max(first(at), second(at))


def _widened(children: st.SearchStrategy[Pair]) -> st.SearchStrategy[Pair]:
    pairs = st.tuples(children, children)
    return st.one_of(*(pairs.map(make) for make in (_sum, _difference, _product)))


POLYNOMIALS: st.SearchStrategy[Pair] = st.recursive(
    st.one_of(
        st.integers(-4, 4).map(lambda value: (Size.of(value), lambda at: value)),
        st.sampled_from(SYMBOLS).map(lambda name: (symbol(name), lambda at: at[name])),
    ),
    _widened,
    max_leaves=6,
)


def value_of(size: Size, at: Mapping[str, int]) -> int:
    """Return a polynomial of symbols at some lengths."""
    return sum(factor * math.prod(at[name] for name in monomial) for monomial, factor in size.terms)


@given(POLYNOMIALS, LENGTHS)
def test_arithmetic_agrees_with_integers(pair: Pair, at: dict[str, int]) -> None:
    size, number = pair
    assert value_of(size, at) == number(at)


@given(POLYNOMIALS, LENGTHS)
def test_bounds_hold_for_all_lengths(pair: Pair, at: dict[str, int]) -> None:
    size, number = pair
    low, high = size.bounds()
    assert low <= number(at) <= high


@given(POLYNOMIALS, POLYNOMIALS)
def test_equal_sizes_are_equal_objects(one: Pair, other: Pair) -> None:
    (first, _), (second, _) = one, other
    assert first + second == second + first
    assert first * second == second * first
    assert hash(first + second) == hash(second + first)
    assert (first + second) - second == first
    assert first - first == Size.of(0)


@given(POLYNOMIALS, POLYNOMIALS)
def test_a_product_divided_by_one_factor_is_the_other(one: Pair, other: Pair) -> None:
    (first, _), (second, _) = one, other
    if not second.terms:
        assert first.over(second) is None
        return
    assert (first * second).over(second) == first


@given(POLYNOMIALS, POLYNOMIALS, LENGTHS)
def test_a_quotient_times_its_divisor_is_the_dividend(one: Pair, other: Pair, at: dict[str, int]) -> None:
    (first, number), (second, by) = one, other
    quotient = first.over(second)
    if quotient is not None:
        assert value_of(quotient, at) * by(at) == number(at)


def test_a_size_divided_by_one_with_other_symbols_has_no_quotient() -> None:
    assert (FRAMES * FRAMES).over(BATCH + FRAMES) is None


@given(POLYNOMIALS)
def test_symbols_are_those_that_the_value_depends_on(pair: Pair) -> None:
    size, number = pair
    for name in SYMBOLS:
        if name not in size.symbols:
            values = {number({**dict.fromkeys(SYMBOLS, 3), name: length}) for length in range(1, 6)}
            assert len(values) == 1


@given(POLYNOMIALS, POLYNOMIALS, LENGTHS)
def test_minimum_and_maximum_lie_within_their_bounds(one: Pair, other: Pair, at: dict[str, int]) -> None:
    for made, number in (_least((one, other)), _greatest((one, other))):
        low, high = made.bounds()
        assert low <= number(at) <= high
        if all(name in SYMBOLS for monomial, _ in made.terms for name in monomial):
            assert value_of(made, at) == number(at)


@given(POLYNOMIALS, st.integers(1, 5), LENGTHS)
def test_a_rounded_quotient_lies_within_its_bounds(pair: Pair, by: int, at: dict[str, int]) -> None:
    size, number = pair
    if size.bounds()[0] < 0:
        return  # both are positive, as the function requires
    found = floor_div(size, Size.of(by))
    low, high = found.bounds()
    assert low <= number(at) // by <= high
    low, high = modulo(size, Size.of(by)).bounds()
    assert low <= number(at) % by <= high


def test_an_exact_quotient_is_a_polynomial() -> None:
    assert floor_div(SEQ * Size.of(4), Size.of(2)) == SEQ + SEQ
    assert floor_div(SEQ * BATCH, BATCH) == SEQ
    assert modulo(SEQ * Size.of(4), Size.of(4)) == Size.of(0)


def test_rounded_quotients_of_equal_sizes_are_equal() -> None:
    half = floor_div(SEQ + ONE, Size.of(2))
    assert half == floor_div(ONE + SEQ, Size.of(2))
    assert half != floor_div(SEQ, Size.of(2))
    assert half.symbols == {"seq"}


def test_a_remainder_cancels_with_its_multiple() -> None:
    assert floor_div(SEQ, Size.of(3)) * Size.of(3) + modulo(SEQ, Size.of(3)) == SEQ


@pytest.mark.parametrize("make", [lesser, greater])
def test_minimum_and_maximum_do_not_depend_on_the_order(make: Callable[[Size, Size], Size]) -> None:
    assert make(SEQ, Size.of(5)) == make(Size.of(5), SEQ)


def test_a_known_minimum_needs_no_atom() -> None:
    assert lesser(SEQ, SEQ + ONE) == SEQ
    assert greater(SEQ, SEQ + ONE) == SEQ + ONE
    assert lesser(SEQ, Size.of(MOST)) == SEQ
    assert greater(SEQ, ONE) == SEQ


def test_only_a_constant_size_is_a_number() -> None:
    assert Size.of(0).number == 0
    assert (SEQ - SEQ + Size.of(3)).number == 3
    assert SEQ.number is None
    assert (SEQ + ONE).number is None


def test_functions_of_equal_name_and_arguments_are_equal() -> None:
    one = function("odd", [SEQ, FRAMES], 0, math.inf)
    assert one == function("odd", [SEQ, FRAMES], 0, math.inf)
    assert one != function("odd", [FRAMES, SEQ], 0, math.inf)
    assert one.symbols == {"seq", "frames"}


def test_a_size_prints_in_the_usual_notation() -> None:
    assert str(Size.of(0)) == "0"
    assert str(SEQ * Size.of(2)) == "2 * seq"
    assert str(product([BATCH, SEQ])) == "batch * seq"
    assert str(product([])) == "1"
