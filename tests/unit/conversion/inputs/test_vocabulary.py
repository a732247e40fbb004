"""Vocabulary: which tables a graph looks its ids up in, and how many rows the smallest has.

`vocabulary_size_of` returns 0 where no table is found, and `extreme_ids_of` an empty tuple. Nothing is run.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from attnserve_server.conversion.inputs.signature import signature_of
from attnserve_server.conversion.inputs.vocabulary import extreme_ids_of, vocabulary_size_of
from attnserve_server.model.manifest import InputRole
from onnx import TensorProto, helper, numpy_helper
from onnx.parser import parse_model


def graph_of(nodes: list[onnx.NodeProto], **tables: np.ndarray) -> onnx.GraphProto:
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"])
    initializers = [numpy_helper.from_array(table, name) for name, table in tables.items()]
    return helper.make_graph(nodes, "lookup", [ids], [], initializers)


def gather(table: str, ids: str = "input_ids", **attributes: int) -> onnx.NodeProto:
    return helper.make_node("Gather", [table, ids], [f"{table}.found"], **attributes)


def test_the_smallest_table_bounds_the_ids() -> None:
    graph = graph_of([gather("words"), gather("bias")], words=np.zeros((60, 4)), bias=np.zeros(55))
    assert vocabulary_size_of(graph, "input_ids") == 55


def test_tables_of_other_inputs_and_other_axes_do_not_count() -> None:
    nodes = [gather("words"), gather("types", "token_type_ids"), gather("wide", axis=1)]
    graph = graph_of(nodes, words=np.zeros((60, 4)), types=np.zeros((2, 4)), wide=np.zeros((3, 9)))
    assert vocabulary_size_of(graph, "input_ids") == 60


@pytest.mark.parametrize("operator", ["Cast", "Identity"])
def test_a_table_is_followed_through_operators_that_keep_its_rows(operator: str) -> None:
    attributes = {"to": TensorProto.FLOAT} if operator == "Cast" else {}
    nodes = [helper.make_node(operator, ["words"], ["table"], **attributes), gather("table")]
    assert vocabulary_size_of(graph_of(nodes, words=np.zeros((60, 4), np.float16)), "input_ids") == 60


def test_a_table_may_be_a_constant_node() -> None:
    constant = helper.make_node("Constant", [], ["words"], value=numpy_helper.from_array(np.zeros((60, 4))))
    assert vocabulary_size_of(graph_of([constant, gather("words")]), "input_ids") == 60


def test_ids_are_followed_through_operators_that_keep_them() -> None:
    cast = helper.make_node("Cast", ["input_ids"], ["narrow"], to=TensorProto.INT32)
    assert vocabulary_size_of(graph_of([cast, gather("words", "narrow")], words=np.zeros((60, 4))), "input_ids") == 60


def test_ids_without_a_table_have_no_vocabulary() -> None:
    assert vocabulary_size_of(graph_of([]), "input_ids") == 0


def test_the_ids_with_the_greatest_and_the_least_embeddings_are_found() -> None:
    words = np.ones((9000, 2), np.float16)
    words[[3, 8500]] = 5
    words[[7, 20]] = 0.1
    assert set(extreme_ids_of(graph_of([gather("words")], words=words), "input_ids")) == {3, 8500, 7, 20}


def test_an_input_without_a_table_of_vectors_has_no_extreme_ids() -> None:
    assert extreme_ids_of(graph_of([gather("bias")], bias=np.zeros(55)), "input_ids") == ()
    assert extreme_ids_of(graph_of([]), "input_ids") == ()


ROWS = 60
ARITHMETIC = {
    "wrapped": """
        below = Less(input_ids, zero)
        lifted = Add(input_ids, rows)
        row = Where(below, lifted, input_ids)
    """,
    "wrapped in int32": """
        narrow = Cast<to = 6>(input_ids)
        below = Less(narrow, narrow_zero)
        lifted = Add(narrow, narrow_rows)
        row = Where(below, lifted, narrow)
    """,
    "wrapped by products": """
        narrow = Cast<to = 6>(input_ids)
        lifted = Add(narrow, narrow_rows)
        real = Cast<to = 1>(narrow)
        below = Less(real, real_zero)
        not_below = Not(below)
        keeps = Cast<to = 6>(not_below)
        kept = Mul(narrow, keeps)
        lifts = Cast<to = 6>(below)
        moved = Mul(lifts, lifted)
        row = Add(moved, kept)
    """,
    "remainder": "row = Mod(input_ids, rows)",
    "clipped": "row = Clip(input_ids, zero, last)",
    "clipped by Max and Min": "least = Max(input_ids, zero) row = Min(least, last)",
}


def behind(arithmetic: str) -> onnx.ModelProto:
    """Ids behind some arithmetic, as they index a table of 60 rows."""
    model = parse_model(f"""
        <ir_version: 10, opset_import: ["": 17]> lookup (int64[B, T] input_ids) => (float[B, T, 4] y)
        <int64 zero = {{0}}, int64 rows = {{{ROWS}}}, int64 last = {{{ROWS - 1}}}, int64 one = {{1}},
         float real_zero = {{0.0}}, int32 narrow_zero = {{0}}, int32 narrow_rows = {{{ROWS}}}, int64[1] end = {{-1}}>
        {{ {arithmetic}
           y = Gather(words, row) }}
    """)
    table = np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(table, "words"))
    return onnx.shape_inference.infer_shapes(model)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_ids_are_followed_through_arithmetic_that_leaves_each_its_own_row(arithmetic: str) -> None:
    graph = behind(ARITHMETIC[arithmetic]).graph
    assert vocabulary_size_of(graph, "input_ids") == ROWS
    [spec] = signature_of(graph).inputs
    assert (spec.role, spec.vocabulary_size) == (InputRole.TOKEN_IDS, ROWS)


def test_an_offset_before_the_table_moves_the_ids() -> None:
    graph = behind("row = Add(input_ids, one)").graph
    assert vocabulary_size_of(graph, "input_ids") == ROWS - 1
    words = numpy_helper.to_array(graph.initializer[-1])
    norms = np.linalg.norm(words[1:], axis=1)
    assert set(extreme_ids_of(graph, "input_ids", 1)) == {int(norms.argmax()), int(norms.argmin())}


@pytest.mark.parametrize(
    "arithmetic", ["same = Equal(input_ids, one) row = Cast<to = 7>(same)", "row = Neg(input_ids)"]
)
def test_numbers_that_are_computed_from_ids_are_no_ids(arithmetic: str) -> None:
    assert vocabulary_size_of(behind(arithmetic).graph, "input_ids") == 0


def test_ids_in_tuples_of_one_number_are_ids() -> None:
    graph = behind("column = Unsqueeze(input_ids, end) row = GatherND(words, column)").graph
    del graph.node[-1]
    assert vocabulary_size_of(graph, "input_ids") == ROWS
