"""Write new nodes into a graph, in the form that its opset has; everything in `conversion` that adds nodes uses this.

A builder collects nodes, named with its prefix, until a `place_...` method puts them into the graph together. Constants
are initializers, which all builders of a graph share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from attnserve_server.conversion.graphs.operators import SINCE
from attnserve_server.domain.values import Array

Attribute = int | float | str | Sequence[int] | ir.Attr
Dimension = int | ir.SymbolicDim | None

_MOST_IN_A_NAME = 64
"""Numbers that the name of a constant lists; more are named by their digest."""


class NodeBuilder:
    """Collects new nodes of one graph.

    Args:
        graph: receives the constants at once, and the nodes when they are placed.
        prefix: starts the name of every new node and of its outputs.
        metadata: is copied to every new node; exporters store there which module a node belongs to.
        shared: the nodes that were made with `shared=True`; pass one dictionary to builders that may share them.
    """

    def __init__(
        self,
        graph: ir.Graph,
        prefix: str,
        *,
        metadata: Mapping[str, str] | None = None,
        shared: dict[tuple[object, ...], ir.Value] | None = None,
    ) -> None:
        self.graph, self.prefix = graph, prefix
        self.opset = graph.opset_imports.get("", graph.opset_imports.get("ai.onnx", 0))
        self._metadata = dict(metadata or {})
        self._shared = {} if shared is None else shared
        self._tape = ir.tape.Tape()
        self._count = 0

    def has(self, feature: str) -> bool:
        """Return whether the graph's opset has a feature of `SINCE`. Raises KeyError for any other name."""
        return self.opset >= SINCE[feature]

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        domain: str = "",
        shared: bool = False,
        **attributes: Attribute,
    ) -> ir.Value:
        """Make a node with one output, and return that.

        Args:
            op_type: the operator.
            inputs: None for one that is left out.
            domain: of the operator; empty for the standard one.
            shared: reuse the node of the same operator, inputs and attributes, if one was made with `shared` too. It
                was placed first, so it must come first in the graph.
            attributes: of the node.
        """
        key = (op_type, domain, *inputs, *(repr(pair) for pair in attributes.items()))
        if shared and key in self._shared:
            return self._shared[key]
        [output] = self.outputs_of(op_type, inputs, 1, attributes, domain=domain)
        if shared:
            self._shared[key] = output
        return output

    def outputs_of(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        count: int,
        attributes: Mapping[str, Attribute],
        *,
        domain: str = "",
    ) -> Sequence[ir.Value]:
        """Make a node with `count` outputs, and return them."""
        name = f"{self.prefix}{op_type}_{self._count}"
        self._count += 1
        return self._tape.op_multi_out(
            op_type,
            inputs,
            dict(attributes),
            outputs=[ir.val(f"{name}.{place}" if place else name) for place in range(count)],
            domain=domain,
            name=name,
            metadata_props=dict(self._metadata),
        )

    def place_before(self, node: ir.Node) -> None:
        """Put the collected nodes before a node of the graph."""
        self.graph.insert_before(node, self._collected())

    def place_after(self, node: ir.Node) -> None:
        """Put the collected nodes behind a node of the graph."""
        self.graph.insert_after(node, self._collected())

    def place_last(self) -> None:
        """Put the collected nodes at the end of the graph."""
        self.graph.extend(self._collected())

    def _collected(self) -> Sequence[ir.Node]:
        nodes, self._tape = self._tape.nodes, ir.tape.Tape()
        return nodes

    # Constants.

    def ints(self, *numbers: int) -> ir.Value:
        """Return an int64 constant of rank 1."""
        label = ".".join(map(str, numbers))
        if len(numbers) > _MOST_IN_A_NAME:
            label = hashlib.sha256(label.encode()).hexdigest()
        return self.stored(f"attnserve.int64.{label}.list", np.array(numbers, np.int64))

    def number(self, number: float, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """Return a constant of rank 0."""
        array = np.array(number, dtype.numpy())
        return self.stored(f"attnserve.{array.dtype.name}.{number!r}", array)

    def scalar(self, number: int) -> ir.Value:
        """Return an int64 constant of rank 0."""
        return self.number(number, ir.DataType.INT64)

    def stored(self, name: str, array: Array) -> ir.Value:
        """Return the initializer of this name; the first call stores the array, later ones ignore theirs."""
        if name not in self.graph.initializers:
            tensor = ir.tensor(array, name=name)
            shape = ir.Shape(array.shape)
            self.graph.register_initializer(
                ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
            )
        return self.graph.initializers[name]

    # Operators whose form depends on the opset.

    def shape(self, value: ir.Value, start: int, end: int, *, shared: bool = False) -> ir.Value:
        """Return the sizes of the axes from `start` to before `end`, int64 of rank 1; neither counts from the end."""
        if self.has("Shape with start and end"):
            return self.op("Shape", [value], shared=shared, start=start, end=end)
        whole = self.op("Shape", [value], shared=shared)
        return self.op("Slice", [whole, self.ints(start), self.ints(end)], shared=shared)

    def reshape(self, value: ir.Value, sizes: Sequence[ir.Value]) -> ir.Value:
        """Return the value in the shape that the sizes, each int64 of rank 1, make together.

        A size of 0 is taken as it is where the opset has that; in older ones, the value must have size 0 on that axis.
        """
        shape = sizes[0] if len(sizes) == 1 else self.op("Concat", sizes, axis=0)
        if self.has("Reshape with allowzero"):
            return self.op("Reshape", [value, shape], allowzero=1)
        return self.op("Reshape", [value, shape])

    def unsqueeze(self, value: ir.Value, *axes: int, shared: bool = False) -> ir.Value:
        """Return the value with axes of size 1 inserted."""
        if self.has("Unsqueeze with axes as input"):
            return self.op("Unsqueeze", [value, self.ints(*axes)], shared=shared)
        return self.op("Unsqueeze", [value], shared=shared, axes=axes)

    def reduce(self, op_type: str, value: ir.Value, axis: int) -> ir.Value:
        """Return a ReduceSum, ReduceMax or ReduceMin (else KeyError) over one axis, which stays with size 1."""
        if self.has(f"{op_type} with axes as input"):
            return self.op(op_type, [value, self.ints(axis)], keepdims=1)
        return self.op(op_type, [value], axes=(axis,), keepdims=1)


def typed(value: ir.Value, dtype: ir.DataType | None, shape: Sequence[Dimension]) -> ir.Value:
    """Set the type and the shape of a value that shape inference does not know, and return the value."""
    value.type = ir.TensorType(dtype) if dtype is not None else None
    value.shape = ir.Shape(shape)
    return value


def replace_node(node: ir.Node, result: ir.Value) -> None:
    """Put a value in the place of a node's output, under the name and with the shape of that, and remove the node.

    Shape inference does not know products of integers; finders need the shapes that come after them.
    """
    graph, output = node.graph, node.outputs[0]
    assert isinstance(graph, ir.Graph)
    name = output.name
    result.shape, result.type = output.shape, output.type
    output.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    result.name = name


def remove_unused_initializers(graph: ir.Graph) -> None:
    """Remove initializers that neither a node nor an output of the graph uses."""
    for value in [value for value in graph.initializers.values() if not value.uses() and not value.is_graph_output()]:
        del graph.initializers[str(value.name)]
