"""Read-only helpers to walk a graph: the producer and the readers of a value, constants, ranks and dimensions.

Axes may count from either end, as in NumPy. Every function returns None, or an empty result, where the graph does not
state the answer.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from attnserve_server.conversion.graphs.operators import STANDARD

BROADCASTING = {"Add", "Div", "Max", "Min", "Mul", "PRelu", "Pow", "Sub", "Sum", "Where"}
"""Operators on one number of each input at a time; inputs broadcast to the widest of them."""
ELEMENTWISE = BROADCASTING | {
    *("Abs", "Cast", "CastLike", "Clip", "DequantizeLinear", "Dropout", "DynamicQuantizeLinear", "Elu", "Exp"),
    *("Identity", "LeakyRelu", "Log", "Neg", "QuantizeLinear", "Relu", "Round", "ScatterElements", "ScatterND"),
    *("Sigmoid", "Softplus", "Sqrt", "Tanh", "Trilu"),
}
"""Operators that change numbers one at a time and leave every axis in its place."""
_RANK_OF_FIRST = (ELEMENTWISE - BROADCASTING) | {
    *("BiasGelu", "BiasSplitGelu", "Concat", "Conv", "FastGelu", "Gelu", "LayerNormalization", "Pad", "QuickGelu"),
    *("QLinearLeakyRelu", "QLinearSigmoid", "QLinearSoftmax"),
    *("RMSNormalization", "RotaryEmbedding", "SimplifiedLayerNormalization", "Slice", "Softmax"),
}
"""Operators whose first output has the rank of their first input."""
_RANK_OF_WIDEST = BROADCASTING | {
    *("MatMul", "QLinearAdd", "QLinearMatMul", "QLinearMul", "SkipLayerNormalization"),
    "SkipSimplifiedLayerNormalization",
}
"""Operators whose first output has the rank of their widest input."""
_RANK_3 = {"Attention", "EmbedLayerNormalization", "GroupQueryAttention", "MultiHeadAttention", "QAttention"}
"""Operators whose first output is (B, T, width)."""
_MAX_NODES_BACK = 32
"""How many nodes `rank_of` looks back."""


def input_of(node: ir.Node, position: int) -> ir.Value | None:
    """Return an input of a node; None where the node leaves it out."""
    return node.inputs[position] if position < len(node.inputs) else None


def producer_of(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Return the node that computes a value; with `op_types`, None unless it is one of these operators."""
    node = value.producer() if value is not None else None
    return node if node is not None and (not op_types or node.op_type in op_types) else None


def before(value: ir.Value, op_types: Iterable[str]) -> ir.Value:
    """Return the value that nodes of these operators, one behind the other, compute `value` from."""
    while (node := producer_of(value, *op_types)) is not None and (source := input_of(node, 0)) is not None:
        value = source
    return value


def is_constant(value: ir.Value | None) -> bool:
    """Return whether a value is a `Constant` or has an initializer, be it the default of an input of the graph."""
    return value is not None and ir.convenience.get_const_tensor(value) is not None


def is_fixed(value: ir.Value | None) -> bool:
    """Return whether a value has an initializer and is no input of the graph, which could replace that."""
    return value is not None and value.const_value is not None and not value.is_graph_input()


def is_made_of_constants(value: ir.Value) -> bool:
    """Return whether a value is a constant, or one that casts, layout changes and dequantization of constants give."""
    if is_constant(value):
        return True
    node = producer_of(value, "Transpose", "Cast", "DequantizeLinear", "Reshape", "Identity")
    return node is not None and all(each is None or is_made_of_constants(each) for each in node.inputs)


def constant_ints(value: ir.Value | None) -> list[int] | None:
    """Return the numbers of a constant as a flat list of integers."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return [int(number) for number in tensor.numpy().reshape(-1)] if tensor is not None else None


def constant_number(value: ir.Value | None) -> float | None:
    """Return the number of a constant of one element."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return float(tensor.numpy().reshape(())) if tensor is not None and tensor.size == 1 else None


def axes_of(node: ir.Node) -> list[int] | None:
    """Return the axes of Squeeze, Unsqueeze or a reduction: an attribute in older opsets, an input in newer ones."""
    if "axes" in node.attributes:
        return list(node.attributes.get_ints("axes", ()))
    return constant_ints(input_of(node, 1))


def permutation_of(node: ir.Node) -> list[int]:
    """Return `perm` of a Transpose; empty where it reverses all axes by default, and for other operators."""
    return list(node.attributes.get_ints("perm", ()))


def dimension_of(value: ir.Value | None, axis: int) -> int | None:
    """Return the size of an axis where it is a number; None where it is symbolic, or the axis does not exist."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    dimension = value.shape[axis]
    return dimension if isinstance(dimension, int) else None


def rank_of(value: ir.Value | None) -> int | None:
    """Return how many axes a value has, as inferred, or as the nodes behind it imply.

    Shape inference does not know onnxruntime's own operators, nor what follows them. A shape without axes counts as
    unknown, because converters to float16 write it for values of any rank.
    """
    return _rank(value, {}, _MAX_NODES_BACK)


def _rank(value: ir.Value | None, known: dict[ir.Value, int | None], nodes_left: int) -> int | None:
    if value is None:
        return None
    if value.shape is not None and len(value.shape):
        return len(value.shape)
    node = value.producer()
    if node is None or not nodes_left:
        return None
    if value not in known:
        known[value] = _implied_rank(node, value.index() or 0, known, nodes_left - 1)
    return known[value]


def _implied_rank(node: ir.Node, output: int, known: dict[ir.Value, int | None], nodes_left: int) -> int | None:
    """Return the rank that an operator gives to one of its outputs."""
    rank: int | None = None
    if node.op_type in _RANK_3 and output == 0:
        rank = 3
    elif node.op_type == "EmbedLayerNormalization" and output == 1:
        rank = 1
    elif node.op_type == "Transpose" and "perm" in node.attributes:
        rank = len(permutation_of(node))
    elif node.op_type == "Reshape":
        rank = dimension_of(input_of(node, 1), 0)
    elif node.op_type == "Split" or (node.op_type in _RANK_OF_FIRST and output == 0):
        rank = _rank(input_of(node, 0), known, nodes_left)
    elif node.op_type in _RANK_OF_WIDEST and output == 0:
        activations = [_rank(each, known, nodes_left) for each in node.inputs if not is_constant(each)]
        constants = [_rank(each, known, nodes_left) for each in node.inputs if is_constant(each)]
        if any(each is not None for each in activations):  # constants alone may be narrower than the result
            rank = max(each for each in (*activations, *constants) if each is not None)
    return rank


def activations_of(graph: ir.Graph) -> set[ir.Value]:
    """Return the values, of subgraphs too, that depend on the numbers of the inputs, and not on their shapes alone.

    Outputs of If, Loop and Scan count as such.
    """
    activations: set[ir.Value] = {value for value in graph.inputs if value.const_value is None}
    for subgraph in graph.subgraphs():
        if subgraph is not graph:
            activations.update(subgraph.inputs)
    for node in graph.all_nodes():
        if node.op_type in {"Shape", "Size"}:
            continue
        if node.op_type in {"If", "Loop", "Scan"} or any(value in activations for value in node.inputs):
            activations.update(node.outputs)
    return activations


def is_standard(node: ir.Node) -> bool:
    """Return whether a node's operator is of the standard domain."""
    return node.domain in STANDARD
