"""Find the dynamic quantizers of a graph, and decide which of them can take one scale per row.

A quantizer can if every node that reads its integers can: a MatMul with constant weights, a MatMul of two activations
(which then runs in float32), or DequantizeLinear. The module changes nothing; per_row.py rewrites.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from attnserve_server.conversion.graphs.walk import dimension_of, input_of
from attnserve_server.conversion.precision.quantizer_uses import (
    FUSED,
    LINEAR,
    NotByRow,
    Use,
    checked,
    dynamic_quantize_matmul,
    matmul_integer,
    two_activations,
)

_INSIDE: Final = frozenset(("DynamicQuantizeLSTM",))
"""Operators that quantize their input inside, and so take no scale."""
_ACTIVATION_INPUTS: Final = {"MatMulInteger": (0, 2), "MatMulIntegerToFloat": (0, 4), "DequantizeLinear": (0, 2)}
"""By operator that can be rewritten: the positions of the rounded activations and of their zero point."""


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


def quantizers_of(graph: ir.Graph) -> list[Quantizer]:
    """Return all dynamic quantizers in the order of the graph; those of subgraphs too, which are never rewritten."""
    found: list[Quantizer] = []
    for node, owner in _all_nodes(graph):
        if node.op_type not in {LINEAR, FUSED, *_INSIDE}:
            continue
        if owner is not None:
            found.append(Quantizer(node, reason=f"it is in the body of a node {owner.op_type}"))
            continue
        try:
            found.append(Quantizer(node, _uses_of(node)))
        except NotByRow as why:
            found.append(Quantizer(node, reason=str(why)))
    return found


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
        raise NotByRow(f"{node.op_type} quantizes its input inside, with one scale")
    source = node.inputs[0]
    if source is not None and source.shape is not None and len(source.shape) < 2:
        raise NotByRow("its input has no axis besides the batch")
    if node.op_type == FUSED:
        pair = two_activations(node)
        return (dynamic_quantize_matmul(node) if pair is None else pair,)
    numbers, scale, zero_point = node.outputs
    if any(output.is_graph_output() for output in node.outputs):
        raise NotByRow("its integers are an output of the graph")
    taken = {use.node: use.idx for use in numbers.uses()}
    for use in zero_point.uses():
        if use.node not in taken:
            raise NotByRow(f"its zero point also goes into {use.node.op_type}")
    uses = tuple(_use_of(consumer, index, node) for consumer, index in taken.items())
    known = {inner for use in uses for inner in use.nodes}
    for inner in scale.uses():
        if inner.node not in known:
            raise NotByRow(f"its scale also goes into {inner.node.op_type}")
    return uses


def _use_of(consumer: ir.Node, index: int, node: ir.Node) -> Use:
    """Return the use of rounded activations by one node. Raises NotByRow where it cannot take a scale per row."""
    _, scale, zero_point = node.outputs
    pair = two_activations(consumer)
    if pair is not None:
        return pair
    if consumer.op_type not in _ACTIVATION_INPUTS:
        raise NotByRow(f"{consumer.op_type} takes one scale for its whole input")
    first, third = _ACTIVATION_INPUTS[consumer.op_type]
    if index != first:
        raise NotByRow(f"{consumer.op_type} multiplies it as the second operand, which has no scale per row")
    if input_of(consumer, third) is not zero_point:
        raise NotByRow(f"{consumer.op_type} takes its integers with another zero point")
    if consumer.op_type == "DequantizeLinear":
        if dimension_of(node.inputs[0], -1) is None:
            raise NotByRow("its last axis is dynamic, so a row's scale would depend on the length")
        return Use((consumer,))
    if consumer.op_type == "MatMulIntegerToFloat":
        if input_of(consumer, 2) is not scale:
            raise NotByRow(f"{consumer.op_type} takes its integers with another scale")
        return checked(
            Use(
                (consumer,),
                weights=consumer.inputs[1],
                zero_point=input_of(consumer, 5),
                scale=consumer.inputs[3],
                bias=input_of(consumer, 6),
            )
        )
    return matmul_integer(consumer, scale)
