"""Axes whose names are formulas: which follow from which, and which formulas are refused.

An example is the axis `past + seq`, which follows from `past` and `seq`. Free axes are those whose lengths may be
chosen at will; the lengths of all others follow from them. A formula that cannot be solved, or depends on the batch
axis, raises BuildRefused.
"""

from __future__ import annotations

import pytest
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.inputs.relations import relations_of
from attnserve_server.conversion.inputs.signature import signature_of
from batch_graphs import graph


def formulas(*symbols: str) -> dict[str, str]:
    """The formulas of these axes, as text."""
    return {name: str(formula) for name, formula in relations_of(symbols, {"batch"}).formulas.items()}


def test_a_sum_of_two_axes_follows_from_them() -> None:
    assert formulas("past", "seq", "past + seq") == {"past + seq": "past + seq"}


def test_a_formula_of_an_axis_that_no_input_has_is_a_name() -> None:
    assert formulas("encoder_sequence_length / 2", "decoder_sequence_length") == {}


@pytest.mark.parametrize(("quotient", "free"), [("height/16", "height_by_16"), ("height // 16", "height_by_16")])
def test_a_quotient_is_free_and_its_dividend_a_multiple(quotient: str, free: str) -> None:
    assert formulas("height", quotient) == {"height": f"16 * {free}"}


def test_a_difference_is_free_and_the_whole_a_sum() -> None:
    assert formulas("total", "past", "total - past") == {"total": "total_minus_past + past"}


def test_formulas_of_axes_that_follow_are_over_free_axes() -> None:
    found = formulas("height", "height/2", "height + tokens", "tokens")
    assert found == {"height": "2 * height_by_2", "height + tokens": "2 * height_by_2 + tokens"}


@pytest.mark.parametrize("symbols", [("a", "b", "(a + b) / 2"), ("a", "a - 2*a")])
def test_a_formula_that_cannot_be_inverted_is_refused_with_the_remedy(symbols: tuple[str, ...]) -> None:
    with pytest.raises(BuildRefused, match=r"cannot be solved for one of its parts: fix one with --axis NAME=SIZE"):
        relations_of(symbols, set())


def test_a_formula_of_the_batch_is_refused() -> None:
    with pytest.raises(BuildRefused, match=r"the axis 'batch \* heads' depends on 'batch', the batch axis"):
        relations_of(["heads", "batch * heads"], {"batch"})


def test_the_signature_of_a_graph_draws_lengths_that_satisfy_its_relations() -> None:
    model = graph(
        'g (float[b, past, 4] p, float[b, seq, 4] x, float[b, "past + seq"] mask) => (float[b, n, 4] y) '
        "{ y = Concat<axis=1>(p, x) }"
    )
    signature = signature_of(model.graph)
    assert signature.symbols == ("past", "seq")
    assert signature.lengths({"past": 2, "seq": 5}) == {"past": 2, "seq": 5, "past + seq": 7}
