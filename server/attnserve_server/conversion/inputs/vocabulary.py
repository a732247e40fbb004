"""What a graph knows of ids: the rows of the table that its ids input looks up, and which of them stand out."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

_PASSING = {"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Transpose"}
"""Operators that hand ids on as they are."""
_SAME_ROWS = {"Identity", "Cast", "CastLike", "DequantizeLinear"}
"""Operators that leave a table its rows."""
_BLOCK = 4096
"""Rows of a table that are measured at once."""


def vocabulary_size_of(graph: onnx.GraphProto, ids: str) -> int:
    """Rows of the smallest table that is looked up with the ids of this input; 0 where none can be found.

    Follows the input through operators that leave ids as they are, to `Gather` nodes along the first axis of a
    constant, or of what is cast or dequantised from one. A table may hold a number for each id, as a bias, or a vector.
    """
    return min((table.dims[0] for table in _tables_of(graph, ids)), default=0)


def extreme_ids_of(graph: onnx.GraphProto, ids: str, count: int = 2) -> tuple[int, ...]:
    """The ids with the greatest and with the least embeddings, `count` of each; none where no table can be found.

    Args:
        graph: whose input it is.
        ids: the name of an input of ids.
        count: of either kind.
    """
    tables = [table for table in _tables_of(graph, ids) if len(table.dims) == 2]
    if not tables:
        return ()
    table = min(tables, key=lambda each: each.dims[0])
    rows = numpy_helper.to_array(table)
    # In blocks: a table of float16 may fill half of the memory.
    blocks = (rows[start : start + _BLOCK].astype(np.float32) for start in range(0, len(rows), _BLOCK))
    norms = np.concatenate([np.linalg.norm(block, axis=1) for block in blocks])
    order = np.argsort(norms, kind="stable")
    return tuple(dict.fromkeys(int(token) for token in (*order[-count:], *order[:count])))


def _tables_of(graph: onnx.GraphProto, ids: str) -> list[onnx.TensorProto]:
    """The constants that `Gather` nodes look up along their first axis with the ids of an input."""
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.dims}
    carrying = {ids}
    found: list[onnx.TensorProto] = []
    for node in graph.node:
        if node.op_type == "Constant":
            tensor = next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
            if tensor is not None and tensor.dims:
                constants[node.output[0]] = tensor
        elif node.op_type in _SAME_ROWS and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
        elif node.op_type in _PASSING and node.input[0] in carrying:
            carrying.add(node.output[0])
        elif node.op_type == "Gather" and node.input[1] in carrying and node.input[0] in constants:
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
            if axis == 0:
                found.append(constants[node.input[0]])
    return found
