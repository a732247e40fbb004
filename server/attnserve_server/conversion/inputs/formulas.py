"""Formulas of whole numbers: what a graph computes, element by element, of each number of an input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx

Numbers = npt.NDArray[np.float64]

MOST_REACH: Final = 1 << 22
"""Numbers that are tried on either side of 0, at most."""


@dataclass(frozen=True, slots=True)
class Formula:
    """A function of one whole number. `reach`: the sum of its constants' sizes; 0 for the number itself."""

    of: Callable[[Numbers], Numbers]
    reach: float = 0.0

    def __call__(self, numbers: Numbers) -> Numbers:
        """The function of each of some numbers."""
        return self.of(numbers)


THE_NUMBER: Final = Formula(lambda numbers: numbers)


def constant(number: float) -> Formula:
    """The formula that is the same for every number. One past all numbers that are tried counts as an infinity."""
    if abs(number) > MOST_REACH:
        return Formula(lambda numbers: np.full(numbers.shape, np.copysign(np.inf, number)))
    return Formula(lambda numbers: np.full(numbers.shape, number), abs(number))


def applied(node: onnx.NodeProto, operands: Sequence[Formula | None]) -> Formula | None:
    """An operator's formula, of those of its inputs; None where it has none, or is not of whole numbers.

    Args:
        node: of an operator that works element by element.
        operands: one for each input; None for an input that is left out.
    """
    compute = _OPERATORS.get(node.op_type)
    known = [operand for operand in operands if operand is not None]
    reach = sum(operand.reach for operand in known)
    if compute is None or reach > MOST_REACH:
        return None
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}

    def of(numbers: Numbers) -> Numbers:
        values = [None if operand is None else operand(numbers) for operand in operands]
        with np.errstate(invalid="ignore", divide="ignore"):  # infinities, which stand for great constants
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
"""Operators whose result is whole where what they are given is. Division and what follows it are not among them."""

ELEMENTWISE: Final = frozenset(_OPERATORS)
