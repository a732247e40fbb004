"""Find table lookups in a graph: which inputs of a node are row numbers, and which tables an input's ids index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx
from onnx import numpy_helper

_KEEPS_IDS: Final = frozenset(("Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"))
"""Operators that pass ids on unchanged."""
_KEEPS_ROWS: Final = frozenset(("Cast", "CastLike", "DequantizeLinear", "Identity"))
"""Operators that keep the number of rows of a table."""
_ROWS_AT_ONCE: Final = 4096
"""Rows of a table that are converted to float32 together."""

Shape = tuple[int | str, ...] | None
"""Dimensions; a dynamic one is its symbol, or 0 without one. None: not known."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """One input of a node that holds row numbers of a table.

    Attributes:
        position: position of the input among the node's inputs.
        rows: number of rows of the table; an axis symbol if it is dynamic, 0 if it is not known.
        from_end: whether row numbers from -rows to -1 are valid too.
        column: for an input whose last axis holds tuples of row numbers, the position in the tuple; None for others.
        columns: length of that tuple; 1 for other inputs.
    """

    position: int
    rows: int | str
    from_end: bool = True
    column: int | None = None
    columns: int = 1


_TABLES: Final[dict[str, tuple[tuple[int, int, int], ...]]] = {
    # None of these tables may be indexed from the end. Positions of row numbers and table, and the axis of the table.
    "EmbedLayerNormalization": ((0, 2, 0), (1, 4, 0), (8, 3, 0)),
    "QEmbedLayerNormalization": ((0, 2, 0), (1, 4, 0)),
    "com.microsoft.RotaryEmbedding": ((1, 2, 0),),
    "RotaryEmbedding": ((3, 1, 0),),
}
_OF_AXIS: Final = {
    "Gather": "axis",
    "GatherElements": "axis",
    "ScatterElements": "axis",
    "GatherBlockQuantized": "gather_axis",
}
"""Operators whose second input indexes the first along an axis, and the attribute that names the axis."""
_OF_TUPLES: Final = frozenset(("GatherND", "ScatterND"))


def lookups_of(node: onnx.NodeProto, shapes: Sequence[Shape]) -> list[Lookup]:
    """Return the inputs of a node that hold row numbers.

    Args:
        node: a node of any operator.
        shapes: the shapes of its inputs, in their order.
    """
    attributes = {each.name: each.i for each in node.attribute if each.type == onnx.AttributeProto.INT}
    found: list[Lookup] = []
    tables = _TABLES.get(f"{node.domain}.{node.op_type}") or _TABLES.get(node.op_type, ())
    for numbers, table, axis in tables:
        rows = _dimension(shapes, table, axis)
        if numbers < len(node.input) and node.input[numbers]:
            found.append(Lookup(numbers, rows, from_end=False))
    if node.op_type in _OF_AXIS:
        found.append(Lookup(1, _dimension(shapes, 0, attributes.get(_OF_AXIS[node.op_type], 0))))
    if node.op_type in _OF_TUPLES:
        first = attributes.get("batch_dims", 0)
        tuples = shapes[1]
        columns = tuples[-1] if tuples and isinstance(tuples[-1], int) else 0
        found += [
            Lookup(1, _dimension(shapes, 0, first + column), column=column, columns=columns)
            for column in range(columns)
        ]
    return found


def _dimension(shapes: Sequence[Shape], at: int, axis: int) -> int | str:
    """Return the size of one axis of an input, or its symbol; 0 where it is not known."""
    shape = shapes[at] if at < len(shapes) else None
    if shape is None or not -len(shape) <= axis < len(shape):
        return 0
    return shape[axis]


def vocabulary_size_of(graph: onnx.GraphProto, ids: str) -> int:
    """Return the rows of the smallest table that the ids of an input index; 0 where no table is found.

    Follows the input through operators that pass ids on, to `Gather` nodes along the first axis of a constant, or of a
    cast or dequantized one. A table holds a number (a bias) or a vector for each id.
    """
    return min((table.dims[0] for table in _tables_of(graph, ids)), default=0)


def extreme_ids_of(graph: onnx.GraphProto, ids: str, count: int = 2) -> tuple[int, ...]:
    """Return the ids whose embeddings have the greatest and the least norms; none where no table is found.

    Args:
        graph: the graph whose input holds the ids.
        ids: the name of that input.
        count: number of ids with the greatest norms, and of those with the least.
    """
    tables = [table for table in _tables_of(graph, ids) if len(table.dims) == 2]
    if not tables:
        return ()
    table = min(tables, key=lambda each: each.dims[0])
    rows = numpy_helper.to_array(table)
    # In blocks, because a float32 copy of a float16 table may not fit into memory.
    blocks = (rows[start : start + _ROWS_AT_ONCE].astype(np.float32) for start in range(0, len(rows), _ROWS_AT_ONCE))
    norms = np.concatenate([np.linalg.norm(block, axis=1) for block in blocks])
    order = np.argsort(norms, kind="stable")
    return tuple(dict.fromkeys(int(token) for token in (*order[-count:], *order[:count])))


def _tables_of(graph: onnx.GraphProto, ids: str) -> list[onnx.TensorProto]:
    """Return the constants that `Gather` nodes index, along the first axis, with the ids of an input."""
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.dims}
    carrying = {ids}
    found: list[onnx.TensorProto] = []
    for node in graph.node:
        if node.op_type == "Constant":
            tensor = next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
            if tensor is not None and tensor.dims:
                constants[node.output[0]] = tensor
        elif node.op_type in _KEEPS_ROWS and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
        elif node.op_type in _KEEPS_IDS and node.input[0] in carrying:
            carrying.add(node.output[0])
        elif node.op_type == "Gather" and node.input[1] in carrying and node.input[0] in constants:
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
            if axis == 0:
                found.append(constants[node.input[0]])
    return found
