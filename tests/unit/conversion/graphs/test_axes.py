"""An axis is followed through the nodes of a graph, forwards and backwards.

`GRAPH` is the example of the docstring of `graphs/axes.py`. Axes count from the end. `forward` returns None for an axis
whose place is lost, and False for a node that does more than pass its input on.
"""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir
import pytest
from attnserve_server.conversion.graphs.axes import backward, forward

GRAPH = """
<ir_version: 8, opset_import: ["" : 17]>
graph (float[B, 5, S] scores, float[1, 1, 1, S] mask) => (float[B, H, S, 5, 1] out)
<int64[4] shape = {0, 4, 5, -1}, int64[1] last = {-1}>
{
    unfolded = Reshape(scores, shape)
    masked = Add(unfolded, mask)
    weights = Softmax <axis = -1> (masked)
    swapped = Transpose <perm = [0, 1, 3, 2]> (weights)
    out = Unsqueeze(swapped, last)
}
"""


@pytest.fixture(scope="module")
def nodes() -> dict[str, ir.Node]:
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(GRAPH))).graph
    return {node.op_type: node for node in graph}


@pytest.mark.parametrize(
    ("op_type", "before", "after"),
    [("Reshape", -1, -1), ("Add", -1, -1), ("Transpose", -1, -2), ("Transpose", -2, -1), ("Unsqueeze", -2, -3)],
)
def test_axis_is_followed_in_both_directions(nodes: dict[str, ir.Node], op_type: str, before: int, after: int) -> None:
    assert forward(nodes[op_type], 0, before) == after
    assert next(backward(nodes[op_type], after))[1] == before


def test_softmax_does_more_than_pass_its_input_on(nodes: dict[str, ir.Node]) -> None:
    assert forward(nodes["Softmax"], 0, -1) is False
    assert list(backward(nodes["Softmax"], -1)) == []


def test_shapes_and_axes_that_are_inputs_are_not_passed_on(nodes: dict[str, ir.Node]) -> None:
    assert forward(nodes["Reshape"], 1, -1) is False
    assert [value.name for value, _ in backward(nodes["Reshape"], -1)] == ["scores"]
    assert [value.name for value, _ in backward(nodes["Add"], -1)] == ["unfolded", "mask"]


def test_axis_that_a_reshape_splits_is_lost(nodes: dict[str, ir.Node]) -> None:
    assert forward(nodes["Reshape"], 0, -3) is None
    assert forward(nodes["Add"], 0, None) is None


def test_inserted_axis_has_no_source(nodes: dict[str, ir.Node]) -> None:
    assert next(backward(nodes["Unsqueeze"], -1))[1] is None
