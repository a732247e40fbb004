"""Where the vectors of a value come from: which position of the sequence each of them stands for. Taps nothing.

Between the residual stream and the product of queries and keys, windowed attention moves vectors about: it pads,
rolls, cuts and repeats them. The same steps are added to the graph once more, on the numbers of the positions in the
place of the vectors themselves; what changes vectors one by one (projections, norms, biases) is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

_LAYOUT = {
    *("Reshape", "Transpose", "Slice", "Gather", "Pad", "Concat", "Unsqueeze", "Squeeze", "Expand", "Tile", "Split"),
    *("Flatten", "GatherElements", "GatherND", "DepthToSpace", "SpaceToDepth"),
}
"""What moves vectors about and changes none."""
_ONE_BY_ONE = {
    *("Add", "Sub", "Mul", "Div", "Where", "Identity", "Cast", "CastLike", "Neg", "Relu", "Gelu", "Erf", "Tanh"),
    *("Sqrt", "Pow", "Reciprocal", "Sigmoid", "Dropout", "Clip", "Max", "Min"),
}
"""What changes numbers one by one; of several operands the one that is traced says where they come from."""
_WITHIN_VECTORS = {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "ReduceMean", "Softmax"}
"""What mixes the numbers of each vector, which is along the last axis."""
_IN_EIGHT_BITS = {"QuantizeLinear", "MatMulInteger", "MatMulIntegerToFloat"}
"""Rounding of vectors, and products of rounded vectors with weights."""
_DATA_INPUTS = {
    "Where": (1, 2),
    "Add": (0, 1),
    "Sub": (0, 1),
    "Mul": (0, 1),
    "Div": (0, 1),
    "Max": (0, 1),
    "Min": (0, 1),
}
_FARTHEST = 200
"""Nodes between an operand and the residual stream; a search that goes on for longer has lost its way."""


class NotTraced(Exception):
    """What stands between a value and the sequence that it comes from."""


def ancestors(value: ir.Value) -> list[ir.Value]:
    """The values that a value's vectors may come from, nearest first: itself, and what known steps make it of."""
    found: list[ir.Value] = []
    open_ = [value]
    while open_ and len(found) < _FARTHEST:
        each = open_.pop(0)
        if each in found or each.const_value is not None:
            continue
        found.append(each)
        open_ += _sources(each)
    return found


def _sources(value: ir.Value) -> list[ir.Value]:
    node = value.producer()
    if node is not None and node.op_type in _IN_EIGHT_BITS:
        return [] if node.inputs[0] is None else [node.inputs[0]]
    if node is None or node.domain not in {"", "ai.onnx"}:
        return []
    if node.op_type == "Concat":
        return [each for each in node.inputs if each is not None]
    if node.op_type in {"MatMul", "Gemm"}:
        left, right = node.inputs[0], node.inputs[1]
        return [left] if left is not None and right is not None and _is_constant(right) else []
    if node.op_type in _LAYOUT or node.op_type in _ONE_BY_ONE or node.op_type in _WITHIN_VECTORS:
        positions = _DATA_INPUTS.get(node.op_type, (0,))
        return [each for at in positions if at < len(node.inputs) and (each := node.inputs[at]) is not None]
    return []


def channels_of(value: ir.Value) -> tuple[ir.Value, int] | None:
    """The nearest value before this one whose channels are numbers of their own, and how many axes are behind them.

    That is what a projection by one matrix or a convolution makes, or an input of the graph that has three axes.
    """
    for each in ancestors(value):
        node = each.producer()
        if node is None:
            return (each, 0) if each.is_graph_input() and each.shape is not None and len(each.shape) == 3 else None
        weights = node.inputs[1] if len(node.inputs) > 1 else None
        if node.op_type in {"MatMul", "Gemm", "MatMulInteger"} and weights is not None and _is_constant(weights):
            return (each, 0) if weights.shape is not None and len(weights.shape) == 2 else None
        if node.op_type == "Conv" and weights is not None and weights.shape is not None:
            return each, len(weights.shape) - 2
    return None


def _is_constant(value: ir.Value) -> bool:
    """Whether it is a weight, or made of weights alone."""
    if value.const_value is not None:
        return True
    node = value.producer()
    if node is None or not node.inputs:
        return node is not None and node.op_type == "Constant"
    return node.op_type in {"Transpose", "Cast", "DequantizeLinear", "Reshape", "Identity"} and all(
        each is None or _is_constant(each) for each in node.inputs
    )


@dataclass
class Tracer:
    """Adds to a graph, for values of it, what they come from. The graph is a copy made for this alone.

    What is numbered is the anchor's axis that has `behind` axes behind it: by default the positions of (B, T, C).
    """

    graph: ir.Graph
    anchor: ir.Value
    label: str
    behind: int = 1
    _made: dict[ir.Value, ir.Value | None] = field(default_factory=dict)
    _nodes: list[ir.Node] = field(default_factory=list)
    _count: int = 0

    def trace(self, value: ir.Value) -> ir.Value:
        """For each number of a value the position along the anchor's axis that it comes from, plus 1; 0 for none.

        An output of the graph, float32, of the value's shape.

        Raises:
            NotTraced: it does not come from the anchor through steps known here.
        """
        origin = self._origin(value)
        if origin is None:
            raise NotTraced(f"{value.name!r} does not come from {self.anchor.name!r}")
        output = self._op("Identity", [origin])
        self.graph.extend(self._nodes)
        self._nodes = []
        output.type = ir.TensorType(ir.DataType.FLOAT)
        self.graph.outputs.append(output)
        return output

    def _origin(self, value: ir.Value) -> ir.Value | None:
        """None for what does not come from the anchor."""
        if value not in self._made:
            self._made[value] = self._ramp() if value is self.anchor else self._through(value)
        return self._made[value]

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
        if node.op_type in _ONE_BY_ONE:
            origin = known[0]
            for other in known[1:]:
                origin = self._op("Max", [origin, other])
            return self._shaped_like(origin, value)
        if node.op_type == "ReduceMean" and not node.attributes.get_int("keepdims", 1):
            raise NotTraced("a mean over what may be positions")
        return self._shaped_like(self._of_vectors(known[0]), value)

    def _moved(self, node: ir.Node, value: ir.Value, origins: dict[ir.Value, ir.Value | None]) -> ir.Value:
        """The same step, on positions; what comes from elsewhere (zeros that are put before, say) is 0."""
        inputs: list[ir.Value | None] = []
        for each in node.inputs:
            if each is None or each not in origins:
                inputs.append(each)
            else:
                inputs.append(origins[each] or self._shaped_like(self._number(0.0), each))
        if node.op_type == "Pad" and len(inputs) > 2:
            inputs[2] = None  # whatever vectors are padded with, it is no position
        outputs = [self._value() for _ in node.outputs]
        copy = ir.node(node.op_type, inputs, attributes=dict(node.attributes), outputs=outputs)
        self._nodes.append(copy)
        return outputs[list(node.outputs).index(value)]

    def _of_vectors(self, origin: ir.Value) -> ir.Value:
        """One position for each vector: (..., D) -> (..., 1)."""
        return self._op("TopK", [origin, self._ints(1)], outputs=2, axis=-1)

    def _shaped_like(self, origin: ir.Value, value: ir.Value) -> ir.Value:
        return self._op("Expand", [origin, self._op("Shape", [value])])

    def _ramp(self) -> ir.Value:
        """Positions from 1 along the anchor's axis."""
        shape = self._op("Shape", [self.anchor])
        length = self._op("Squeeze", [self._op("Gather", [shape, self._ints(-1 - self.behind)], axis=0)])
        one = self._scalar(1)
        count = self._op("Range", [one, self._op("Add", [length, one]), one])
        along = self._ints(-1, *[1] * self.behind)
        ramp = self._op("Reshape", [self._op("Cast", [count], to=int(ir.DataType.FLOAT)), along])
        return self._shaped_like(ramp, self.anchor)

    def _op(self, op_type: str, inputs: list[ir.Value | None], *, outputs: int = 1, **attributes: int) -> ir.Value:
        made = [self._value() for _ in range(outputs)]
        self._nodes.append(ir.node(op_type, inputs, attributes=dict(attributes), outputs=made))
        return made[0]

    def _value(self) -> ir.Value:
        self._count += 1
        return ir.val(f"provenance.{self.label}.{self._count}")

    def _ints(self, *numbers: int) -> ir.Value:
        return self._constant(np.array(numbers, np.int64))

    def _scalar(self, number: int) -> ir.Value:
        return self._constant(np.array(number, np.int64))

    def _number(self, number: float) -> ir.Value:
        return self._constant(np.array(number, np.float32))

    def _constant(self, array: np.ndarray) -> ir.Value:
        value = self._value()
        self._nodes.append(ir.node("Constant", [], attributes={"value": ir.tensor(array)}, outputs=[value]))
        return value
