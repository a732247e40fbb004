"""How many ids a graph knows: the rows of the table that its ids input looks up."""

from __future__ import annotations

import onnx

_PASSING = {"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Transpose"}
"""Operators that hand ids on as they are."""
_SAME_ROWS = {"Identity", "Cast", "CastLike", "DequantizeLinear"}
"""Operators that leave a table its rows."""


def vocabulary_size_of(graph: onnx.GraphProto, ids: str) -> int:
    """Rows of the smallest table that is looked up with the ids of this input; 0 where none can be found.

    Follows the input through operators that leave ids as they are, to `Gather` nodes along the first axis of a
    constant, or of what is cast or dequantised from one. A table may hold a number for each id, as a bias, or a vector.
    """
    rows = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.dims}
    carrying = {ids}
    found: list[int] = []
    for node in graph.node:
        if node.op_type == "Constant":
            tensor = next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
            if tensor is not None and tensor.dims:
                rows[node.output[0]] = tensor.dims[0]
        elif node.op_type in _SAME_ROWS and node.input[0] in rows:
            rows[node.output[0]] = rows[node.input[0]]
        elif node.op_type in _PASSING and node.input[0] in carrying:
            carrying.add(node.output[0])
        elif node.op_type == "Gather" and node.input[1] in carrying and node.input[0] in rows:
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
            if axis == 0:
                found.append(rows[node.input[0]])
    return min(found, default=0)
