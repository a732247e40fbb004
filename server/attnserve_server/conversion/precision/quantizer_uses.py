"""Recognise a MatMul that uses a dynamic quantizer's integers, and decide whether it can take one scale per row.

A dynamic quantizer rounds activations by a scale that it computes from them. The functions raise NotByRow, with the
reason, for a use that needs one scale for all rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from attnserve_server.conversion.graphs.walk import input_of, is_fixed, producer_of

LINEAR: Final = "DynamicQuantizeLinear"
FUSED: Final = "DynamicQuantizeMatMul"
_MATMUL_PARAMETERS: Final = {
    "MatMulInteger": (None, None, 2, 3),
    "MatMulIntegerToFloat": (2, 3, 4, 5),
    FUSED: (None, 2, None, 3),
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


class NotByRow(Exception):
    """A quantizer cannot take one scale per row; the message is the reason."""


def matmul_integer(matmul: ir.Node, scale: ir.Value) -> Use:
    """Return MatMulInteger -> Cast -> Mul by the activations' scale, or by the product of that and the weights'."""
    cast = _only_use(matmul, "Cast")
    multiplied = _only_use(cast, "Mul")
    scales = next((value for value in multiplied.inputs if value is not cast.outputs[0]), None)
    zero_point = input_of(matmul, 3)
    if scales is scale:
        return checked(Use((multiplied, cast, matmul), weights=matmul.inputs[1], zero_point=zero_point))
    maker = scales.producer() if scales is not None else None
    if scales is None or maker is None or maker.op_type != "Mul" or scale not in maker.inputs:
        raise NotByRow("its MatMulInteger is not multiplied by its own scale")
    if any(use.node.op_type != "Mul" for use in scales.uses()) or scales.is_graph_output():
        raise NotByRow("its scale times that of the weights is also used elsewhere")
    own = next((value for value in maker.inputs if value is not scale), None)
    if own is None:
        raise NotByRow("its scale is multiplied by itself")
    return checked(Use((multiplied, cast, matmul, maker), weights=matmul.inputs[1], zero_point=zero_point, scale=own))


def dynamic_quantize_matmul(node: ir.Node) -> Use:
    """Return the use by DynamicQuantizeMatMul, which rounds the activations itself."""
    return checked(
        Use(
            (node,),
            weights=node.inputs[1],
            zero_point=input_of(node, 3),
            scale=node.inputs[2],
            bias=input_of(node, 4),
        )
    )


def two_activations(matmul: ir.Node) -> Use | None:
    """Return a MatMul whose operands are both rounded dynamically; None where it cannot run in float32 instead.

    Raises:
        NotByRow: both operands of a MatMulInteger are, and Cast and Mul alone do not follow it.
    """
    if matmul.op_type not in _MATMUL_PARAMETERS:
        return None
    makers = [_maker(matmul.inputs[0]), _maker(matmul.inputs[1])]
    first = matmul.inputs[0] if matmul.op_type == FUSED else _source(makers[0])
    second = _source(makers[1])
    if first is None or second is None:
        return None
    # The scale of each operand, then its zero point: in the order of a quantizer's outputs.
    for place, index in enumerate(_MATMUL_PARAMETERS[matmul.op_type]):
        maker = makers[place % 2]
        if index is not None and maker is not None and input_of(matmul, index) is not maker.outputs[1 + place // 2]:
            return None
    if matmul.op_type != "MatMulInteger":
        bias = input_of(matmul, 4 if matmul.op_type == FUSED else 6)
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
    node = producer_of(value, LINEAR)
    return node if node is not None and node.outputs[0] is value else None


def _source(maker: ir.Node | None) -> ir.Value | None:
    return None if maker is None else maker.inputs[0]


def checked(use: Use) -> Use:
    """Return the use. Raises NotByRow where weights are no constants, or scaled along another axis than columns."""
    weights, *parameters = (use.weights, use.zero_point, use.scale, use.bias)
    if weights is None or not is_fixed(weights):
        raise NotByRow("both operands of the MatMul depend on the input")
    if not all(is_fixed(value) for value in parameters if value is not None):
        raise NotByRow("the scale or zero point of its weights is no constant")
    assert weights.const_value is not None
    shape = tuple(weights.const_value.shape)
    if len(shape) < 2:
        raise NotByRow("its weights are a vector")
    for value in parameters:
        if value is None:
            continue
        assert value.const_value is not None
        if value.const_value.size != 1 and (len(shape) > 2 or tuple(value.const_value.shape) != (shape[-1],)):
            raise NotByRow("its weights are scaled along another axis than their columns")
    return use


def _only_use(node: ir.Node, operator: str) -> ir.Node:
    output = node.outputs[0]
    consumers = [use.node for use in output.uses()]
    if output.is_graph_output() or [consumer.op_type for consumer in consumers] != [operator]:
        raise NotByRow(f"{node.op_type} is not followed by {operator} alone")
    return consumers[0]
