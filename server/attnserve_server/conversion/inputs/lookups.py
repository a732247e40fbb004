"""Find table lookups in a graph: which inputs of a node are row numbers, and how many rows their tables have.

A number of rows that is not known is 0. Nothing is raised for a node that is valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import onnx

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
