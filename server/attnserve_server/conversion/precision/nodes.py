"""Adds nodes and constants to a graph in the place of those that a rewriting replaces."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from attnserve_server.domain.values import Array

FIRST_AXIS_OPSET = 13
"""The first in which QuantizeLinear takes a scale for each row."""
_FIRST_AXES_INPUT_OPSET = 18
"""The first in which reductions take their axes as an input."""


class Builder:
    """Adds nodes before the one that they replace, under names of its own."""

    def __init__(self, graph: ir.Graph, node: ir.Node, what: str) -> None:
        """Names begin with that of the node's output, and `what` they are made for."""
        self._graph, self._node = graph, node
        self._count = 0
        self.base = f"{node.outputs[0].name}.{what}"
        self.opset = graph.opset_imports.get("", graph.opset_imports.get("ai.onnx", 1))

    def op(
        self, operator: str, inputs: Sequence[ir.Value | None], domain: str = "", **attributes: int | list[int]
    ) -> ir.Value:
        """A node with one output; the module that it comes from is that of the node it helps to replace."""
        made = ir.node(operator, inputs, attributes, domain=domain, name=f"{self.base}.{self._count}")
        made.outputs[0].name = f"{self.base}.{self._count}"
        made.metadata_props.update(self._node.metadata_props)
        self._count += 1
        self._graph.insert_before(self._node, made)
        return made.outputs[0]

    def extreme(self, reduction: str, value: ir.Value) -> ir.Value:
        """The greatest or least number of each row, (..., 1)."""
        if self.opset < _FIRST_AXES_INPUT_OPSET:
            return self.op(reduction, [value], axes=[-1], keepdims=1)
        return self.op(reduction, [value, self.stored("rows.last_axis", np.array([-1]))], keepdims=1)

    def stored(self, name: str, array: Array) -> ir.Value:
        """An initializer, stored once under its name."""
        if name not in self._graph.initializers:
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._graph.register_initializer(value)
        return self._graph.initializers[name]

    def replace(self, node: ir.Node, result: ir.Value) -> None:
        """Put a value in the place of a node's output, under its name and with its shape, and remove the node.

        Shape inference does not know products of integers; finders need the shapes that come after them.
        """
        output = node.outputs[0]
        result.shape, result.type = output.shape, output.type
        name = output.name
        output.replace_all_uses_with(result, replace_graph_outputs=True)
        self._graph.remove(node, safe=True)
        result.name = name
