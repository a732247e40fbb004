"""Find the tables of constants that the ids of an input index, and with them the size of its vocabulary.

Exporters may write arithmetic between the ids and the table, such as the wrap of negative ids, a clip, a remainder or
an offset. Ids are followed through it where each id still has its own row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx
from onnx import numpy_helper

from attnserve_server.conversion.graphs.operators import STANDARD
from attnserve_server.conversion.inputs.carried import Carried
from attnserve_server.conversion.inputs.following import Walk
from attnserve_server.conversion.inputs.formulas import Formula

_KEEPS_ROWS: Final = frozenset(("Cast", "CastLike", "DequantizeLinear", "Identity"))
"""Operators that keep the number of rows of a table."""
_ROWS_AT_ONCE: Final = 4096
"""Rows of a table that are converted to float32 together."""
_MOST_MOVED: Final = 16
"""The greatest offset between an id and its row."""


@dataclass(frozen=True, slots=True)
class _Table:
    """A table, and the row of id 0."""

    rows: onnx.TensorProto
    first: int = 0

    @property
    def vocabulary_size(self) -> int:
        return int(self.rows.dims[0]) - max(self.first, 0)


def vocabulary_size_of(graph: onnx.GraphProto, ids: str) -> int:
    """Return how many ids, from 0 on, have their own row in every table of an input; 0 where no table is found.

    Follows the input through operators that pass ids on, to `Gather` and `GatherND` nodes along the first axis of a
    constant, or of a cast or dequantized one. A table holds a number (a bias) or a vector for each id.
    """
    return min((table.vocabulary_size for table in _tables_of(graph, ids)), default=0)


def extreme_ids_of(graph: onnx.GraphProto, ids: str, count: int = 2) -> tuple[int, ...]:
    """Return the ids whose embeddings have the greatest and the least norms; none where no table is found.

    Args:
        graph: the graph whose input holds the ids.
        ids: the name of that input.
        count: number of ids with the greatest norms, and of those with the least.
    """
    tables = [table for table in _tables_of(graph, ids) if len(table.rows.dims) == 2]
    if not tables:
        return ()
    table = min(tables, key=lambda each: each.vocabulary_size)
    rows = numpy_helper.to_array(table.rows)[max(table.first, 0) :]
    # In blocks, because a float32 copy of a float16 table may not fit into memory.
    blocks = (rows[start : start + _ROWS_AT_ONCE].astype(np.float32) for start in range(0, len(rows), _ROWS_AT_ONCE))
    norms = np.concatenate([np.linalg.norm(block, axis=1) for block in blocks])
    order = np.argsort(norms, kind="stable")
    return tuple(dict.fromkeys(int(token) for token in (*order[-count:], *order[:count])))


def _tables_of(graph: onnx.GraphProto, ids: str) -> list[_Table]:
    """Return the constants that lookups index, along the first axis, with the ids of an input."""
    if not any(value.name == ids for value in graph.input):
        return []
    walk = Walk.of(graph, {ids: np.dtype(np.int64)})
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.dims}
    found: list[_Table] = []
    for node in graph.node:
        if node.domain not in STANDARD:
            continue
        if node.op_type == "Constant":
            tensor = next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
            if tensor is not None and tensor.dims:
                constants[node.output[0]] = tensor
        elif node.op_type in _KEEPS_ROWS and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
        elif _looks_rows_up(node, walk) and node.input[0] in constants and node.input[1] in walk.carried:
            table = constants[node.input[0]]
            first = _row_of_id_0(walk.carried[node.input[1]], int(table.dims[0]))
            if first is not None:
                found.append(_Table(table, first))
    return found


def _looks_rows_up(node: onnx.NodeProto, walk: Walk) -> bool:
    """Whether a node selects rows along the first axis of its first input, by one number each."""
    numbers = {each.name: each.i for each in node.attribute}
    if node.op_type == "Gather":
        return numbers.get("axis", 0) == 0
    indices = walk.shapes.get(node.input[1], ()) if len(node.input) > 1 else ()
    return node.op_type == "GatherND" and not numbers.get("batch_dims", 0) and indices[-1:] == (1,)


def _row_of_id_0(carried: Carried, rows: int) -> int | None:
    """Return the row of id 0, where each id has its own row, at a constant distance from it; else None."""
    moved = {_moved(element.formula, rows) for element in carried.elements}
    return moved.pop() if len(moved) == 1 else None


def _moved(formula: Formula, rows: int) -> int | None:
    """Return the distance between all ids and their rows; None where it is not the same for all."""
    # The ends may be clipped, or wrapped, and still be rows of the table.
    probed = np.arange(1, rows - 1, dtype=np.float64) if formula.reach else np.arange(2, dtype=np.float64)
    moved = np.unique(formula(probed) - probed)
    if len(moved) != 1 or not float(moved[0]).is_integer() or abs(moved[0]) > _MOST_MOVED:
        return None
    return int(moved[0])
