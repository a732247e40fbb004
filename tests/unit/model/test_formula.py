"""Formulas of lengths: what is parsed, what it evaluates to, and what is refused.

An example is `past + 2 * seq`. `Formula.parse` raises FormulaInvalid for another text, and so does a quotient with a
remainder when it is evaluated.
"""

from __future__ import annotations

import pytest
from attnserve_server.model.formula import Formula, FormulaInvalid
from hypothesis import given
from hypothesis import strategies as st

LENGTHS = {"past": 3, "seq": 8, "height": 32, "n": 4}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("past + seq", 11),
        ("2*seq", 16),
        ("seq // n", 2),
        ("seq/n + 1", 3),
        ("seq - past - 1", 4),
        ("(past + seq) * 2", 22),
        ("height/n/2", 4),
        ("1 + past * seq", 25),
        ("past", 3),
        ("(height // 16) * (height // 16) + 1", 5),
    ],
)
def test_a_formula_has_the_value_of_arithmetic(text: str, value: int) -> None:
    formula = Formula.parse(text)
    assert formula.length_at(LENGTHS) == value
    assert Formula.parse(str(formula)) == formula


@pytest.mark.parametrize(
    "text",
    ["", "past +", "* seq", "(past", "past)", "past seq", "seq ** 2", "f(seq)", "a.b[0]", "seq % 2", "-seq", "1" * 11],
)
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(FormulaInvalid, match="no formula"):
        Formula.parse(text)


def test_a_text_of_many_characters_is_refused_before_it_is_read() -> None:
    with pytest.raises(FormulaInvalid, match="201 characters; a formula has 200 at most"):
        Formula.parse("(" * 201)


def test_a_quotient_with_a_remainder_has_no_value() -> None:
    with pytest.raises(FormulaInvalid, match="seq / past is not a whole number: 8 / 3"):
        Formula.parse("seq / past").length_at(LENGTHS)


@pytest.mark.parametrize(
    ("text", "grows"), [("past + 2 * seq", True), ("seq - 1", False), ("seq // 2", False), ("0 * seq", False)]
)
def test_only_sums_and_products_grow_with_each_symbol(text: str, grows: bool) -> None:
    assert Formula.parse(text).grows is grows


def test_the_text_with_lengths_shows_how_a_value_comes_about() -> None:
    assert Formula.parse("past + 2 * seq").shown(LENGTHS) == "3 + 2 * 8"


LEAVES = st.one_of(st.integers(1, 9).map(Formula), st.sampled_from(sorted(LENGTHS)).map(Formula))
FORMULAS = st.recursive(
    LEAVES,
    lambda parts: st.builds(
        lambda sign, one, other: Formula(None, sign, (one, other)), st.sampled_from(["+", "-", "*"]), parts, parts
    ),
    max_leaves=8,
)


@given(FORMULAS)
def test_the_text_of_any_formula_reads_back(formula: Formula) -> None:
    read = Formula.parse(str(formula))
    assert read == formula
    assert read.length_at(LENGTHS) == eval(str(formula), {}, LENGTHS)
