"""Weights that two graphs share are in one file, and the graphs answer as before.

`graph` writes a model of two MatMuls, one of them by the shared weights. `share_weights` returns the path of the data
file; where too few weights are shared, it returns None and changes nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from attnserve_server.conversion.graphs.sharing import WEIGHTS_FILE, share_weights
from attnserve_server.engine.session import RuntimeSession
from onnx import TensorProto, helper, numpy_helper

SHARED = np.random.default_rng(3).normal(size=(64, 64)).astype(np.float32)
ROWS = np.random.default_rng(4).normal(size=(3, 64)).astype(np.float32)


def graph(path: Path, own: np.ndarray, name: str) -> None:
    """Multiply by the shared matrix, which has another name in each graph, and by one that is not shared."""
    nodes = [
        helper.make_node("MatMul", ["x", name], ["between"]),
        helper.make_node("MatMul", ["between", "own"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(one, TensorProto.FLOAT, ["batch", 64]) for one in "xy"]
    weights = [numpy_helper.from_array(SHARED, name), numpy_helper.from_array(own, "own")]
    made = helper.make_graph(nodes, "graph", values[:1], values[1:], weights)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def answer(path: Path) -> np.ndarray:
    (found,) = RuntimeSession.load(path, provider="CPUExecutionProvider").run({"x": ROWS}, ["y"])
    return found


def test_equal_weights_are_written_once_and_answers_stay(tmp_path: Path) -> None:
    first, second = tmp_path / "model.onnx", tmp_path / "past.onnx"
    own = [np.eye(64, dtype=np.float32), 2 * np.eye(64, dtype=np.float32)]
    graph(first, own[0], "weights")
    graph(second, own[1], "the_same")
    before = [answer(first), answer(second)]
    sizes = first.stat().st_size + second.stat().st_size
    data = share_weights(first, second, least_bytes=SHARED.nbytes)
    assert data == tmp_path / WEIGHTS_FILE
    assert data.stat().st_size == SHARED.nbytes
    assert sizes - first.stat().st_size - second.stat().st_size > 1.9 * SHARED.nbytes
    for path, expected in zip((first, second), before, strict=True):
        np.testing.assert_array_equal(answer(path), expected)
    external = [
        tensor.name for tensor in onnx.load(second, load_external_data=False).graph.initializer if tensor.external_data
    ]
    assert external == ["the_same"]


def test_few_shared_weights_stay_in_the_graphs(tmp_path: Path) -> None:
    first, second = tmp_path / "model.onnx", tmp_path / "past.onnx"
    graph(first, SHARED, "weights")
    graph(second, SHARED.T.copy(), "weights")
    content = first.read_bytes()
    assert share_weights(first, second) is None
    assert first.read_bytes() == content
    assert not (tmp_path / WEIGHTS_FILE).exists()
