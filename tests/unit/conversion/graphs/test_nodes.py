"""New nodes have the form of the graph's opset, shared constants, and names with the builder's prefix.

`NodeBuilder` makes the nodes, and the tests run them in onnxruntime in each of `OPSETS`.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from attnserve_server.conversion.graphs.nodes import NodeBuilder, remove_unused_initializers, replace_node
from onnx import TensorProto, helper

OPSETS = [11, 13, 15, 18, 23]


def model(opset: int) -> ir.Model:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"], name="copy")],
        "graph",
        [info("x", TensorProto.FLOAT, ["n", 3])],
        [info("y", TensorProto.FLOAT, ["n", 3])],
    )
    version = helper.make_opsetid("", opset)
    return ir.from_proto(helper.make_model(graph, opset_imports=[version], ir_version=6 if opset < 21 else 10))


def run(made: ir.Model, x: np.ndarray, name: str) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(ir.to_proto(made).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([name], {"x": x})[0])


@pytest.mark.parametrize("opset", OPSETS)
def test_operators_run_in_the_form_of_every_opset(opset: int) -> None:
    made = model(opset)
    nodes = NodeBuilder(made.graph, "new/")
    x = made.graph.inputs[0]
    greatest = nodes.reduce("ReduceMax", x, -1)
    total = nodes.reduce("ReduceSum", nodes.op("Sub", [x, greatest]), 1)
    wide = nodes.unsqueeze(total, 1, 2)
    flat = nodes.reshape(wide, [nodes.shape(x, 0, 1)])
    flat.type = ir.TensorType(ir.DataType.FLOAT)
    nodes.place_last()
    made.graph.outputs.append(flat)
    numbers = np.array([[1, 2, 3], [4, 8, 4]], np.float32)
    assert run(made, numbers, str(flat.name)).tolist() == [-3.0, -8.0]
    assert run(made, numbers[:0], str(flat.name)).tolist() == []


@pytest.mark.parametrize(("opset", "inputs"), [(12, 1), (13, 2)])
def test_axes_are_an_attribute_or_an_input_by_opset(opset: int, inputs: int) -> None:
    made = model(opset)
    node = NodeBuilder(made.graph, "new/").unsqueeze(made.graph.inputs[0], 0).producer()
    assert node is not None
    assert len(node.inputs) == inputs
    assert ("axes" in node.attributes) == (inputs == 1)


def test_constants_are_stored_once_for_all_builders_of_a_graph() -> None:
    made = model(18)
    one, other = (NodeBuilder(made.graph, prefix) for prefix in ("a/", "b/"))
    assert one.ints(1, 2) is other.ints(1, 2)
    assert one.number(0.5) is other.number(0.5)
    assert one.number(0.5) is not one.number(0.5, ir.DataType.FLOAT16)
    assert one.scalar(1) is not one.ints(1)
    assert len(str(one.ints(*range(1000)).name)) < 100
    remove_unused_initializers(made.graph)
    assert not made.graph.initializers


def test_only_nodes_that_are_made_to_be_shared_are_shared() -> None:
    made = model(18)
    nodes, x = NodeBuilder(made.graph, "new/"), made.graph.inputs[0]
    assert nodes.op("Neg", [x], shared=True) is nodes.op("Neg", [x], shared=True)
    assert nodes.op("Neg", [x]) is not nodes.op("Neg", [x])
    assert nodes.op("Cast", [x], shared=True, to=1) is not nodes.op("Cast", [x], shared=True, to=10)


def test_nodes_are_placed_in_order_where_they_are_to_be_and_named_with_the_prefix() -> None:
    made = model(18)
    nodes = NodeBuilder(made.graph, "new/", metadata={"module": "encoder"})
    (copy,) = made.graph
    second = nodes.op("Abs", [nodes.op("Neg", [made.graph.inputs[0]])])
    assert len(list(made.graph)) == 1
    nodes.place_before(copy)
    assert [node.op_type for node in made.graph] == ["Neg", "Abs", "Identity"]
    assert second.name == "new/Abs_1"
    assert [node.metadata_props.get("module") for node in made.graph] == ["encoder", "encoder", None]
    replace_node(copy, second)
    assert [node.op_type for node in made.graph] == ["Neg", "Abs"]
    assert [value.name for value in made.graph.outputs] == ["y"]
    onnx.checker.check_model(ir.to_proto(made))
