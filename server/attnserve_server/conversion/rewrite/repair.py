"""Repairs graphs that ONNX allows, or exporters write, and the runtime refuses: operands that it does not broadcast.

    RotaryEmbedding(x, cos (1, L, D / 2), sin)    cos and sin are expanded to the batch of x
    Attention(q, k, v, mask (B, 1, 1, S))         the mask is expanded to (B, 1, L, S), and one of (S,) to (L, S)
    Attention(q, k, v, mask (B, L, S))            becomes (B, 1, L, S), or heads would read the masks of other rows
    Attention(q, k, v, mask (L, 4)), opset 24     is padded with hidden keys to (L, S)

Masks of other shapes are left as they are. Source: ONNX operators, Attention-23, Attention-24 and RotaryEmbedding-23.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx
import onnx_ir as ir

from attnserve_server.conversion.graphs.nodes import NodeBuilder
from attnserve_server.conversion.graphs.reading import checked
from attnserve_server.conversion.graphs.walk import input_of, is_standard, rank_of

_PER_ROW: Final[dict[tuple[str, str], tuple[tuple[int, int], ...]]] = {
    ("", "RotaryEmbedding"): ((3, 2),),
    ("com.microsoft", "Attention"): ((3, 2), (3, 3)),
    ("com.microsoft", "EmbedLayerNormalization"): ((1, 2), (7, 2)),
    ("com.microsoft", "GroupQueryAttention"): ((5, 1), (9, 2)),
    ("com.microsoft", "MultiHeadAttention"): ((4, 2), (4, 3)),
    ("com.microsoft", "RotaryEmbedding"): ((1, 2),),
}
"""By operator: positions of inputs that must have as many rows as the first input, and the rank in which they do."""
_POSITION_IDS: Final = 3
_ANGLES: Final = (1, 2)
"""Positions of cos and sin among the inputs of the standard `RotaryEmbedding`."""
_MASK: Final = 3
_PAST_KEY: Final = 4
_PADS_MASKS: Final = 24
"""The first opset in which a mask may have fewer columns than there are keys."""


def repaired(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Return a file's model with the operands expanded that the runtime does not broadcast.

    Args:
        proto: the model, with inferred shapes.
        name: of the file, for messages.

    Raises:
        BuildRefused: the repaired model exceeds 2 GiB.
    """
    model = ir.from_proto(proto)
    return checked(ir.to_proto(model), name) if repair(model.graph) else proto


def repair(graph: ir.Graph) -> bool:
    """Expand the operands of a graph that the runtime does not broadcast, in place. Return whether any was changed."""
    changed = False
    for node in list(graph.all_nodes()):
        owner = node.graph
        if not isinstance(owner, ir.Graph):
            continue
        builder = NodeBuilder(owner, f"attnserve.repair.{node.outputs[0].name}.", metadata=node.metadata_props)
        builder.opset = graph.opset_imports.get("", graph.opset_imports.get("ai.onnx", 0))
        widened = {at: _widened(builder, node, at) for at in _one_row(node)}
        if node.op_type == "Attention" and is_standard(node):
            mask = _Mask.of(node, builder)
            if mask is not None and (whole := mask.whole()) is not None:
                widened[_MASK] = whole
        if widened:
            builder.place_before(node)
            for at, value in widened.items():
                node.replace_input_with(at, value)
        changed |= bool(widened)
    return changed


def _one_row(node: ir.Node) -> Iterator[int]:
    """Yield the positions of the inputs of one row that must have one for each row of the first input."""
    first = input_of(node, 0)
    if first is None:
        return
    if node.op_type == "RotaryEmbedding" and is_standard(node) and input_of(node, _POSITION_IDS) is None:
        yield from (at for at in _ANGLES if not _same(_axis(input_of(node, at), 0), _axis(first, 0)))
    domain = "" if is_standard(node) else node.domain
    for at, rank in _PER_ROW.get((domain, node.op_type), ()):
        value = input_of(node, at)
        if rank_of(value) == rank and _axis(value, 0) == 1 and _axis(first, 0) != 1:
            yield at


def _widened(builder: NodeBuilder, node: ir.Node, at: int) -> ir.Value:
    """Return an input with a row for each row of the node's first input."""
    first, value = node.inputs[0], node.inputs[at]
    assert first is not None
    assert value is not None
    rank = rank_of(value) or len(_ANGLES) + 1
    rows = builder.shape(first, 0, 1)
    shape = builder.op("Concat", [rows, builder.ints(*[1] * (rank - 1))], axis=0) if rank > 1 else rows
    return builder.op("Expand", [value, shape])


@dataclass(frozen=True, slots=True)
class _Mask:
    """The mask of an `Attention` node, and the operands that determine its whole shape, (B, H, L, S)."""

    builder: NodeBuilder
    value: ir.Value
    rank: int
    query: ir.Value
    key: ir.Value
    past: ir.Value | None

    @classmethod
    def of(cls, node: ir.Node, builder: NodeBuilder) -> _Mask | None:
        """Return the mask; None where there is none, or ranks are not known."""
        value, query, key = input_of(node, _MASK), input_of(node, 0), input_of(node, 1)
        if value is None or query is None or key is None or not rank_of(value):
            return None
        if rank_of(query) not in {3, 4} or rank_of(key) not in {3, 4}:
            return None
        return cls(builder, value, rank_of(value) or 0, query, key, input_of(node, _PAST_KEY))

    def whole(self) -> ir.Value | None:
        """Return the mask with every query and every key; None where it has them."""
        value, rank, builder = self.value, self.rank, self.builder
        if self._rows_first():
            value, rank = builder.unsqueeze(value, 1), 4
        queries = rank == 1 or (_axis(self.value, -2) == 1 and _axis(self.query, self._length_at(self.query)) != 1)
        keys, columns = _axis(self.key, self._length_at(self.key)), _axis(self.value, -1)
        few = isinstance(columns, int) and (keys != columns or self.past is not None)
        if few and builder.opset >= _PADS_MASKS:
            value = self._padded(value, rank)
        every = few and columns == 1 and builder.opset < _PADS_MASKS
        if queries or every:
            ones = [builder.ints(*[1] * (rank - 2))] if rank > 2 else []
            length = builder.shape(self.query, self._length_at(self.query), self._length_at(self.query) + 1)
            sizes = [*ones, length if queries else builder.ints(1), self._keys() if every else builder.ints(1)]
            value = builder.op("Expand", [value, builder.op("Concat", sizes, axis=0)])
        return None if value is self.value else value

    def _rows_first(self) -> bool:
        """Whether the first axis of a mask of rank 3 is the batch. The operator reads it as the heads."""
        rows = _axis(self.value, 0)
        named = isinstance(rows, ir.SymbolicDim) and rows.value is not None
        return self.rank == 3 and named and _same(rows, _axis(self.query, 0))

    def _length_at(self, value: ir.Value) -> int:
        return 2 if rank_of(value) == 4 else 1

    def _keys(self) -> ir.Value:
        """Return the number of keys, those of the past included, int64 of rank 1."""
        own = self.builder.shape(self.key, self._length_at(self.key), self._length_at(self.key) + 1)
        if self.past is None:
            return own
        return self.builder.op("Add", [own, self.builder.shape(self.past, 2, 3)])

    def _padded(self, value: ir.Value, rank: int) -> ir.Value:
        """Return the mask with a column for each key; the further ones hide theirs."""
        builder = self.builder
        columns = builder.shape(value, rank - 1, rank)
        behind = builder.op("Max", [builder.op("Sub", [self._keys(), columns]), builder.ints(0)])
        pads = builder.op("Concat", [builder.ints(*[0] * (2 * rank - 1)), behind], axis=0)
        dtype = self.value.dtype or ir.DataType.FLOAT
        hidden = np.array(dtype is not ir.DataType.BOOL and -np.inf, dtype.numpy())
        filler = builder.stored(f"attnserve.{dtype.name.lower()}.hidden", hidden)
        return builder.op("Pad", [value, pads, filler])


def _axis(value: ir.Value | None, at: int) -> int | ir.SymbolicDim | None:
    """Return the size or the symbol of an axis; None where it is not known."""
    shape = value.shape if value is not None else None
    return shape[at] if shape is not None and -len(shape) <= at < len(shape) else None


def _same(one: int | ir.SymbolicDim | None, other: int | ir.SymbolicDim | None) -> bool:
    """Whether two axes are known to have the same size."""
    if isinstance(one, ir.SymbolicDim):
        return one.value is not None and one == other
    return one is not None and one == other
