"""Trace which position of a sequence each vector of a value comes from, by running the graph on positions.

Between the residual stream and the MatMul of queries and keys, windowed attention pads, rolls, cuts and repeats
vectors. `Tracer` copies these nodes and gives them the numbers of positions instead of vectors:

    x (B, T, C)              1 1 .. 1 | 2 2 .. 2 | .. | T T .. T    the anchor: position t + 1 in all its channels
    MatMul (projection)      1 1 .. 1 | 2 2 .. 2 | .. | T T .. T    changes vectors one at a time: copied on as it is
    Pad 1 before, 1 behind   0 | 1 | 2 | .. | T | 0                 padding comes from no position
    Slice, Reshape           windows of 3 positions                 the same nodes, on positions

A run of the graph then returns the position + 1 of every vector, and 0 for padding. Nodes are added to a copy of the
graph that serves no other purpose; no tap is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from attnserve_server.conversion.graphs.nodes import NodeBuilder
from attnserve_server.conversion.graphs.walk import input_of, is_made_of_constants, is_standard

_LAYOUT = {
    *("Reshape", "Transpose", "Slice", "Gather", "Pad", "Concat", "Unsqueeze", "Squeeze", "Expand", "Tile", "Split"),
    *("Flatten", "GatherElements", "GatherND", "DepthToSpace", "SpaceToDepth"),
}
"""Operators that move vectors, and change none."""
_ELEMENTWISE = {
    *("Add", "Sub", "Mul", "Div", "Where", "Identity", "Cast", "CastLike", "Neg", "Relu", "Gelu", "Erf", "Tanh"),
    *("Sqrt", "Pow", "Reciprocal", "Sigmoid", "Dropout", "Clip", "Max", "Min"),
}
"""Operators that change numbers one at a time. Of several operands, the traced ones state the position."""
_WITHIN_VECTORS = {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "ReduceMean", "Softmax"}
"""Operators that mix the numbers of each vector, along the last axis."""
_INTEGER = {"QuantizeLinear", "MatMulInteger", "MatMulIntegerToFloat"}
"""Rounding of vectors, and MatMuls of rounded vectors with weights."""
_DATA_INPUTS = {
    "Where": (1, 2),
    "Add": (0, 1),
    "Sub": (0, 1),
    "Mul": (0, 1),
    "Div": (0, 1),
    "Max": (0, 1),
    "Min": (0, 1),
}
"""Positions of the inputs that hold vectors, where that is not the first alone."""
_MOST_ANCESTORS = 200
"""The most values between an operand and the residual stream."""


class NotTraced(Exception):
    """Positions cannot be traced to a value; the message is the reason."""


def ancestors(value: ir.Value) -> list[ir.Value]:
    """Return the values that the vectors of a value may come from, through known nodes; itself first, nearest first."""
    found: list[ir.Value] = []
    waiting = [value]
    while waiting and len(found) < _MOST_ANCESTORS:
        each = waiting.pop(0)
        if each in found or each.const_value is not None:
            continue
        found.append(each)
        waiting += _sources(each)
    return found


def _sources(value: ir.Value) -> list[ir.Value]:
    """Return the inputs of a value's node that the vectors come from; none where the node is not known."""
    node = value.producer()
    if node is not None and node.op_type in _INTEGER:
        return [] if node.inputs[0] is None else [node.inputs[0]]
    if node is None or not is_standard(node):
        return []
    if node.op_type == "Concat":
        return [each for each in node.inputs if each is not None]
    if node.op_type in {"MatMul", "Gemm"}:
        left, right = node.inputs[0], node.inputs[1]
        return [left] if left is not None and right is not None and is_made_of_constants(right) else []
    if node.op_type in _LAYOUT or node.op_type in _ELEMENTWISE or node.op_type in _WITHIN_VECTORS:
        positions = _DATA_INPUTS.get(node.op_type, (0,))
        return [each for position in positions if (each := input_of(node, position)) is not None]
    return []


def channels_of(value: ir.Value) -> tuple[ir.Value, int] | None:
    """Return the nearest ancestor with independent channels, and how many axes follow its channels' axis.

    Such a value is the result of a projection by one matrix or of a convolution, or an input with three axes.
    """
    for each in ancestors(value):
        node = each.producer()
        if node is None:
            return (each, 0) if each.is_graph_input() and each.shape is not None and len(each.shape) == 3 else None
        weights = input_of(node, 1)
        if (
            node.op_type in {"MatMul", "Gemm", "MatMulInteger"}
            and weights is not None
            and is_made_of_constants(weights)
        ):
            return (each, 0) if weights.shape is not None and len(weights.shape) == 2 else None
        if node.op_type == "Conv" and weights is not None and weights.shape is not None:
            return each, len(weights.shape) - 2
    return None


@dataclass
class Tracer:
    """Adds to a graph the nodes that compute where its values come from.

    Attributes:
        graph: a copy for this purpose.
        anchor: the value whose positions are numbered.
        label: starts the names of the new nodes.
        behind: how many axes follow the numbered one in the anchor; 1 for the positions of (B, T, C).
    """

    graph: ir.Graph
    anchor: ir.Value
    label: str
    behind: int = 1
    _origins: dict[ir.Value, ir.Value | None] = field(default_factory=dict)
    _nodes: NodeBuilder = field(init=False)

    def __post_init__(self) -> None:
        self._nodes = NodeBuilder(self.graph, f"provenance.{self.label}.")

    def trace(self, value: ir.Value) -> ir.Value:
        """Add an output: for each number of a value, the position along the anchor's axis that it comes from, plus 1.

        Returns:
            The output, float32, of the value's shape; 0 where a number comes from no position.

        Raises:
            NotTraced: the value does not come from the anchor through known nodes.
        """
        origin = self._origin(value)
        if origin is None:
            raise NotTraced(f"{value.name!r} does not come from {self.anchor.name!r}")
        output = self._nodes.op("Identity", [origin])
        self._nodes.place_last()
        output.type = ir.TensorType(ir.DataType.FLOAT)
        self.graph.outputs.append(output)
        return output

    def _origin(self, value: ir.Value) -> ir.Value | None:
        """Return the positions of a value; None where it does not come from the anchor."""
        if value not in self._origins:
            self._origins[value] = self._ramp() if value is self.anchor else self._through(value)
        return self._origins[value]

    def _through(self, value: ir.Value) -> ir.Value | None:
        sources = _sources(value)
        origins = {each: self._origin(each) for each in sources}
        known = [origin for origin in origins.values() if origin is not None]
        if not known:
            return None
        node = value.producer()
        assert node is not None
        if node.op_type in _LAYOUT:
            return self._moved(node, value, origins)
        if node.op_type in _ELEMENTWISE:
            origin = known[0]
            for other in known[1:]:
                origin = self._nodes.op("Max", [origin, other])
            return self._shaped_like(origin, value)
        if node.op_type == "ReduceMean" and not node.attributes.get_int("keepdims", 1):
            raise NotTraced("a ReduceMean may average over positions")
        return self._shaped_like(self._of_vectors(known[0]), value)

    def _moved(self, node: ir.Node, value: ir.Value, origins: Mapping[ir.Value, ir.Value | None]) -> ir.Value:
        """Copy a node that moves vectors, for positions; vectors from elsewhere, such as zeros, get position 0."""
        inputs: list[ir.Value | None] = []
        for each in node.inputs:
            if each is None or each not in origins:
                inputs.append(each)
            else:
                inputs.append(origins[each] or self._shaped_like(self._nodes.number(0.0), each))
        if node.op_type == "Pad" and len(inputs) > 2:
            inputs[2] = None  # the padding value of vectors is no position
        outputs = self._nodes.outputs_of(node.op_type, inputs, len(node.outputs), node.attributes)
        return outputs[list(node.outputs).index(value)]

    def _of_vectors(self, origin: ir.Value) -> ir.Value:
        """Return one position for each vector: (..., D) -> (..., 1)."""
        return self._nodes.outputs_of("TopK", [origin, self._nodes.ints(1)], 2, {"axis": -1})[0]

    def _shaped_like(self, origin: ir.Value, value: ir.Value) -> ir.Value:
        return self._nodes.op("Expand", [origin, self._nodes.op("Shape", [value])])

    def _ramp(self) -> ir.Value:
        """Return the positions from 1 along the anchor's axis."""
        nodes = self._nodes
        shape = nodes.op("Shape", [self.anchor])
        length = nodes.op("Squeeze", [nodes.op("Gather", [shape, nodes.ints(-1 - self.behind)], axis=0)])
        one = nodes.scalar(1)
        count = nodes.op("Range", [one, nodes.op("Add", [length, one]), one])
        along = nodes.ints(-1, *[1] * self.behind)
        ramp = nodes.op("Reshape", [nodes.op("Cast", [count], to=int(ir.DataType.FLOAT)), along])
        return self._shaped_like(ramp, self.anchor)
