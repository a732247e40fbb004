"""Find the dynamic quantizers of a graph, and decide which of them can take one scale per row.

A quantizer can if every node that reads its integers can: a MatMul with constant weights, a MatMul of two activations
(which then runs in float32), or DequantizeLinear. The module changes nothing; per_row.py rewrites.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from attnserve_server.conversion.graphs.walk import dimension_of, input_of, is_fixed, producer_of

_LINEAR: Final = "DynamicQuantizeLinear"
_FUSED: Final = "DynamicQuantizeMatMul"
_INSIDE: Final = frozenset(("DynamicQuantizeLSTM",))
"""Operators that quantize their input inside, and so take no scale."""
_ACTIVATION_INPUTS: Final = {"MatMulInteger": (0, 2), "MatMulIntegerToFloat": (0, 4), "DequantizeLinear": (0, 2)}
"""By operator that can be rewritten: the positions of the rounded activations and of their zero point."""
_MATMUL_PARAMETERS: Final = {
    "MatMulInteger": (None, None, 2, 3),
    "MatMulIntegerToFloat": (2, 3, 4, 5),
    _FUSED: (None, 2, None, 3),
}
"""By operator: the positions of the two operands' scales, then of their zero points; None: it takes none."""


@dataclass(frozen=True, slots=True)
class Use:
    """One use of rounded activations: a MatMul with constant weights, a MatMul of two activations, or DequantizeLinear.

    Attributes:
        nodes: the nodes to replace, the last one first; its output is the one that others read.
        activations: both operands of a MatMul of two activations, float32, before they are rounded.
        weights: uint8 or int8, (..., K, N); None without constant weights.
        zero_point: of the weights; None: 0.
        scale: of the weights, one or one per column; None: 1.
        bias: (N,), which the operator adds.
    """

    nodes: tuple[ir.Node, ...]
    activations: tuple[ir.Value, ir.Value] | None = None
    weights: ir.Value | None = None
    zero_point: ir.Value | None = None
    scale: ir.Value | None = None
    bias: ir.Value | None = None


@dataclass(frozen=True, slots=True)
class Quantizer:
    """A node that rounds activations with one scale for all rows.

    `uses`: all uses of its integers. `reason`: why it cannot take one scale per row; empty where it can.
    """

    node: ir.Node
    uses: tuple[Use, ...] = ()
    reason: str = ""

    @property
    def name(self) -> str:
        """Return the node's name, or that of its output."""
        return self.node.name or str(self.node.outputs[0].name)

    @property
    def source(self) -> ir.Value:
        """Return the activations, float32 (..., K)."""
        source = self.node.inputs[0]
        assert source is not None
        return source

    @property
    def rounds(self) -> bool:
        """Return whether the rewritten graph still rounds: not where every use is a MatMul of two activations."""
        return any(use.activations is None for use in self.uses)


class _NotByRow(Exception):
    """A quantizer cannot take one scale per row; the message is the reason."""


def quantizers_of(graph: ir.Graph) -> list[Quantizer]:
    """Return all dynamic quantizers in the order of the graph; those of subgraphs too, which are never rewritten."""
    found: list[Quantizer] = []
    for node, owner in _all_nodes(graph):
        if node.op_type not in {_LINEAR, _FUSED, *_INSIDE}:
            continue
        if owner is not None:
            found.append(Quantizer(node, reason=f"it is in the body of a node {owner.op_type}"))
            continue
        try:
            found.append(Quantizer(node, _uses_of(node)))
        except _NotByRow as why:
            found.append(Quantizer(node, reason=str(why)))
    return found


def width_of(quantizer: Quantizer) -> int:
    """Return K, the length of a row, by the weights or by the last axis of the activations."""
    for use in quantizer.uses:
        if use.weights is not None and use.weights.const_value is not None:
            shape: tuple[int, ...] = use.weights.const_value.numpy().shape
            return shape[-2]
    width = dimension_of(quantizer.source, -1)
    assert width is not None
    return width


def _all_nodes(graph: ir.Graph, owner: ir.Node | None = None) -> Iterator[tuple[ir.Node, ir.Node | None]]:
    """Yield each node with the outermost node whose subgraph it is in; None for nodes of the graph itself."""
    for node in graph:
        yield node, owner
        for attribute in node.attributes.values():
            if attribute.type is ir.AttributeType.GRAPH:
                yield from _all_nodes(attribute.as_graph(), owner or node)
            elif attribute.type is ir.AttributeType.GRAPHS:
                for body in attribute.as_graphs():
                    yield from _all_nodes(body, owner or node)


def _uses_of(node: ir.Node) -> tuple[Use, ...]:
    if node.op_type in _INSIDE:
        raise _NotByRow(f"{node.op_type} quantizes its input inside, with one scale")
    source = node.inputs[0]
    if source is not None and source.shape is not None and len(source.shape) < 2:
        raise _NotByRow("its input has no axis besides the batch")
    if node.op_type == _FUSED:
        pair = _two_activations(node)
        return (_dynamic_quantize_matmul(node) if pair is None else pair,)
    numbers, scale, zero_point = node.outputs
    if any(output.is_graph_output() for output in node.outputs):
        raise _NotByRow("its integers are an output of the graph")
    taken = {use.node: use.idx for use in numbers.uses()}
    for use in zero_point.uses():
        if use.node not in taken:
            raise _NotByRow(f"its zero point also goes into {use.node.op_type}")
    uses = tuple(_use_of(consumer, index, node) for consumer, index in taken.items())
    known = {inner for use in uses for inner in use.nodes}
    for inner in scale.uses():
        if inner.node not in known:
            raise _NotByRow(f"its scale also goes into {inner.node.op_type}")
    return uses


def _use_of(consumer: ir.Node, index: int, node: ir.Node) -> Use:
    """Return the use of rounded activations by one node. Raises _NotByRow where it cannot take a scale per row."""
    _, scale, zero_point = node.outputs
    pair = _two_activations(consumer)
    if pair is not None:
        return pair
    if consumer.op_type not in _ACTIVATION_INPUTS:
        raise _NotByRow(f"{consumer.op_type} takes one scale for its whole input")
    first, third = _ACTIVATION_INPUTS[consumer.op_type]
    if index != first:
        raise _NotByRow(f"{consumer.op_type} multiplies it as the second operand, which has no scale per row")
    if input_of(consumer, third) is not zero_point:
        raise _NotByRow(f"{consumer.op_type} takes its integers with another zero point")
    if consumer.op_type == "DequantizeLinear":
        if dimension_of(node.inputs[0], -1) is None:
            raise _NotByRow("its last axis is dynamic, so a row's scale would depend on the length")
        return Use((consumer,))
    if consumer.op_type == "MatMulIntegerToFloat":
        if input_of(consumer, 2) is not scale:
            raise _NotByRow(f"{consumer.op_type} takes its integers with another scale")
        return _checked(
            Use(
                (consumer,),
                weights=consumer.inputs[1],
                zero_point=input_of(consumer, 5),
                scale=consumer.inputs[3],
                bias=input_of(consumer, 6),
            )
        )
    return _matmul_integer(consumer, scale)


def _matmul_integer(matmul: ir.Node, scale: ir.Value) -> Use:
    """Return MatMulInteger -> Cast -> Mul by the activations' scale, or by the product of that and the weights'."""
    cast = _only_use(matmul, "Cast")
    multiplied = _only_use(cast, "Mul")
    scales = next((value for value in multiplied.inputs if value is not cast.outputs[0]), None)
    zero_point = input_of(matmul, 3)
    if scales is scale:
        return _checked(Use((multiplied, cast, matmul), weights=matmul.inputs[1], zero_point=zero_point))
    maker = scales.producer() if scales is not None else None
    if scales is None or maker is None or maker.op_type != "Mul" or scale not in maker.inputs:
        raise _NotByRow("its MatMulInteger is not multiplied by its own scale")
    if any(use.node.op_type != "Mul" for use in scales.uses()) or scales.is_graph_output():
        raise _NotByRow("its scale times that of the weights is also used elsewhere")
    own = next((value for value in maker.inputs if value is not scale), None)
    if own is None:
        raise _NotByRow("its scale is multiplied by itself")
    return _checked(Use((multiplied, cast, matmul, maker), weights=matmul.inputs[1], zero_point=zero_point, scale=own))


def _dynamic_quantize_matmul(node: ir.Node) -> Use:
    return _checked(
        Use(
            (node,),
            weights=node.inputs[1],
            zero_point=input_of(node, 3),
            scale=node.inputs[2],
            bias=input_of(node, 4),
        )
    )


def _two_activations(matmul: ir.Node) -> Use | None:
    """Return a MatMul whose operands are both rounded dynamically; None where it cannot run in float32 instead."""
    if matmul.op_type not in _MATMUL_PARAMETERS:
        return None
    makers = [_maker(matmul.inputs[0]), _maker(matmul.inputs[1])]
    first = matmul.inputs[0] if matmul.op_type == _FUSED else _source(makers[0])
    second = _source(makers[1])
    if first is None or second is None:
        return None
    # The scale of each operand, then its zero point: in the order of a quantizer's outputs.
    for place, index in enumerate(_MATMUL_PARAMETERS[matmul.op_type]):
        maker = makers[place % 2]
        if index is not None and maker is not None and input_of(matmul, index) is not maker.outputs[1 + place // 2]:
            return None
    if matmul.op_type != "MatMulInteger":
        bias = input_of(matmul, 4 if matmul.op_type == _FUSED else 6)
        return Use((matmul,), activations=(first, second), bias=bias)
    cast = _only_use(matmul, "Cast")
    multiplied = _only_use(cast, "Mul")
    scales = next((value for value in multiplied.inputs if value is not cast.outputs[0]), None)
    maker = scales.producer() if scales is not None else None
    expected = {own.outputs[1] for own in makers if own is not None}
    if maker is None or maker.op_type != "Mul" or set(maker.inputs) != expected:
        return None
    return Use((multiplied, cast, matmul, maker), activations=(first, second))


def _maker(value: ir.Value | None) -> ir.Node | None:
    """Return the quantizer whose integers a value is."""
    node = producer_of(value, _LINEAR)
    return node if node is not None and node.outputs[0] is value else None


def _source(maker: ir.Node | None) -> ir.Value | None:
    return None if maker is None else maker.inputs[0]


def _checked(use: Use) -> Use:
    """Return the use. Raises _NotByRow where weights are no constants, or scaled along another axis than columns."""
    weights, *parameters = (use.weights, use.zero_point, use.scale, use.bias)
    if weights is None or not is_fixed(weights):
        raise _NotByRow("both operands of the MatMul depend on the input")
    if not all(is_fixed(value) for value in parameters if value is not None):
        raise _NotByRow("the scale or zero point of its weights is no constant")
    assert weights.const_value is not None
    shape = tuple(weights.const_value.shape)
    if len(shape) < 2:
        raise _NotByRow("its weights are a vector")
    for value in parameters:
        if value is None:
            continue
        assert value.const_value is not None
        if value.const_value.size != 1 and (len(shape) > 2 or tuple(value.const_value.shape) != (shape[-1],)):
            raise _NotByRow("its weights are scaled along another axis than their columns")
    return use


def _only_use(node: ir.Node, operator: str) -> ir.Node:
    output = node.outputs[0]
    consumers = [use.node for use in output.uses()]
    if output.is_graph_output() or [consumer.op_type for consumer in consumers] != [operator]:
        raise _NotByRow(f"{node.op_type} is not followed by {operator} alone")
    return consumers[0]
