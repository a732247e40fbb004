"""Describe which numbers of the inputs a value of the graph holds, and what one node makes of them.

`Carried` describes a value and `Element` one number in it, with the formula by which the graph computed it from an
input's number. `started` describes an input; `elementwise`, `moved` and `chosen` describe the result of a node. They
return an empty tuple, or elements without columns, where the node's result has no formula or no known place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import numpy as np
import onnx

from attnserve_server.conversion.inputs.formulas import THE_NUMBER, Formula, applied, constant
from attnserve_server.domain.values import Array

_WHOLE_TYPES: Final = frozenset((2, 3, 4, 5, 6, 7, 12, 13))
"""ONNX's integer types."""
_MOST_COLUMNS: Final = 256
"""The most columns of an input that are followed separately."""


@dataclass(frozen=True, slots=True)
class Element:
    """What the graph computed from a number of one input.

    Attributes:
        input: its name.
        column: the column of the number along the input's last axis; None: any.
        formula: the number as the graph has it now, as a function of the input's.
        whole: whether it is an integer.
    """

    input: str
    column: int | None
    formula: Formula
    whole: bool = True


@dataclass(frozen=True, slots=True)
class Carried:
    """The elements that a value holds.

    Attributes:
        elements: in the order of the columns where `rank` is set, else in any order.
        layout: two values with the same layout hold the same elements at the same places.
        rank: of the value, where its last axis has one column for each element; else 0.
    """

    elements: tuple[Element, ...]
    layout: str
    rank: int = 0

    @property
    def mixed(self) -> bool:
        """Return whether elements of several columns are in the value at unknown places."""
        return not self.rank and len({element.column for element in self.elements}) > 1


def elementwise(
    node: onnx.NodeProto, known: Mapping[str, Carried], constants: Mapping[str, Array]
) -> tuple[Carried, ...]:
    """Return what an elementwise node carries, with its formula for each element; empty where there is none."""
    carried = [known[name] for name in node.input if name in known]
    if not carried or len({each.layout for each in carried}) > 1:
        return ()
    first = carried[0]
    elements: list[Element] = []
    for place, element in enumerate(first.elements):
        operands = [_operand(name, place, first, known, constants) if name else None for name in node.input]
        lacking = any(name and operand is None for name, operand in zip(node.input, operands, strict=True))
        whole = element.whole or (node.op_type == "Cast" and node.attribute[0].i in _WHOLE_TYPES)
        rounded = element.whole or node.op_type in {"Cast", "Clip", "Identity"}
        formula = None if lacking or not rounded else applied(node, operands)
        if formula is None:
            return ()
        elements.append(replace(element, formula=formula, whole=whole))
    return (Carried(tuple(elements), first.layout, first.rank),)


def _operand(
    name: str, place: int, beside: Carried, known: Mapping[str, Carried], constants: Mapping[str, Array]
) -> Formula | None:
    if name in known:
        return known[name].elements[place].formula
    array = constants.get(name)
    if array is None or array.dtype.kind not in "iufb" or not array.size:
        return None
    flat = array.reshape(-1)
    if (flat == flat[0]).all():
        return constant(float(flat[0]))
    in_columns = beside.rank >= array.ndim and array.shape[-1] == array.size == len(beside.elements)
    return constant(float(flat[place])) if in_columns else None


def moved(source: Carried, shape: tuple[int | str, ...], *, keeps: bool) -> Carried:
    """Return all elements at other places; still in columns where the last axis keeps its size."""
    rank = len(shape) if keeps and source.rank and shape[-1:] == (len(source.elements),) else 0
    return Carried(source.elements, "", rank)


def chosen(
    node: onnx.NodeProto, source: Carried, shapes: Mapping[str, tuple[int | str, ...]], constants: Mapping[str, Array]
) -> tuple[Carried, ...]:
    """Return the elements that a node selects: those of the columns that constants name, or of any."""
    if source.rank:
        columns = _columns(node, [constants.get(name) for name in node.input[1:]], source)
        if columns is not None:
            return tuple(
                Carried(tuple(source.elements[place] for place in places), "", rank) for places, rank in columns
            )
    if source.mixed:
        return ()
    keeps = node.op_type in {"Gather", "Slice", "Split"}
    return tuple(moved(source, shapes.get(output, ()), keeps=keeps) for output in node.output)


def _columns(node: onnx.NodeProto, numbers: list[Array | None], source: Carried) -> list[tuple[list[int], int]] | None:
    """Return, for each output, the columns of the last axis that it takes, and its rank if they stay an axis, else 0.

    None where constants do not name the columns, or the node selects along another axis.
    """
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    last, count, rank = {-1, source.rank - 1}, len(source.elements), source.rank
    if node.op_type in {"Gather", "Split"} and attributes.get("axis", 0) not in last:
        return None
    if node.op_type == "Gather" and numbers[0] is not None:
        places = np.arange(count)[numbers[0].reshape(-1)].tolist()
        return [(places, rank if numbers[0].ndim == 1 else 0)]
    if node.op_type == "Slice" and len(numbers) > 2 and all(each is not None for each in numbers):
        starts, ends, axes, *steps = (np.asarray(each).reshape(-1).tolist() for each in numbers)
        for at, axis in enumerate(axes):
            if axis in last:
                taken = slice(starts[at], ends[at], steps[0][at] if steps else 1)
                return [(list(range(count))[taken], rank)]
    if node.op_type == "Split":
        given = numbers[0] if numbers else attributes.get("split")
        size = -(-count // len(node.output))
        sizes = [size] * len(node.output) if given is None else np.asarray(given).reshape(-1).tolist()
        bounds = pairwise([0, *np.cumsum(sizes).tolist()])
        return [(list(range(count))[start:end], rank) for start, end in bounds]
    return None


def started(value: onnx.ValueInfoProto, *, whole: bool) -> Carried:
    """Return an input before any node: one element, or one for each column of a last axis of fixed size."""
    sizes = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
    if len(sizes) > 1 and 1 < sizes[-1] <= _MOST_COLUMNS:
        elements = tuple(Element(value.name, column, THE_NUMBER, whole) for column in range(sizes[-1]))
        return Carried(elements, value.name, rank=len(sizes))
    return Carried((Element(value.name, None, THE_NUMBER, whole),), value.name)
