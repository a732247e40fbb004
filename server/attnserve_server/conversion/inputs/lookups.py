"""Operators that look rows up by numbers, and which numbers they take. Follows nothing through the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import onnx

Shape = tuple[int | str, ...] | None
"""Extents, the symbol of a dynamic one, 0 for one without; None: not known."""


@dataclass(frozen=True, slots=True)
class Lookup:
    """One input of a node that holds numbers of rows, which there are `rows` of: a symbol, or 0 where it is not known.

    `from_end`: numbers from -rows to -1 are legal too. `position`: of the input.

    `column` of `columns`: of an input that holds a tuple of numbers along its last axis, the place in it.
    """

    position: int
    rows: int | str
    from_end: bool = True
    column: int | None = None
    columns: int = 1


_TABLES: Final[dict[str, tuple[tuple[int, int, int], ...]]] = {
    # Operators with tables of their own, none of which counts from the end: (numbers, table, axis of the table).
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
"""Operators whose second input numbers rows of the first, by the attribute that names the axis."""
_OF_TUPLES: Final = frozenset(("GatherND", "ScatterND"))


def lookups_of(node: onnx.NodeProto, shapes: Sequence[Shape]) -> list[Lookup]:
    """The inputs of a node that hold row numbers of known bounds.

    Args:
        node: any node.
        shapes: of its inputs.
    """
    attributes = {each.name: each.i for each in node.attribute if each.type == onnx.AttributeProto.INT}
    found: list[Lookup] = []
    tables = _TABLES.get(f"{node.domain}.{node.op_type}") or _TABLES.get(node.op_type, ())
    for numbers, table, axis in tables:
        rows = _extent(shapes, table, axis)
        if numbers < len(node.input) and node.input[numbers]:
            found.append(Lookup(numbers, rows, from_end=False))
    if node.op_type in _OF_AXIS:
        found.append(Lookup(1, _extent(shapes, 0, attributes.get(_OF_AXIS[node.op_type], 0))))
    if node.op_type in _OF_TUPLES:
        first = attributes.get("batch_dims", 0)
        tuples = shapes[1]
        columns = tuples[-1] if tuples and isinstance(tuples[-1], int) else 0
        found += [
            Lookup(1, _extent(shapes, 0, first + column), column=column, columns=columns) for column in range(columns)
        ]
    return found


def _extent(shapes: Sequence[Shape], at: int, axis: int) -> int | str:
    """The extent of one axis of an input, or its symbol; 0 where it is not known."""
    shape = shapes[at] if at < len(shapes) else None
    if shape is None or not -len(shape) <= axis < len(shape):
        return 0
    return shape[axis]
