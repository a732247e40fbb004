"""The nodes that one tap adds to a graph: made in order, named after the tap, put behind the site at the end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

ITEMS_PREFIX = "attention_items."
WEIGHTS_PREFIX = "attention."

_AXES_ARE_AN_INPUT, _RESHAPE_ALLOWS_ZERO, _SHAPE_HAS_RANGE = 13, 14, 15
"""Versions of the standard operator set from which taps write some operators in another way."""

_SPELLED_OUT = 64
"""Numbers in the name of a constant; longer ones go by their digest."""

Input = ir.Value | None
Attribute = int | float | str | Sequence[int]


class TapNodes:
    """A tap under construction: its input, its nodes so far, and what it shares with the other taps of the graph.

    `items` is the tap's input, int64 (n,): rows of the batch, in any order; n may be 0.
    """

    def __init__(self, graph: ir.Graph, name: str, shared: dict[tuple[str, ir.Value], ir.Value]) -> None:
        self._graph, self._name, self._shared = graph, name, shared
        self._nodes: list[ir.Node] = []
        self._opset = graph.opset_imports.get("", 0)
        self.items = ir.val(ITEMS_PREFIX + name, ir.DataType.INT64, ir.Shape([f"{ITEMS_PREFIX}{name}.count"]))

    def finish(self, weights: ir.Value, heads: int, behind: ir.Node) -> None:
        """Put the nodes behind one of the graph's own, and make the weights, float32 (n, H, L, S), an output."""
        weights.name = WEIGHTS_PREFIX + self._name
        weights.type = ir.TensorType(ir.DataType.FLOAT)
        weights.shape = ir.Shape([f"{ITEMS_PREFIX}{self._name}.count", heads, None, None])
        self.place(behind)
        self._graph.inputs.append(self.items)
        self._graph.outputs.append(weights)

    def place(self, behind: ir.Node) -> None:
        """Put the nodes behind one of the graph's own."""
        self._graph.insert_after(behind, self._nodes)

    def op(self, op_type: str, inputs: Sequence[Input], **attributes: Attribute) -> ir.Value:
        """One node; its output is named after the tap."""
        output = ir.val(f"{WEIGHTS_PREFIX}{self._name}/{op_type}_{len(self._nodes)}")
        name = f"{WEIGHTS_PREFIX}{self._name}/{len(self._nodes)}"
        self._nodes.append(ir.node(op_type, inputs, attributes=dict(attributes), outputs=[output], name=name))
        return output

    def once(self, what: str, value: ir.Value, make: Callable[[ir.Value], ir.Value]) -> ir.Value:
        """One for all taps that need it: the nodes of the first tap stand before those of the others."""
        if (what, value) not in self._shared:
            self._shared[what, value] = make(value)
        return self._shared[what, value]

    def rows_of(self, value: ir.Value) -> ir.Value:
        """The rows of the batch that were asked for, of a value whose first axis is the batch."""
        return self.op("Gather", [value, self.items], axis=0)

    def batch(self) -> ir.Value:
        """How many rows the batch has, int64 of rank 1: by the first input, which is none of a tap's."""
        return self.shape(self._graph.inputs[0], 0, 1)

    def float32(self, value: ir.Value) -> ir.Value:
        """The value in float32."""
        return self.op("Cast", [value], to=int(ir.DataType.FLOAT))

    def shape(self, value: ir.Value, start: int, end: int) -> ir.Value:
        """Extents of the axes from `start` to before `end`, int64 of rank 1; neither counts from the end."""
        if self._opset >= _SHAPE_HAS_RANGE:
            return self.op("Shape", [value], start=start, end=end)
        return self.op("Slice", [self.op("Shape", [value]), self.ints(start), self.ints(end)])

    def reshape(self, value: ir.Value, extents: Sequence[ir.Value]) -> ir.Value:
        """The value in the shape that the extents, each int64 of rank 1, make together.

        An extent of 0 is taken as it is where the operator can; elsewhere it must stand where the value has it too.
        """
        shape = extents[0] if len(extents) == 1 else self.op("Concat", list(extents), axis=0)
        if self._opset >= _RESHAPE_ALLOWS_ZERO:
            return self.op("Reshape", [value, shape], allowzero=1)
        return self.op("Reshape", [value, shape])

    def unsqueeze(self, value: ir.Value, *axes: int) -> ir.Value:
        """The value with axes of extent 1 inserted."""
        if self._opset >= _AXES_ARE_AN_INPUT:
            return self.op("Unsqueeze", [value, self.ints(*axes)])
        return self.op("Unsqueeze", [value], axes=axes)

    def reduce_sum(self, value: ir.Value, axis: int) -> ir.Value:
        """The sum over one axis, which stays with an extent of 1."""
        if self._opset >= _AXES_ARE_AN_INPUT:
            return self.op("ReduceSum", [value, self.ints(axis)], keepdims=1)
        return self.op("ReduceSum", [value], axes=(axis,), keepdims=1)

    def not_less(self, one: ir.Value, other: ir.Value) -> ir.Value:
        """Bool: one >= other. The operator of that name is younger than opset 11."""
        return self.op("Not", [self.op("Less", [one, other])])

    def lesser(self, one: ir.Value, other: ir.Value) -> ir.Value:
        """The lesser of two int64 values. Min takes no integers before opset 12."""
        return self.op("Where", [self.op("Less", [one, other]), one, other])

    def float(self, number: float) -> ir.Value:
        """A float32 constant."""
        return self._constant(f"float32.{number!r}", np.array(number, np.float32))

    def ints(self, *numbers: int) -> ir.Value:
        """An int64 constant of rank 1."""
        label = ".".join(map(str, numbers))
        if len(numbers) > _SPELLED_OUT:
            label = hashlib.sha256(label.encode()).hexdigest()
        return self._constant(f"int64.{label}.list", np.array(numbers, np.int64))

    def scalar(self, number: int) -> ir.Value:
        """An int64 constant of rank 0."""
        return self._constant(f"int64.{number}", np.array(number, np.int64))

    def _constant(self, label: str, array: np.ndarray) -> ir.Value:
        """An initializer, shared by all taps of the graph."""
        name = f"attnserve.{label}"
        if name not in self._graph.initializers:
            value = ir.val(
                name,
                ir.DataType.from_numpy(array.dtype),
                ir.Shape(array.shape),
                const_value=ir.tensor(array, name=name),
            )
            self._graph.register_initializer(value)
        return self._graph.initializers[name]


class WholeBatch(TapNodes):
    """Nodes that work on every row of the batch: what a check needs, and no tap."""

    def rows_of(self, value: ir.Value) -> ir.Value:
        """All of them."""
        return value
