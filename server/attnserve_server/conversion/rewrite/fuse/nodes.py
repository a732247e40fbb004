"""Nodes that take the place of others in a graph: made in order, put in at once. Knows nothing of attention."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

Attribute = int | float | Sequence[int]
Extent = int | ir.SymbolicDim | None


class NewNodes:
    """New nodes of one graph; what several places need is made once, for the first of them in the graph's order."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._opset = graph.opset_imports.get("", 0)
        self._numbers = itertools.count()
        self._shared: dict[tuple[object, ...], ir.Value] = {}
        self._nodes: list[ir.Node] = []

    def op(
        self, op_type: str, inputs: Sequence[ir.Value | None], domain: str = "", /, **attributes: Attribute
    ) -> ir.Value:
        """One node's output."""
        name = f"attnserve.fused/{op_type}_{next(self._numbers)}"
        node = ir.node(op_type, inputs, attributes=attributes, domain=domain, outputs=[ir.val(name)], name=name)
        self._nodes.append(node)
        return node.outputs[0]

    def once(self, op_type: str, inputs: Sequence[ir.Value], **attributes: Attribute) -> ir.Value:
        """The output of one node for all that need the same."""
        known = (op_type, *inputs, *(repr(pair) for pair in attributes.items()))
        if known not in self._shared:
            self._shared[known] = self.op(op_type, inputs, **attributes)
        return self._shared[known]

    def put_behind(self, node: ir.Node) -> None:
        """Put what was made since the last time behind a node of the graph."""
        self._graph.insert_after(node, self._nodes)
        self._nodes = []

    def extent(self, value: ir.Value, axis: int) -> ir.Value:
        """One extent, int64 (1,)."""
        return self.once("Gather", [self.once("Shape", [value]), self.ints(axis)], axis=0)

    def rank_4(self, value: ir.Value) -> ir.Value:
        """The value with axes of extent 1 in front; one of unknown rank has four already."""
        added = 4 - len(value.shape) if value.shape is not None else 0
        if added <= 0:
            return value
        if self._opset >= 13:
            return self.once("Unsqueeze", [value, self.ints(*range(added))])
        return self.once("Unsqueeze", [value], axes=list(range(added)))

    def ints(self, *numbers: int) -> ir.Value:
        """An int64 constant of rank 1."""
        return self._constant(np.array(numbers, np.int64))

    def number(self, number: float, dtype: ir.DataType) -> ir.Value:
        """A constant of rank 0."""
        return self._constant(np.array(number, dtype.numpy()))

    def _constant(self, array: np.ndarray) -> ir.Value:
        known = ("constant", str(array.dtype), repr(array.tolist()))
        if known not in self._shared:
            name = f"attnserve.fused.constant_{next(self._numbers)}"
            value = ir.val(name, const_value=ir.tensor(array, name=name))
            self._graph.register_initializer(typed(value, ir.DataType.from_numpy(array.dtype), array.shape))
            self._shared[known] = value
        return self._shared[known]


def typed(value: ir.Value, dtype: ir.DataType | None, shape: Sequence[Extent]) -> ir.Value:
    """The value, with a type and a shape."""
    value.type = ir.TensorType(dtype) if dtype is not None else None
    value.shape = ir.Shape(shape)
    return value


def stand_in(old: ir.Value, new: ir.Value) -> None:
    """Let one value take another's place, as an output of the graph too."""
    if old.is_graph_output():
        assert old.name is not None
        old.name, new.name = f"{old.name}.unfused", old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
