"""Evaluate parts of a graph without running it: elementwise formulas of whole numbers, and small constants.

A formula maps each number of an input to the row number that the graph computes from it. A constant is an initializer,
a `Constant` node, or what a few operators compute from constants alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from attnserve_server.conversion.graphs.operators import STANDARD
from attnserve_server.domain.values import Array

Numbers = npt.NDArray[np.float64]

MOST_REACH: Final = 1 << 22
"""The greatest |number| for which a formula is evaluated."""
_MOST_IN_A_CONSTANT: Final = 4096
"""Numbers of a constant that is kept, at most."""
_KEEPS_ONE_NUMBER: Final = frozenset(("Expand", "Flatten", "Reshape", "Squeeze", "Tile", "Transpose", "Unsqueeze"))
"""Operators that repeat a constant of one number, or leave it alone."""


@dataclass(frozen=True, slots=True)
class Formula:
    """A function of one whole number. `reach`: the sum of its |constants|; 0 for the identity."""

    of: Callable[[Numbers], Numbers]
    reach: float = 0.0

    def __call__(self, numbers: Numbers) -> Numbers:
        """Evaluate the function for each number."""
        return self.of(numbers)


THE_NUMBER: Final = Formula(lambda numbers: numbers)


def constant(number: float) -> Formula:
    """Return the formula that is `number` everywhere; an infinity where |number| is above `MOST_REACH`."""
    if abs(number) > MOST_REACH:
        return Formula(lambda numbers: np.full(numbers.shape, np.copysign(np.inf, number)))
    return Formula(lambda numbers: np.full(numbers.shape, number), abs(number))


def applied(node: onnx.NodeProto, operands: Sequence[Formula | None]) -> Formula | None:
    """Return the formula of a node's result; None where the result may not be a whole number.

    Args:
        node: of an elementwise operator.
        operands: the formula of each input; None for an input that is left out.
    """
    compute = _OPERATORS.get(node.op_type)
    known = [operand for operand in operands if operand is not None]
    reach = sum(operand.reach for operand in known)
    if compute is None or reach > MOST_REACH:
        return None
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}

    def of(numbers: Numbers) -> Numbers:
        values = [None if operand is None else operand(numbers) for operand in operands]
        with np.errstate(invalid="ignore", divide="ignore"):  # infinities, which replace large constants
            return np.asarray(compute(values, attributes), dtype=np.float64)

    return Formula(of, reach)


def _clip(values: Sequence[Any], attributes: Mapping[str, Any]) -> Numbers:
    number, least, greatest = [*values, None, None][:3]
    least = attributes.get("min", -np.inf) if least is None else least
    greatest = attributes.get("max", np.inf) if greatest is None else greatest
    return np.asarray(np.minimum(np.maximum(number, least), greatest))


def _cast(values: Sequence[Any], attributes: Mapping[str, Any]) -> Numbers:
    return np.asarray(values[0] != 0) if attributes.get("to") == onnx.TensorProto.BOOL else np.trunc(values[0])


def _mod(values: Sequence[Any], attributes: Mapping[str, Any]) -> Numbers:
    return np.asarray((np.fmod if attributes.get("fmod") else np.mod)(*values))


def _by(function: Callable[..., Any]) -> Callable[[Sequence[Any], Mapping[str, Any]], Any]:
    return lambda values, _: function(*values)


_OPERATORS: Final[dict[str, Callable[[Sequence[Any], Mapping[str, Any]], Any]]] = {
    "Abs": _by(np.abs),
    "Add": _by(np.add),
    "And": _by(lambda one, other: (one != 0) & (other != 0)),
    "Cast": _cast,
    "Clip": _clip,
    "Equal": _by(np.equal),
    "Greater": _by(np.greater),
    "GreaterOrEqual": _by(np.greater_equal),
    "Identity": _by(lambda one: one),
    "Less": _by(np.less),
    "LessOrEqual": _by(np.less_equal),
    "Max": _by(lambda *values: np.maximum.reduce(values)),
    "Min": _by(lambda *values: np.minimum.reduce(values)),
    "Mod": _mod,
    "Mul": _by(np.multiply),
    "Neg": _by(np.negative),
    "Not": _by(lambda one: one == 0),
    "Or": _by(lambda one, other: (one != 0) | (other != 0)),
    "Sub": _by(np.subtract),
    "Where": _by(lambda chosen, one, other: np.where(chosen != 0, one, other)),
}
"""Elementwise operators whose result is whole where their inputs are. Division is none."""

ELEMENTWISE: Final = frozenset(_OPERATORS)


def small_initializers(graph: onnx.GraphProto) -> dict[str, Array]:
    """Return the initializers of at most 4,096 numbers, by name."""
    return {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if np.prod(tensor.dims, dtype=int) <= _MOST_IN_A_CONSTANT and tensor.data_location != onnx.TensorProto.EXTERNAL
    }


def folded_by(
    node: onnx.NodeProto, constants: Mapping[str, Array], shapes: Mapping[str, tuple[int | str, ...]]
) -> Array | None:
    """Return the first output of a node that computes it from constants alone; None for any other.

    A constant that repeats one number is returned as that number, with shape ().

    Args:
        node: of any operator.
        constants: by name.
        shapes: of values by name; a dynamic dimension is its symbol, or 0 without one.
    """
    if node.domain not in STANDARD:
        return None
    if node.op_type == "Constant":
        return _written(node)
    if node.op_type == "ConstantOfShape":
        return next((numpy_helper.to_array(each.t) for each in node.attribute), np.zeros(1)).reshape(())
    if node.op_type == "Shape":
        shape = shapes.get(node.input[0], (0,))
        known = all(isinstance(dimension, int) and dimension for dimension in shape)
        return np.array(shape) if known and not node.attribute else None
    arrays = [constants[name] for name in node.input if name in constants]
    return _made(node, arrays) if arrays and node.input[0] in constants else None


def _written(node: onnx.NodeProto) -> Array | None:
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        array = numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.array(value)
        if attribute.name.startswith("value") and array.dtype.kind in "iufb" and array.size <= _MOST_IN_A_CONSTANT:
            return array
    return None


def _made(node: onnx.NodeProto, arrays: list[Array]) -> Array | None:
    first = arrays[0]
    if node.op_type in {"Cast", "Identity"}:
        return first
    if first.size == 1 and node.op_type in _KEEPS_ONE_NUMBER:
        return first.reshape(())
    if len(arrays) != len(node.input):
        return None
    if node.op_type == "Gather" and first.ndim == 1 and arrays[1].size == 1:
        return np.asarray(first[int(arrays[1].reshape(-1)[0])])
    if node.op_type in ELEMENTWISE and all(each.size == 1 for each in arrays):
        formula = applied(node, [constant(float(each.reshape(-1)[0])) for each in arrays])
        return None if formula is None else formula(np.zeros(1)).reshape(())
    return None
