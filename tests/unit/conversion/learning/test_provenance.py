"""The numbers of positions, sent through the nodes that move vectors about.

`Tracer` copies the nodes from an anchor, a value (B, T, C), to a later value, and gives them the numbers 1 to T for
vectors; 0 marks what comes from elsewhere. It raises NotTraced where the later value does not come from the anchor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from attnserve_server.conversion.learning.provenance import NotTraced, Tracer, ancestors, channels_of
from batch_graphs import graph
from opened import runner_of

Array = np.ndarray[Any, np.dtype[Any]]

LENGTH = 6
WIDTH = 4
CONSTANTS = {
    "w": np.ones((WIDTH, WIDTH), np.float32),
    "bias": np.ones(WIDTH, np.float32),
    "pads": np.array([0, 1, 0, 0, 1, 0]),
    "cut": np.array([0, 3, 2, WIDTH]),
    "two": np.array([2]),
    "end": np.array([99]),
    "middle": np.array([1]),
    "order": np.array([5, 3, 1]),
}
X = np.broadcast_to(np.arange(1, LENGTH + 1)[:, np.newaxis], (2, LENGTH, WIDTH))
"""The numbers of the positions of (B, T, C)."""


def model_of(nodes: str) -> onnx.ModelProto:
    return graph(f"g (float[b, t, {WIDTH}] x, float[b, s, {WIDTH}] y) => (float z) {{ {nodes} }}", **CONSTANTS)


def values_of(model: ir.Model) -> dict[str, ir.Value]:
    made = (value for node in model.graph for value in node.outputs)
    return {str(value.name): value for value in (*model.graph.inputs, *made)}


def traced(nodes: str, folder: Path, *, anchor: str = "x", behind: int = 1) -> Array:
    """The numbers that reach z from the anchor."""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(model_of(nodes)))
    values = values_of(model)
    end = Tracer(model.graph, values[anchor], "test", behind).trace(values["z"])
    feeds = {name: np.zeros((2, length, WIDTH), np.float32) for name, length in (("x", LENGTH), ("y", 3))}
    return runner_of(ir.to_proto(model), folder).run(feeds, [str(end.name)])[str(end.name)]


@pytest.mark.parametrize(
    ("nodes", "numbers"),
    [
        pytest.param("z = Identity(x)", X, id="the anchor"),
        pytest.param("h = MatMul(x, w) z = Add(h, bias)", X, id="projection"),
        pytest.param("h = Softmax<axis=-1>(x) z = Mul(h, x)", X, id="norm and residual"),
        pytest.param("z = Transpose<perm=[1, 0, 2]>(x)", X.transpose(1, 0, 2), id="transpose"),
        pytest.param("z = Reshape(x, cut)", X.reshape(2, 3, 2, WIDTH), id="windows"),
        pytest.param("z = Slice(x, two, end, middle)", X[:, 2:], id="slice"),
        pytest.param("z = Gather<axis=1>(x, order)", X[:, [5, 3, 1]], id="gather"),
        pytest.param("p = Pad(x, pads) z = Tanh(p)", np.pad(X, ((0, 0), (1, 1), (0, 0))), id="padding is 0"),
        pytest.param("p = Pad(x, pads, one) z = Tanh(p)", np.pad(X, ((0, 0), (1, 1), (0, 0))), id="padding of 1 is 0"),
        pytest.param(
            "z = Concat<axis=1>(y, x)", np.pad(X, ((0, 0), (3, 0), (0, 0))), id="vectors from elsewhere are 0"
        ),
        pytest.param("k = Reshape(x, cut) z = ReduceMean<axes=[3]>(k)", X[..., :1].reshape(2, 3, 2, 1), id="mean"),
    ],
)
def test_numbers_move_as_the_vectors_do(nodes: str, numbers: Array, tmp_path: Path) -> None:
    declared = "one = Constant<value_float=1.0>() " if "one)" in nodes else ""
    np.testing.assert_array_equal(traced(declared + nodes, tmp_path), numbers)


def test_channels_are_numbered_where_no_axis_is_behind_them(tmp_path: Path) -> None:
    numbers = traced("h = MatMul(x, w) z = Transpose<perm=[0, 2, 1]>(h)", tmp_path, anchor="h", behind=0)
    expected = np.broadcast_to(np.arange(1, WIDTH + 1)[:, np.newaxis], (2, WIDTH, LENGTH))
    np.testing.assert_array_equal(numbers, expected)


def test_a_value_of_another_input_is_not_traced(tmp_path: Path) -> None:
    with pytest.raises(NotTraced, match="'z' does not come from 'x'"):
        traced("z = Tanh(y)", tmp_path)


def test_an_unknown_node_ends_the_trace(tmp_path: Path) -> None:
    with pytest.raises(NotTraced, match="'z' does not come from 'x'"):
        traced("axis = Constant<value_int=1>() c = CumSum(x, axis) z = Tanh(c)", tmp_path)


def test_a_product_of_two_activations_ends_the_trace(tmp_path: Path) -> None:
    with pytest.raises(NotTraced, match="'z' does not come from 'x'"):
        traced("xt = Transpose<perm=[0, 2, 1]>(x) s = MatMul(x, xt) z = Tanh(s)", tmp_path)


def test_a_mean_that_removes_an_axis_is_not_traced(tmp_path: Path) -> None:
    with pytest.raises(NotTraced, match="ReduceMean may average over positions"):
        traced("z = ReduceMean<axes=[1], keepdims=0>(x)", tmp_path)


def test_ancestors_are_listed_nearest_first() -> None:
    nodes = "h = MatMul(x, w) r = Add(h, x) z = Concat<axis=1>(r, y)"
    values = values_of(ir.from_proto(model_of(nodes)))
    assert [value.name for value in ancestors(values["z"])] == ["z", "r", "y", "h", "x"]


@pytest.mark.parametrize(
    ("nodes", "name", "behind"),
    [
        pytest.param("h = MatMul(x, w) z = Tanh(h)", "h", 0, id="projection"),
        pytest.param("z = Tanh(x)", "x", 0, id="input of three axes"),
        pytest.param(
            "f = Reshape(x, cut) h = Conv<kernel_shape=[1, 1]>(f, kernel) z = Relu(h)", "h", 2, id="convolution"
        ),
    ],
)
def test_channels_come_from_the_nearest_projection_or_input(nodes: str, name: str, behind: int) -> None:
    constants = {**CONSTANTS, "kernel": np.ones((8, 3, 1, 1), np.float32)}
    model = graph(f"g (float[b, t, {WIDTH}] x) => (float z) {{ {nodes} }}", **constants)
    found = channels_of(values_of(ir.from_proto(model))["z"])
    assert found is not None
    assert (found[0].name, found[1]) == (name, behind)


def test_a_product_of_two_activations_has_no_channels() -> None:
    model = model_of("xt = Transpose<perm=[0, 2, 1]>(x) s = MatMul(x, xt) z = Tanh(s)")
    assert channels_of(values_of(ir.from_proto(model))["z"]) is None
