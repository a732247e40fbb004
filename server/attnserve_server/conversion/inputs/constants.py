"""Small constants of a graph: initializers, `Constant` nodes, and what a few operators make of them alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import onnx
from onnx import numpy_helper

from attnserve_server.conversion.inputs.formulas import ELEMENTWISE, applied, constant
from attnserve_server.domain.values import Array

MOST: Final = 4096
"""Numbers in a constant that is kept."""
_ONE_NUMBER_STAYS: Final = frozenset(("Expand", "Flatten", "Reshape", "Squeeze", "Tile", "Transpose", "Unsqueeze"))
"""Operators that leave a constant of one number the same number, repeated or not."""


def small_initializers(graph: onnx.GraphProto) -> dict[str, Array]:
    """Initializers by name."""
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if np.prod(tensor.dims, dtype=int) <= MOST and tensor.data_location != onnx.TensorProto.EXTERNAL
    }


def folded_by(
    node: onnx.NodeProto, constants: Mapping[str, Array], shapes: Mapping[str, tuple[int | str, ...]]
) -> Array | None:
    """The node's first output, where constants alone make it; a constant of one number stands for any shape of it.

    Args:
        node: of any operator.
        constants: by name.
        shapes: of values by name, a symbol or 0 for a dynamic extent.
    """
    if node.domain not in {"", "ai.onnx"}:
        return None
    if node.op_type == "Constant":
        return _written(node)
    if node.op_type == "ConstantOfShape":
        return next((numpy_helper.to_array(each.t) for each in node.attribute), np.zeros(1)).reshape(())
    if node.op_type == "Shape":
        extents = shapes.get(node.input[0], (0,))
        known = all(isinstance(extent, int) and extent for extent in extents)
        return np.array(extents) if known and not node.attribute else None
    arrays = [constants[name] for name in node.input if name in constants]
    return _made(node, arrays) if arrays and node.input[0] in constants else None


def _written(node: onnx.NodeProto) -> Array | None:
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        array = numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.array(value)
        if attribute.name.startswith("value") and array.dtype.kind in "iufb" and array.size <= MOST:
            return array
    return None


def _made(node: onnx.NodeProto, arrays: list[Array]) -> Array | None:
    first = arrays[0]
    if node.op_type in {"Cast", "Identity"}:
        return first
    if first.size == 1 and node.op_type in _ONE_NUMBER_STAYS:
        return first.reshape(())
    if len(arrays) != len(node.input):
        return None
    if node.op_type == "Gather" and first.ndim == 1 and arrays[1].size == 1:
        return np.asarray(first[int(arrays[1].reshape(-1)[0])])
    if node.op_type in ELEMENTWISE and all(each.size == 1 for each in arrays):
        formula = applied(node, [constant(float(each.reshape(-1)[0])) for each in arrays])
        return None if formula is None else formula(np.zeros(1)).reshape(())
    return None
