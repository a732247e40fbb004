"""Read the nodes of attention operators: their inputs, heads, widths and masks.

The finders of single operators use it. A tap is the nodes that return a site's weights. Where a node has not what a tap
needs, functions raise NotTappable, whose message is the reason that users get. A site is a place in a graph that
computes attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from attnserve_server.conversion.base.sites import KeyPadding, Mask, Operand
from attnserve_server.conversion.graphs.walk import constant_ints, dimension_of, input_of, rank_of

MICROSOFT = "com.microsoft"
FILTER_VALUE = -10000.0
"""The default that onnxruntime adds to the score of a masked key. Source: the schemas of its operators.
It does not hide the key: findings/contrib_masks_are_finite.sh."""

_KEEP_LAST_AXIS = {
    *("Add", "BiasGelu", "Cast", "Dropout", "FastGelu", "Gelu", "Identity", "LayerNormalization", "Mul", "QuickGelu"),
    *("Relu", "RMSNormalization", "RotaryEmbedding", "SimplifiedLayerNormalization", "SkipLayerNormalization"),
    *("SkipSimplifiedLayerNormalization", "Tanh"),
}
"""Operators whose first output is as wide as their widest input."""
_MAX_NODES_BACK = 32
"""How many nodes `last_dimension_of` looks back."""


class NotTappable(Exception):
    """No tap can give the weights of a site; the message is the reason."""


def microsoft_nodes(graph: ir.Graph, *op_types: str) -> Iterator[ir.Node]:
    """Return the nodes of these operators of onnxruntime's domain, those in subgraphs too."""
    return (node for node in graph.all_nodes() if node.domain == MICROSOFT and node.op_type in op_types)


def required(node: ir.Node, position: int, name: str) -> ir.Value:
    """Return an input. Raises NotTappable where it is left out."""
    value = input_of(node, position)
    if value is None:
        raise NotTappable(f"its {name} is missing")
    return value


def refuse_subgraph(node: ir.Node, graph: ir.Graph) -> None:
    """Raise NotTappable for a node in a subgraph."""
    if node.graph is not graph:
        raise NotTappable("it is inside a subgraph, whose values the outer graph cannot read")


def refuse_inputs(node: ir.Node, reasons: Mapping[int, str]) -> None:
    """Raise NotTappable for a node that has an input at one of these positions."""
    for position, reason in reasons.items():
        if input_of(node, position) is not None:
            raise NotTappable(f"it takes {reason}")


def past_of(node: ir.Node, position: int) -> ir.Value | None:
    """Return the keys of earlier positions that a node takes; None if it takes none, or an empty past.

    Raises:
        NotTappable: the values, which are the next input, have no keys.
    """
    past = input_of(node, position)
    if past is None and input_of(node, position + 1) is not None:
        raise NotTappable("it takes past_value without past_key")
    return None if past is None or (past.shape is not None and past.shape[2] == 0) else past


def presents_of(node: ir.Node, key: Operand, value: Operand) -> tuple[Operand, Operand]:
    """Return past and new keys and values together, which are the outputs 1 and 2 of a node that takes a past.

    Raises:
        NotTappable: the node does not return them.
    """
    outputs = [*node.outputs, None, None, None][1:3]
    if any(output is None or not output.name for output in outputs):
        raise NotTappable("it takes past_key, and does not return past and new keys together")
    keys, values = (output for output in outputs if output is not None)
    return Operand(keys, key.heads, packed=False), Operand(values, value.heads, packed=False)


def refuse_uneven_heads(heads: int, kv_heads: int) -> None:
    """Raise NotTappable unless every key head serves the same number of query heads."""
    if heads % kv_heads:
        raise NotTappable(f"{heads} query heads are no multiple of {kv_heads} key heads")


def heads_of(node: ir.Node, attribute: str = "num_heads") -> int:
    """Return the number of heads that a node declares. Raises NotTappable where it declares none."""
    heads = node.attributes.get_int(attribute, 0)
    if heads < 1:
        raise NotTappable(f"it has no {attribute}")
    return heads


def last_dimension_of(value: ir.Value | None, nodes_left: int = _MAX_NODES_BACK) -> int | None:
    """Return the size of a value's last axis, as inferred, or as the nodes behind it imply."""
    if value is None or not nodes_left:
        return None
    size = dimension_of(value, -1)
    if size is not None:
        return size
    node = value.producer()
    return _implied_last(node, nodes_left - 1) if node is not None and value.index() == 0 else None


def _implied_last(node: ir.Node, nodes_left: int) -> int | None:
    """Return the size of the last axis that an operator gives to its first output."""
    if node.op_type == "MatMul":
        return last_dimension_of(input_of(node, 1), nodes_left)
    if node.op_type == "MatMulNBits":
        return node.attributes.get_int("N", 0) or None
    if node.op_type == "Reshape":
        sizes = constant_ints(input_of(node, 1)) or [0]
        return sizes[-1] if sizes[-1] > 0 else None
    if node.op_type in _KEEP_LAST_AXIS:
        widths = (last_dimension_of(source, nodes_left) for source in node.inputs)
        # Gains and biases are as wide as the result, or broadcast to it from a width of 1.
        return max((width for width in widths if width is not None), default=None)
    return None


def key_padding(node: ir.Node, position: int, ranks: tuple[int, ...]) -> tuple[KeyPadding, ...]:
    """Return the integers that mark the keys that count, if the node has them.

    Raises:
        NotTappable: their rank is not known, or is none of `ranks`.
    """
    value = input_of(node, position)
    if value is None:
        return ()
    rank = rank_of(value)
    if rank is None:
        raise NotTappable(f"the rank of its mask {value.name!r} is not known")
    if rank not in ranks:
        known = ", ".join(map(str, ranks))
        raise NotTappable(f"its mask {value.name!r} has rank {rank}; {known} are supported")
    return (KeyPadding(value, rank, node.attributes.get_float("mask_filter_value", FILTER_VALUE)),)


def attention_bias(node: ir.Node, position: int, masked_up_to: float | None = None) -> tuple[Mask, ...]:
    """Return the bias, (B or 1, H or 1, L, S), that a node adds to the scores, if it has one."""
    value = input_of(node, position)
    return () if value is None else (Mask(value, 4, boolean=False, masked_up_to=masked_up_to),)
