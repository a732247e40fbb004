"""Reads nodes of onnxruntime's own operators, whose outputs no shape inference knows. Decides nothing about sites."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from attnserve_server.conversion.base.sites import KeyPadding, Mask

DOMAIN = "com.microsoft"
FILTER_VALUE = -10000.0
"""What onnxruntime adds to the score of a masked key unless told otherwise. Source: its operators' schemas."""

_RANK_3 = {"Attention", "EmbedLayerNormalization", "GroupQueryAttention", "MultiHeadAttention", "QAttention"}
_LIKE_THEIR_INPUT = {
    *("Add", "BiasGelu", "BiasSplitGelu", "Cast", "Dropout", "FastGelu", "Gelu", "Identity", "LayerNormalization"),
    *("MatMul", "Mul", "QuickGelu", "Relu", "RMSNormalization", "RotaryEmbedding", "SimplifiedLayerNormalization"),
    *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "Tanh"),
}
"""Operators whose first output has the rank of their first input, or, for sums, of its wider one."""
_KEEP_THE_LAST_AXIS = _LIKE_THEIR_INPUT - {"MatMul", "BiasSplitGelu"}
_FAR = 32
"""How many nodes back a shape is looked for."""


class NotTappable(Exception):
    """Why this site's weights cannot be had."""


def nodes_of(graph: ir.Graph, *op_types: str) -> Iterator[ir.Node]:
    """All nodes of these operators of onnxruntime's own domain, in subgraphs too."""
    return (node for node in graph.all_nodes() if node.domain == DOMAIN and node.op_type in op_types)


def given(node: ir.Node, position: int) -> ir.Value | None:
    """An input, or None where it is left out."""
    return node.inputs[position] if position < len(node.inputs) else None


def required(node: ir.Node, position: int, name: str) -> ir.Value:
    """An input that must be there. Raises NotTappable."""
    value = given(node, position)
    if value is None:
        raise NotTappable(f"its {name} is missing")
    return value


def refuse_subgraph(node: ir.Node, graph: ir.Graph) -> None:
    """Raise NotTappable where the node stands in an inner graph."""
    if node.graph is not graph:
        raise NotTappable("it stands inside a subgraph, whose values the outer graph cannot see")


def refuse_inputs(node: ir.Node, reasons: Mapping[int, str]) -> None:
    """Raise NotTappable where the node has an input that no tap knows, by its position."""
    for position, reason in reasons.items():
        if given(node, position) is not None:
            raise NotTappable(f"it takes {reason}")


def heads_of(node: ir.Node, attribute: str = "num_heads") -> int:
    """The number of heads that the node declares. Raises NotTappable where it declares none."""
    heads = node.attributes.get_int(attribute, 0)
    if heads < 1:
        raise NotTappable(f"it has no {attribute}")
    return heads


def rank_of(value: ir.Value | None, far: int = _FAR) -> int | None:
    """The rank of a value: as inferred, or as the operators that make it imply; None where neither tells."""
    if value is None or value.shape is not None:
        return len(value.shape) if value is not None and value.shape is not None else None
    maker = value.producer()
    return None if maker is None or not far else _implied_rank(maker, value.index() or 0, far - 1)


def _implied_rank(maker: ir.Node, output: int, far: int) -> int | None:
    """The rank that an operator gives to one of its outputs."""
    rank: int | None = None
    if output == 0 and maker.op_type in _RANK_3:
        rank = 3
    elif output == 1 and maker.op_type == "EmbedLayerNormalization":
        rank = 1
    elif maker.op_type == "Transpose" and "perm" in maker.attributes:
        rank = len(maker.attributes.get_ints("perm", ()))
    elif maker.op_type == "Reshape":
        shape = given(maker, 1)
        count = shape.shape[0] if shape is not None and shape.shape is not None else None
        rank = count if isinstance(count, int) else None
    elif output == 0 and maker.op_type in _LIKE_THEIR_INPUT:
        ranks = (rank_of(source, far) for source in maker.inputs[:2])
        rank = max((rank for rank in ranks if rank is not None), default=None)
    return rank


def last_extent_of(value: ir.Value | None, far: int = _FAR) -> int | None:
    """The extent of a value's last axis, found as its rank is."""
    if value is None or not far:
        return None
    if value.shape is not None and len(value.shape) and isinstance(value.shape[-1], int):
        return value.shape[-1]
    maker = value.producer()
    if maker is None or value.index() != 0:
        return None
    if maker.op_type == "MatMul":
        return last_extent_of(given(maker, 1), far - 1)
    if maker.op_type in _KEEP_THE_LAST_AXIS:
        wide = (last_extent_of(source, far - 1) for source in maker.inputs)
        # Gains and biases are as wide as what they change, or one wide.
        return max((extent for extent in wide if extent is not None), default=None)
    return None


def key_padding(node: ir.Node, position: int, ranks: tuple[int, ...]) -> tuple[KeyPadding, ...]:
    """The integers that say which keys count, if the node has them. Raises NotTappable where their form is open."""
    value = given(node, position)
    if value is None:
        return ()
    rank = rank_of(value)
    if rank is None:
        raise NotTappable(f"the rank of its mask {value.name!r} is not known")
    if rank not in ranks:
        known = ", ".join(map(str, ranks))
        raise NotTappable(f"its mask {value.name!r} has rank {rank}; {known} are known")
    return (KeyPadding(value, rank, node.attributes.get_float("mask_filter_value", FILTER_VALUE)),)


def attention_bias(node: ir.Node, position: int, masked_up_to: float | None = None) -> tuple[Mask, ...]:
    """What is added to the scores, if anything: (B or 1, H or 1, L, S)."""
    value = given(node, position)
    return () if value is None else (Mask(value, 4, boolean=False, masked_up_to=masked_up_to),)
