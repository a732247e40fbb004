"""Operators that onnxruntime has in the standard domain, and ONNX has not: files with them are read unchanged.

An example is LayerNormalization in opset 11. `checked` raises BuildRefused for an invalid graph and for an unknown
operator.
"""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from attnserve_server.conversion.base.errors import BuildRefused
from attnserve_server.conversion.graphs.reading import checked
from onnx import TensorProto, helper


def normalizing(operator: str, opset: int, *more: Any) -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    node = helper.make_node(operator, ["x", "gain"], ["y"], axis=-1)
    inputs = [info("x", TensorProto.FLOAT, ["batch", "seq", 8]), info("gain", TensorProto.FLOAT, [8])]
    graph = helper.make_graph([node], "made", inputs, [info("y", TensorProto.FLOAT, ["batch", "seq", 8])])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), *more], ir_version=8)


@pytest.mark.parametrize(
    ("operator", "opset"),
    [("LayerNormalization", 11), ("LayerNormalization", 17), ("SimplifiedLayerNormalization", 17)],
)
@pytest.mark.parametrize("more", [(), (helper.make_opsetid("com.microsoft", 1),)], ids=["alone", "with its domain"])
def test_files_are_read_unchanged(operator: str, opset: int, more: tuple[Any, ...]) -> None:
    model = normalizing(operator, opset, *more)
    read = checked(model, "model")
    assert (read.graph.node[0].op_type, read.graph.node[0].domain) == (operator, "")
    assert list(read.opset_import) == list(model.opset_import)


def test_invalid_files_are_refused_and_stay_unchanged() -> None:
    model = normalizing("LayerNormalization", 14)
    model.graph.node.append(helper.make_node("Relu", ["nowhere"], ["z"]))
    with pytest.raises(BuildRefused):
        checked(model, "model")
    assert model.graph.node[0].domain == ""
    assert len(model.opset_import) == 1


def test_unknown_operators_are_refused() -> None:
    with pytest.raises(BuildRefused, match="UnknownNormalization"):
        checked(normalizing("UnknownNormalization", 17), "model")
