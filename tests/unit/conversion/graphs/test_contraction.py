"""MatMul, Gemm, Einsum and their integer forms in the notation of einsum.

`Contraction.of` returns None for a node that does not contract two operands.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from attnserve_server.conversion.graphs.contraction import Contraction
from onnx import TensorProto, helper

SHAPES = {"q": [2, 4, 5, 8], "k": [2, 4, 6, 8], "t": [2, 4, 8, 6], "w": [8, 3], "flat": [5, 8]}


def node(op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> ir.Node:
    nodes = [helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2])]
    nodes.append(helper.make_node(op_type, list(inputs), ["y"], domain=domain, **attributes))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in SHAPES.items()]
    graph = helper.make_graph(nodes, "graph", values, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    made = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])).graph
    made[0].outputs[0].shape = ir.Shape(SHAPES["t"])
    return made[1]


def of(op_type: str, *inputs: str, **attributes: Any) -> Contraction:
    found = Contraction.of(node(op_type, *inputs, **attributes))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("op_type", "inputs", "attributes", "equation"),
    [
        ("MatMul", ("q", "t"), {}, "...ij,...jk->...ik"),
        ("MatMulInteger", ("q", "t"), {}, "...ij,...jk->...ik"),
        ("FusedMatMul", ("q", "k"), {"domain": "com.microsoft", "transB": 1}, "...ij,...kj->...ik"),
        ("Gemm", ("flat", "w"), {}, "ij,jk->ik"),
        ("Einsum", ("q", "k"), {"equation": "bhld, bhsd -> bhls"}, "bhld,bhsd->bhls"),
        ("Einsum", ("q", "k"), {"equation": "...ld,...sd"}, "...ld,...sd->...ls"),
        ("QLinearMatMul", ("q", "w", "w", "t"), {}, "...ij,...jk->...ik"),
    ],
)
def test_every_operator_has_its_equation(
    op_type: str, inputs: tuple[str, ...], attributes: dict[str, Any], equation: str
) -> None:
    assert of(op_type, *inputs, **attributes).equation == equation


def test_equation_is_what_the_operator_computes() -> None:
    random = np.random.default_rng(1)
    q, t = (random.normal(size=SHAPES[name]) for name in ("q", "t"))
    np.testing.assert_allclose(np.einsum(of("MatMul", "q", "t").equation, q, t), q @ t, atol=1e-12)  # float64


@pytest.mark.parametrize(
    "other",
    [
        node("Add", "q", "q"),
        node("MatMul", "q", "t", domain="other"),
        node("FusedMatMul", "q", "t", domain="com.microsoft", transBatchA=1),
        node("Einsum", "q", equation="bhld->bhl"),
        node("MatMul", "q", ""),
    ],
    ids=["Add", "another domain", "transposed batch", "one operand", "operand left out"],
)
def test_other_nodes_are_no_contractions_of_two(other: ir.Node) -> None:
    assert Contraction.of(other) is None


def test_axes_of_scores_come_from_queries_and_keys() -> None:
    scores = of("MatMul", "q", "t")
    assert scores.sources(-1) == (False, True)
    assert scores.sources(-2) == (True, False)
    assert (scores.sums_over(0, -1), scores.sums_over(1, -2), scores.sums_over(1, -1)) == (True, True, False)
    assert (scores.own_axes(0), scores.own_axes(1)) == ((-2,), (-1,))
    assert (scores.counterpart(0, -1), scores.counterpart(0, -2), scores.counterpart(0, -3)) == (-2, None, -3)
    assert (scores.summed_dimension(), scores.vectors_in(0)) == (8, 2 * 4 * 5)


def test_spelled_out_contraction_has_a_letter_for_every_axis_before_transpositions() -> None:
    scores = of("MatMul", "q", "kt").spelled_out()
    assert scores is not None
    query, key = scores.terms
    assert (len(query.letters), key.value.name) == (4, "k")
    assert query.letters[:2] == key.letters[:2] == scores.output[:2]
    assert (key.letters[2], key.letters[3]) == (scores.output[3], query.letters[3])


def test_operands_of_different_ranks_are_not_spelled_out() -> None:
    assert of("MatMul", "q", "w").spelled_out() is None
