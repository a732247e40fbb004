"""The types that describe a site: which attention can be tapped, and what a layout counts.

A site is a place in a graph where attention is computed. A tap is the nodes that a conversion adds to return its
weights; a site that can have none is `Untappable`, with a reason.
"""

from __future__ import annotations

import onnx_ir as ir
import pytest
from attnserve_server.conversion.base.sites import (
    Factor,
    Features,
    FoundSite,
    Layout,
    Linear,
    Operand,
    Probabilities,
    Scores,
    Tappable,
    Untappable,
    heads_in,
    value_and_output,
)

NODE = ir.node("Softmax", [ir.val("x")])
VALUE, OUTPUT = ir.val("value"), ir.val("output")
OPERANDS = Operand(VALUE, 2, packed=True), Operand(OUTPUT, 2, packed=True)


def found(attention: Tappable | Untappable) -> FoundSite:
    return FoundSite(NODE, "Softmax", 2, 2, 4, attention)


def scores(sink: float | None = None) -> Scores:
    return Scores(OPERANDS[0], OPERANDS[0], *OPERANDS, head_dim=4, scale=0.5, sink=sink)


def probabilities(dtype: ir.DataType = ir.DataType.FLOAT, *, whole: bool = True) -> Probabilities:
    weights = ir.val("weights", dtype)
    return Probabilities(weights, -1, NODE, 0, VALUE, OUTPUT, query_axes=(-2,), scores=(NODE,), whole=whole)


def linear() -> Linear:
    features = Features(ir.val("features"), (0, 1, 2))
    return Linear(features, features, *OPERANDS)


def test_an_untappable_site_has_a_reason() -> None:
    site = found(Untappable("it stands inside a subgraph"))
    assert (site.tappable, site.unavailable_reason) == (False, "it stands inside a subgraph")


@pytest.mark.parametrize("attention", [scores(), probabilities(), linear()], ids=["scores", "probabilities", "linear"])
def test_a_tappable_site_has_value_and_output_and_no_reason(attention: Tappable) -> None:
    site = found(attention)
    assert (site.tappable, site.unavailable_reason) == (True, "")
    assert value_and_output(attention) == (VALUE, OUTPUT)


@pytest.mark.parametrize(
    ("attention", "whole"),
    [
        (scores(), True),
        (scores(sink=0.0), False),
        (probabilities(), True),
        (probabilities(whole=False), False),
        (probabilities(ir.DataType.FLOAT16), False),
        (linear(), True),
    ],
)
def test_rows_sum_to_one_unless_a_node_takes_weight_away(attention: Tappable, whole: bool) -> None:
    assert found(attention).rows_sum_to_one is whole


@pytest.mark.parametrize("change", ["weights", "columns", "part", "bias", "rotary"])
def test_an_operand_that_the_operator_computes_is_not_plain(change: str) -> None:
    assert Operand(VALUE, 2, packed=True, order=(0, 1, 2)).plain
    assert not Operand(VALUE, 2, packed=True, **{change: (0, 1)}).plain  # type: ignore[arg-type]


def test_a_layout_counts_its_heads_and_recognizes_windows() -> None:
    axes = ((Factor("batch"), Factor("head", 3)), (Factor("head", 2),), (Factor("query"),), (Factor("key"),))
    dense = Layout(axes, kv_heads=2, head_dim=4)
    assert (dense.heads, heads_in(axes), dense.windowed) == (6, 6, False)
    assert Layout(((Factor("batch"), Factor("window")), *axes[1:]), kv_heads=2, head_dim=4).windowed
