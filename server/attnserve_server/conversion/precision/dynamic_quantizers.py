"""Dynamic quantizers of a graph, and which of them can take one scale per row. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

_LINEAR: Final = "DynamicQuantizeLinear"
_FUSED: Final = "DynamicQuantizeMatMul"
_INSIDE: Final = frozenset(("DynamicQuantizeLSTM",))
"""Operators that quantize their own input inside, so that no scale can be given to them."""
_ACTIVATION_INPUTS: Final = {"MatMulInteger": (0, 2), "MatMulIntegerToFloat": (0, 4), "DequantizeLinear": (0, 2)}
"""By operator that can be rewritten: at which inputs it takes the rounded activations and their zero point."""
_PRODUCT_PARAMETERS: Final = {
    "MatMulInteger": (None, None, 2, 3),
    "MatMulIntegerToFloat": (2, 3, 4, 5),
    _FUSED: (None, 2, None, 3),
}
"""By product: at which inputs it takes the scales and the zero points of its two operands; None: nowhere."""


@dataclass(frozen=True, slots=True)
class Use:
    """One use of rounded activations: a product with constant weights, one of two activations, or the way to float32.

    Args:
        nodes: that a rewriting replaces, the last one first; it replaces the output of that one.
        activations: the two operands of a product of two activations, float32, as they are before they are rounded.
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

    `reason`: why it cannot take one scale per row; empty where it can, and then `uses` are all uses of its numbers.
    """

    node: ir.Node
    uses: tuple[Use, ...] = ()
    reason: str = ""

    @property
    def name(self) -> str:
        """The node's name, or that of its output."""
        return self.node.name or str(self.node.outputs[0].name)

    @property
    def source(self) -> ir.Value:
        """The activations, float32 (..., K)."""
        source = self.node.inputs[0]
        assert source is not None
        return source

    @property
    def rounds(self) -> bool:
        """Whether its numbers are still needed after the rewriting: not where all products are of two activations."""
        return any(use.activations is None for use in self.uses)


class _NotByRow(Exception):
    """Why a quantizer cannot take one scale per row, in words."""


def quantizers_of(graph: ir.Graph) -> list[Quantizer]:
    """All dynamic quantizers, in the order of the graph; those of subgraphs among them, which are never rewritten."""
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
    """K, the length of a row: as the weights have it, or the activations' own last axis."""
    for use in quantizer.uses:
        if use.weights is not None and use.weights.const_value is not None:
            extents: tuple[int, ...] = use.weights.const_value.numpy().shape
            return extents[-2]
    assert quantizer.source.shape is not None
    width = quantizer.source.shape[-1]
    assert isinstance(width, int)
    return width


def _all_nodes(graph: ir.Graph, owner: ir.Node | None = None) -> Iterator[tuple[ir.Node, ir.Node | None]]:
    """Each node, and the outermost node whose subgraph it is in; None: it is in the graph itself."""
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
    rank = None if node.inputs[0] is None or node.inputs[0].shape is None else len(node.inputs[0].shape)
    if rank is not None and rank < 2:
        raise _NotByRow("its input has no axis besides the batch")
    if node.op_type == _FUSED:
        pair = _two_activations(node)
        return (_fused_product(node) if pair is None else pair,)
    numbers, scale, zero_point = node.outputs
    if any(output.is_graph_output() for output in node.outputs):
        raise _NotByRow("its numbers are an output of the graph")
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
    """A use of rounded activations by one node. Raises _NotByRow where that cannot take a scale per row."""
    _, scale, zero_point = node.outputs
    pair = _two_activations(consumer)
    if pair is not None:
        return pair
    if consumer.op_type not in _ACTIVATION_INPUTS:
        raise _NotByRow(f"{consumer.op_type} takes one scale for its whole input")
    first, third = _ACTIVATION_INPUTS[consumer.op_type]
    if index != first:
        raise _NotByRow(f"{consumer.op_type} multiplies it as the second operand, which has no scale per row")
    if _input(consumer, third) is not zero_point:
        raise _NotByRow(f"{consumer.op_type} takes its numbers with another zero point")
    if consumer.op_type == "DequantizeLinear":
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        if shape is None or not isinstance(shape[-1], int):
            raise _NotByRow("its last axis is dynamic, so a row's scale would depend on the length")
        return Use((consumer,))
    if consumer.op_type == "MatMulIntegerToFloat":
        if _input(consumer, 2) is not scale:
            raise _NotByRow(f"{consumer.op_type} takes its numbers with another scale")
        return _checked(
            Use(
                (consumer,),
                weights=consumer.inputs[1],
                zero_point=_input(consumer, 5),
                scale=consumer.inputs[3],
                bias=_input(consumer, 6),
            )
        )
    return _integer_product(consumer, scale)


def _integer_product(product: ir.Node, scale: ir.Value) -> Use:
    """MatMulInteger -> Cast -> Mul by the activations' scale, and by that of the weights where it is multiplied in."""
    cast = _only_use(product, "Cast")
    multiplied = _only_use(cast, "Mul")
    scales = next((value for value in multiplied.inputs if value is not cast.outputs[0]), None)
    zero_point = _input(product, 3)
    if scales is scale:
        return _checked(Use((multiplied, cast, product), weights=product.inputs[1], zero_point=zero_point))
    maker = scales.producer() if scales is not None else None
    if scales is None or maker is None or maker.op_type != "Mul" or scale not in maker.inputs:
        raise _NotByRow("its integer product is not multiplied by its own scale")
    if any(use.node.op_type != "Mul" for use in scales.uses()) or scales.is_graph_output():
        raise _NotByRow("its scale times that of the weights is used elsewhere too")
    own = next((value for value in maker.inputs if value is not scale), None)
    if own is None:
        raise _NotByRow("its scale is multiplied by itself")
    return _checked(
        Use((multiplied, cast, product, maker), weights=product.inputs[1], zero_point=zero_point, scale=own)
    )


def _fused_product(node: ir.Node) -> Use:
    return _checked(
        Use(
            (node,),
            weights=node.inputs[1],
            zero_point=_input(node, 3),
            scale=node.inputs[2],
            bias=_input(node, 4),
        )
    )


def _two_activations(product: ir.Node) -> Use | None:
    """A product whose operands are both rounded dynamically; None where it is not one that can be run in float32."""
    if product.op_type not in _PRODUCT_PARAMETERS:
        return None
    makers = [_maker(product.inputs[0]), _maker(product.inputs[1])]
    first = product.inputs[0] if product.op_type == _FUSED else _source(makers[0])
    second = _source(makers[1])
    if first is None or second is None:
        return None
    # Of each operand its scale, then its zero point, in the order of a quantizer's outputs.
    for place, index in enumerate(_PRODUCT_PARAMETERS[product.op_type]):
        maker = makers[place % 2]
        if index is not None and maker is not None and _input(product, index) is not maker.outputs[1 + place // 2]:
            return None
    if product.op_type != "MatMulInteger":
        bias = _input(product, 4 if product.op_type == _FUSED else 6)
        return Use((product,), activations=(first, second), bias=bias)
    cast = _only_use(product, "Cast")
    multiplied = _only_use(cast, "Mul")
    scales = next((value for value in multiplied.inputs if value is not cast.outputs[0]), None)
    maker = scales.producer() if scales is not None else None
    expected = {own.outputs[1] for own in makers if own is not None}
    if maker is None or maker.op_type != "Mul" or set(maker.inputs) != expected:
        return None
    return Use((multiplied, cast, product, maker), activations=(first, second))


def _maker(value: ir.Value | None) -> ir.Node | None:
    """The quantizer whose rounded numbers a value is."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == _LINEAR and node.outputs[0] is value else None


def _source(maker: ir.Node | None) -> ir.Value | None:
    return None if maker is None else maker.inputs[0]


def _checked(use: Use) -> Use:
    """The same use. Raises _NotByRow where the weights are no constants, or scaled along another axis than columns."""
    weights, *parameters = (use.weights, use.zero_point, use.scale, use.bias)
    if weights is None or not _is_constant(weights):
        raise _NotByRow("both operands of the product depend on the input")
    if not all(_is_constant(value) for value in parameters if value is not None):
        raise _NotByRow("scale or zero point of the weights is no constant")
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


def _is_constant(value: ir.Value) -> bool:
    return value.const_value is not None and not value.is_graph_input()


def _only_use(node: ir.Node, operator: str) -> ir.Node:
    output = node.outputs[0]
    consumers = [use.node for use in output.uses()]
    if output.is_graph_output() or [consumer.op_type for consumer in consumers] != [operator]:
        raise _NotByRow(f"{node.op_type} is not followed by {operator} alone")
    return consumers[0]


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None
