"""Write the int8 quantizers that taps (nodes that return weights) read as uint8 quantizers with the same numbers.

    QuantizeLinear(x, scale, int8 z) -> DequantizeLinear(., scale, int8 z)
    QuantizeLinear(x, scale, uint8 z + 128) -> DequantizeLinear(., scale, uint8 z + 128)

On x86, onnxruntime makes this change itself before it fuses the nodes between quantizers, but only for a quantizer with
one reader. A tap is a second reader: the quantizer would stay signed among unsigned ones, and the nodes on both sides
would no longer be fused, which rounds other numbers. Both forms represent the same numbers. Nothing here raises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from attnserve_server.conversion.base.sites import FoundSite, Linear, Probabilities, Scores
from attnserve_server.conversion.finders import find_sites
from attnserve_server.conversion.graphs.contraction import quantizer_of
from attnserve_server.conversion.graphs.nodes import NodeBuilder
from attnserve_server.conversion.graphs.walk import constant_number, input_of, producer_of

_ZERO = 2
"""The position of the zero point in both operators."""


def sites_to_tap(graph: ir.Graph) -> dict[str, FoundSite]:
    """Return the sites of a graph by name, after the int8 quantizers of values that taps and checks read are changed.

    Args:
        graph: changed in place.
    """
    found = find_sites(graph)
    changed = [_made_unsigned(graph, value) for value in dict.fromkeys(_integers_of(found))]
    return find_sites(graph) if any(changed) else found


def _integers_of(sites: Mapping[str, FoundSite]) -> Iterator[ir.Value]:
    """Yield the values behind quantizers that taps and checks read."""
    for site in sites.values():
        match site.attention:
            case Probabilities() as own:
                yield from (own.weights, own.value, own.output)
            case Scores(query=query, key=key, value=value) | Linear(query=query, key=key, value=value):
                yield from _before_dequantizers(operand.value for operand in (query, key, value))


def _before_dequantizers(values: Iterable[ir.Value]) -> Iterator[ir.Value]:
    for value in values:
        node = producer_of(value, "DequantizeLinear")
        if node is not None and node.inputs[0] is not None:
            yield node.inputs[0]


def _made_unsigned(graph: ir.Graph, value: ir.Value) -> bool:
    """Change the quantizer of a value and its dequantizer, if no other node reads either. Return whether it did."""
    node = producer_of(value, "QuantizeLinear")
    users = list(value.consumers())
    if node is None or node.graph is not graph or value.is_graph_output() or len(users) != 1:
        return False
    pair = [node, users[0]]
    read_once = len(users[0].outputs[0].uses()) == 1 and not users[0].outputs[0].is_graph_output()
    if users[0].op_type != "DequantizeLinear" or not read_once or not all(map(_is_signed, pair)):
        return False
    zero = constant_number(input_of(node, _ZERO))
    assert zero is not None  # `_is_signed` found it
    shifted = NodeBuilder(graph, "").stored(f"{value.name}/unsigned_zero", np.array(int(zero) + 128, np.uint8))
    for each in pair:
        each.replace_input_with(_ZERO, shifted)
    value.type = ir.TensorType(ir.DataType.UINT8)
    return True


def _is_signed(node: ir.Node) -> bool:
    """Return whether a node has one constant int8 zero point, and no other statement of its type."""
    zero = input_of(node, _ZERO)
    known = quantizer_of(node) is not None and zero is not None and constant_number(zero) is not None
    return (
        known and zero is not None and zero.dtype is ir.DataType.INT8 and not node.attributes.get_int("output_dtype", 0)
    )
