"""Vocabulary: which tables a graph looks its ids up in, and how many rows the smallest has."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from attnserve_server.conversion.inputs.lookups import extreme_ids_of, vocabulary_size_of
from onnx import TensorProto, helper, numpy_helper


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
