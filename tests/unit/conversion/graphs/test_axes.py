"""An axis is followed through the nodes of a graph, forwards and backwards.

`GRAPH` has scores (B*4, 5, 6) of 4 heads, 5 queries and 6 keys, folded into the batch; the other tests of Reshape state
their own shapes. Axes count from the end. `forward` returns None for an axis whose place is lost, and False for a node
that does more than pass its input on.
"""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir
import pytest
from attnserve_server.conversion.graphs.axes import backward, forward

GRAPH = """
<ir_version: 8, opset_import: ["" : 17]>
graph (float[N, 5, 6] scores, float[1, 1, 1, 6] mask) => (float[B, H, 6, 5, 1] out)
<int64[4] shape = {-1, 4, 5, 6}, int64[1] last = {-1}>
{
    unfolded = Reshape(scores, shape)
    masked = Add(unfolded, mask)
    weights = Softmax <axis = -1> (masked)
    swapped = Transpose <perm = [0, 1, 3, 2]> (weights)
    out = Unsqueeze(swapped, last)
}
"""


def nodes_of(text: str) -> dict[str, ir.Node]:
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))).graph
    return {node.op_type: node for node in graph}


def reshape(before: str, shape: str, after: str = "A, B, C, D") -> ir.Node:
    """Return a Reshape of a value whose axes are `before` to a constant shape."""
    return nodes_of(
        f'<ir_version: 8, opset_import: ["" : 17]> graph (float[{before}] x) => (float[{after}] out) '
        f"<int64[{shape.count(',') + 1}] shape = {{{shape}}}> {{ y = Reshape(x, shape) out = Relu(y) }}"
    )["Reshape"]


@pytest.fixture(scope="module")
def nodes() -> dict[str, ir.Node]:
    return nodes_of(GRAPH)


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


@pytest.mark.parametrize(
    ("before", "shape", "axis"),
    [
        ("B, 5, S", "0, 4, 5, -1", -1),  # S is split: (B, 4, 5, S / 4)
        ("B, S, 5", "0, 4, -1, 5", -2),
        ("B, S, 6", "0, 2, -1, 3", -2),  # -1 is S, but steps by 3 elements instead of 6
        ("B, S, 5, 6", "0, 30, -1", -3),
    ],
)
def test_axis_whose_size_is_not_kept_is_lost(before: str, shape: str, axis: int) -> None:
    node = reshape(before, shape, ", ".join("ABCD"[: shape.count(",") + 1]))
    assert forward(node, 0, axis) is None
    assert next(backward(node, axis))[1] is None


@pytest.mark.parametrize(
    ("before", "shape", "axis"),
    [
        ("B, 5, S", "0, 1, 5, -1", -1),  # what is in front of S keeps its size, and nothing is behind it
        ("B, H, S, 6", "0, -1, 0, 6", -3),
        ("B, 5, 6", "-1, 6", -1),
    ],
)
def test_axis_whose_size_is_kept_is_followed(before: str, shape: str, axis: int) -> None:
    node = reshape(before, shape, ", ".join("ABCDE"[: shape.count(",") + 1]))
    assert forward(node, 0, axis) == axis
    assert next(backward(node, axis))[1] == axis


def test_last_two_axes_are_followed_where_the_graph_states_no_sizes() -> None:
    # Such as the shapes that exporters compute at run time. Conversion then measures the axes by runs.
    node = nodes_of(
        '<ir_version: 8, opset_import: ["" : 17]> graph (float[N, L, S] x, int64[4] shape) => (float[A, B, C, D] out) '
        "{ y = Reshape(x, shape) out = Relu(y) }"
    )["Reshape"]
    assert [forward(node, 0, axis) for axis in (-1, -2, -3)] == [-1, -2, None]


def test_inserted_axis_has_no_source(nodes: dict[str, ir.Node]) -> None:
    assert next(backward(nodes["Unsqueeze"], -1))[1] is None
