"""Find attention that reads only how many ones a mask has, and give it the whole mask where the operator takes one.

    attention_mask (B, S) -> Cast -> ReduceSum over S -> Attention(mask_index (B,))     as in optimized files
    attention_mask (B, S) -> Cast -> Attention(mask_index (B, S))                       restored

A count makes the first so many keys visible. So a mask with zeros on the left or in the middle hides the wrong
keys, without an error. Behind ones followed by zeros alone, both forms add the same numbers to the scores, so that
restoring changes no answer. Operators that take no mask of one number for each key keep the count; `CountedMasks.kept`
lists their masks, for which the server refuses any other order.

Source: onnxruntime's operators Attention, QAttention, MultiHeadAttention, EmbedLayerNormalization (whose second output
is such a count) and GroupQueryAttention; ONNX operators, Attention-24. Nothing here raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from attnserve_server.conversion.graphs.nodes import NodeBuilder
from attnserve_server.conversion.graphs.walk import (
    axes_of,
    constant_number,
    input_of,
    is_standard,
    producer_of,
    rank_of,
)

_MICROSOFT: Final = "com.microsoft"
_TAKES_MASKS: Final[Mapping[str, tuple[int, int]]] = {
    "Attention": (3, 4),
    "MultiHeadAttention": (4, 6),
    "QAttention": (5, 8),
}
"""By operator of onnxruntime that takes a count or a mask, the positions of that and of a past, whose keys a mask of
the new keys does not cover."""
_TAKES_COUNTS: Final[Mapping[tuple[str, str], int]] = {
    (_MICROSOFT, "DecoderMaskedMultiHeadAttention"): 4,
    (_MICROSOFT, "GroupQueryAttention"): 5,
    (_MICROSOFT, "PagedAttention"): 6,
    (_MICROSOFT, "SparseAttention"): 6,
    ("", "Attention"): 6,
}
"""By domain and operator that takes a count only, its position."""
_PASSING: Final = {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
"""Operators between a count and its use."""
_EMBEDDINGS: Final = {"EmbedLayerNormalization", "QEmbedLayerNormalization"}
"""Operators of onnxruntime whose second output counts the ones of the mask in their input 7."""
_EMBEDDING_MASK: Final = 7


@dataclass(frozen=True, slots=True)
class CountedMasks:
    """What was found.

    Attributes:
        restored: the inputs whose masks operators now read whole, in order; "" for a mask that the graph computes.
        kept: by mask input, the operator that still reads its count.
    """

    restored: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)


def with_whole_masks(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, CountedMasks]:
    """Return a copy of a model whose attention reads whole masks where it can, and what was found.

    Args:
        proto: a checked model. It is returned as it is where nothing can be restored.
    """
    model = ir.from_proto(proto)
    graph = model.graph
    restored: dict[str, None] = {}
    kept: dict[str, str] = {}
    whole: dict[ir.Value, ir.Value] = {}
    for node in list(graph.all_nodes()):
        place = _count_place(node)
        if place is None:
            continue
        takes = node.domain == _MICROSOFT and node.op_type in _TAKES_MASKS
        takes = takes and node.graph is graph and input_of(node, _TAKES_MASKS[node.op_type][1]) is None
        mask, shifted = _counted_mask(input_of(node, place))
        if mask is None:
            continue
        source = _mask_input(mask)
        if takes and not shifted:
            node.replace_input_with(place, _as_integers(graph, node, mask, whole))
            restored[source] = None
        elif source:
            kept[source] = node.op_type
    if restored:
        RemoveUnusedNodesPass()(model)
    return (ir.to_proto(model) if restored else proto), CountedMasks(tuple(restored), kept)


def _count_place(node: ir.Node) -> int | None:
    if node.domain == _MICROSOFT and node.op_type in _TAKES_MASKS:
        return _TAKES_MASKS[node.op_type][0]
    return _TAKES_COUNTS.get(("" if is_standard(node) else node.domain, node.op_type))


def _counted_mask(count: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """Return the mask (B, S) of zeros and ones that a value counts, if any, and whether a constant is added to that."""
    value, shifted = count, False
    while value is not None and (node := value.producer()) is not None:
        if node.op_type in _EMBEDDINGS and node.domain == _MICROSOFT:
            return (_zeros_and_ones(input_of(node, _EMBEDDING_MASK)) if value.index() == 1 else None), shifted
        if not is_standard(node):
            break
        if node.op_type == "ReduceSum":
            summed = axes_of(node) in ([1], [-1]) and rank_of(input_of(node, 0)) == 2
            return (_zeros_and_ones(input_of(node, 0)) if summed else None), shifted
        if node.op_type in {"Add", "Sub"} and constant_number(input_of(node, 1)) is not None:
            shifted = True
        elif node.op_type not in _PASSING:
            break
        value = input_of(node, 0)
    return None, shifted


def _zeros_and_ones(value: ir.Value | None) -> ir.Value | None:
    """Return the value before its casts if it is an input or boolean; None for other values."""
    while (cast := producer_of(value, "Cast", "Identity")) is not None:
        value = input_of(cast, 0)
    return value if value is not None and (value.is_graph_input() or value.dtype is ir.DataType.BOOL) else None


def _mask_input(mask: ir.Value) -> str:
    """Return the name of the input that a mask is; empty for one that the graph computes."""
    return str(mask.name) if mask.is_graph_input() else ""


def _as_integers(graph: ir.Graph, user: ir.Node, mask: ir.Value, whole: dict[ir.Value, ir.Value]) -> ir.Value:
    """Return the mask in int32, the type that the operators take; the first user's cast serves all."""
    if mask.dtype is ir.DataType.INT32:
        return mask
    if mask not in whole:
        builder = NodeBuilder(graph, f"{user.name or user.op_type}/whole_mask/")
        cast = builder.op("Cast", [mask], to=int(ir.DataType.INT32))
        cast.type, cast.shape = ir.TensorType(ir.DataType.INT32), mask.shape
        builder.place_before(user)
        whole[mask] = cast
    return whole[mask]
