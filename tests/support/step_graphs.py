"""Small graphs made step by step, for tests of finders and layouts.

A finder searches a graph for its sites: the places that compute attention. Methods that add a node or a constant return
the name of its value. Nothing is checked: a wrong node fails, if at all, where its graph is loaded or run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from attnserve_server.conversion.base.sites import FoundSite
from attnserve_server.conversion.finders import find_sites
from onnx import helper, numpy_helper

Array = np.ndarray[Any, np.dtype[Any]]

WIDTH = 8


class Steps:
    """A graph in the making, over features `x` (B, T, W) and `y` (B, S, W)."""

    def __init__(self, opset: int = 17) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}

    def op(self, op_type: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        output = f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], name=name, **attributes))
        return output

    def const(self, *shape: int, kind: type = np.float32, value: Any = None) -> str:
        name = f"constant_{len(self.constants)}"
        rng = np.random.default_rng(len(self.constants))
        self.constants[name] = np.asarray(rng.normal(size=shape) if value is None else value, kind)
        return name

    def turned(self, value: str) -> str:
        return self.op("Transpose", value, perm=[0, 2, 1])

    def sites(self, output: str, meta: dict[str, str] | None = None) -> dict[str, FoundSite]:
        return find_sites(ir.from_proto(self.model(output, meta)).graph)

    def model(self, output: str, meta: dict[str, str] | None = None, batch: str | int = "batch") -> onnx.ModelProto:
        info = helper.make_tensor_value_info
        inputs = [
            info("x", onnx.TensorProto.FLOAT, [batch, "target", WIDTH]),
            info("y", onnx.TensorProto.FLOAT, [batch, "source", WIDTH]),
        ]
        nodes = [*self.nodes, helper.make_node("Identity", [output], ["out"])]
        for node in nodes:
            for key, value in (meta or {}).items():
                node.metadata_props.add(key=key, value=value)
        constants = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(nodes, "steps", inputs, [info("out", onnx.TensorProto.FLOAT, None)], constants)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        return onnx.shape_inference.infer_shapes(model)


def attention(steps: Steps, *, scores: str = "", value: str = "y") -> str:
    """The positive control: queries x over keys and values y."""
    scores = scores or steps.op("MatMul", "x", steps.turned("y"))
    return steps.op("MatMul", steps.op("Softmax", scores, axis=-1), value)
