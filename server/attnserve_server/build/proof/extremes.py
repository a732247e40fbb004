"""Finds the ids whose embeddings are greatest and least: at padded positions they make scores as extreme as they get."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

import numpy as np
import onnx_ir as ir

_EACH: Final = 2
"""How many ids of each end are taken."""
_PASSED: Final = frozenset({"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten"})


def extreme_ids(graph: ir.Graph, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Ids with the longest and the shortest rows in the tables that inputs look up.

    Args:
        graph: with its constants.
        names: of inputs that hold ids.

    Returns:
        Ids by the name of the input; inputs whose table is not found are left out.
    """
    found: dict[str, tuple[int, ...]] = {}
    for value in graph.inputs:
        name = str(value.name)
        if name not in names:
            continue
        for table in _tables(value):
            lengths = np.linalg.norm(table.astype(np.float32), axis=-1)
            order = np.argsort(lengths)
            ends = [*order[-_EACH:], *order[:_EACH]]
            found[name] = tuple(dict.fromkeys(int(each) for each in ends))
            break
    return found


def _tables(value: ir.Value, depth: int = 4) -> Iterator[np.ndarray]:
    """Matrices of constants that are looked up with a value."""
    for node, at in value.uses():
        if node.op_type == "Gather" and at == 1 and node.inputs[0] is not None:
            content = node.inputs[0].const_value
            if content is not None and content.dtype.is_floating_point() and len(content.shape) == 2:
                yield content.numpy()
        elif node.op_type in _PASSED and depth and node.outputs:
            yield from _tables(node.outputs[0], depth - 1)
