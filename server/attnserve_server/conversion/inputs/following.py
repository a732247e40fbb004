"""Follow the numbers of inputs through a graph, node by node, to every operator that looks rows up with them.

An example: which row of which table each number of `ids` (B, T) reads.

    ids           Carried: one element, the formula n -> n
    Sub ids, 1    Carried: one element, the formula n -> n - 1
    Max ..., 0    Carried: one element, the formula n -> max(n - 1, 0)
    Gather table  need: (that element, a table of 512 rows)      -> index_ranges.py: n may be -513 .. 512

Values that depend on an input in a way that has no formula are `tainted` with it; a lookup with such a value is `lost`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Final

import numpy as np
import onnx

from attnserve_server.conversion.graphs.operators import STANDARD, subgraphs_of
from attnserve_server.conversion.inputs.formulas import (
    ELEMENTWISE,
    THE_NUMBER,
    Formula,
    applied,
    constant,
    folded_by,
    small_initializers,
)
from attnserve_server.conversion.inputs.lookups import Lookup, lookups_of
from attnserve_server.domain.values import Array

_CHOOSING: Final = frozenset(("Gather", "GatherElements", "GatherND", "Slice", "Split"))
"""Operators whose result has some of the elements of their first input."""
_MOVING: Final = frozenset(
    ("CastLike", "Dropout", "Expand", "Flatten", "Pad", "Reshape", "Squeeze", "Tile", "Transpose", "Unsqueeze")
)
"""Operators whose result has all elements of their first input, at other places."""
_KEEPS_ROWS: Final = frozenset(("CastLike", "Dropout", "Expand", "Flatten", "Reshape", "Squeeze", "Unsqueeze"))
"""Of those, the ones that keep the columns of the last axis in order, if its size stays."""
_HAS_NO_INPUT_NUMBER: Final = frozenset(("Shape", "Size", "ArgMax", "ArgMin", "NonZero", "TopK", "Unique"))
"""Operators whose results are sizes, or positions that always exist."""
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


@dataclass(slots=True)
class Walk:
    """What is known of values, by name; nodes are added in the graph's order.

    Attributes:
        shapes: of values; a dynamic dimension is its symbol, or 0 without one.
        constants: small constants.
        carried: values with a formula for every element.
        tainted: values without, and the inputs that they depend on.
        needs: the elements that rows are looked up with.
        lost: the inputs that rows are looked up with by a tainted value.
    """

    shapes: Mapping[str, tuple[int | str, ...]]
    constants: dict[str, Array] = field(default_factory=dict)
    carried: dict[str, Carried] = field(default_factory=dict)
    tainted: dict[str, frozenset[str]] = field(default_factory=dict)
    needs: list[tuple[Element, Lookup]] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, graph: onnx.GraphProto, inputs: Mapping[str, np.dtype[np.generic]]) -> Walk:
        """Walk through a whole graph, following these inputs (types by name)."""
        walk = cls(_shapes(graph), small_initializers(graph))
        for value in graph.input:
            if value.name in inputs:
                walk.carried[value.name] = _start(value, whole=inputs[value.name].kind != "f")
        for node in graph.node:
            walk.take(node)
        return walk

    def take(self, node: onnx.NodeProto) -> None:
        """Add one node and its subgraphs, which may read the outer values."""
        shapes = [
            self.constants[name].shape if name in self.constants else self.shapes.get(name) for name in node.input
        ]
        for lookup in lookups_of(node, shapes):
            self._look_up(node.input[lookup.position], lookup)
        sources = frozenset[str]().union(*(self._inputs_of(name) for name in node.input))
        for inner in subgraphs_of(node):
            self._enter(node, inner, sources)
        folded = folded_by(node, self.constants, self.shapes)
        if folded is not None:
            self.constants[node.output[0]] = folded
        if folded is not None or node.op_type in _HAS_NO_INPUT_NUMBER:
            return
        result = self._result(node)
        for at, output in enumerate(node.output):
            if at < len(result):
                self.carried[output] = replace(result[at], layout=result[at].layout or output)
            elif sources:
                self.tainted[output] = sources

    def _enter(self, node: onnx.NodeProto, inner: onnx.GraphProto, sources: frozenset[str]) -> None:
        """Add a subgraph. Scan passes whole elements to its body; what a Loop passes on changes between rounds."""
        self.constants |= small_initializers(inner)
        scanned = next((each.i for each in node.attribute if each.name == "num_scan_inputs"), 0)
        for at, value in enumerate(inner.input):
            known = self.carried.get(node.input[at]) if at < len(node.input) else None
            if known is not None and at >= len(node.input) - scanned and not known.rank:
                self.carried[value.name] = replace(known, layout=value.name)
            elif sources:
                self.tainted[value.name] = sources
        for each in inner.node:
            self.take(each)

    def _inputs_of(self, name: str) -> frozenset[str]:
        known = self.carried.get(name)
        return self.tainted.get(name, frozenset()) if known is None else frozenset(e.input for e in known.elements)

    def _look_up(self, name: str, lookup: Lookup) -> None:
        known = self.carried.get(name)
        elements = () if known is None or not lookup.rows else known.elements
        if known is not None and lookup.column is not None and lookup.columns > 1:
            apart = known.rank and len(known.elements) == lookup.columns
            elements = elements[lookup.column : lookup.column + 1] if apart else ()
        if not elements:
            self.lost |= self._inputs_of(name)
        self.needs += [(element, lookup) for element in elements]

    def _result(self, node: onnx.NodeProto) -> tuple[Carried, ...]:
        """Return what each output carries, with layout "" where it is a new one; empty where there is no formula."""
        if node.domain not in STANDARD:
            return ()
        if node.op_type in ELEMENTWISE:
            return self._elementwise(node)
        if node.op_type == "Concat":
            parts = [self.carried[name] for name in node.input if name in self.carried]
            followed = not any(name in self.tainted for name in node.input)
            elements = tuple(element for part in parts for element in part.elements)
            return (Carried(elements, ""),) if parts and followed else ()
        source = self.carried.get(node.input[0]) if node.input else None
        if source is None or node.op_type not in _CHOOSING | _MOVING:
            return ()
        if node.op_type in _CHOOSING:
            return self._chosen(node, source)
        return (self._moved(source, node.output[0], keeps=node.op_type in _KEEPS_ROWS),)

    def _moved(self, source: Carried, output: str, *, keeps: bool) -> Carried:
        """Return all elements at other places; still in columns where the last axis keeps its size."""
        shape = self.shapes.get(output, ())
        rank = len(shape) if keeps and source.rank and shape[-1:] == (len(source.elements),) else 0
        return Carried(source.elements, "", rank)

    def _chosen(self, node: onnx.NodeProto, source: Carried) -> tuple[Carried, ...]:
        """Return the elements that a node selects: those of the columns that constants name, or of any."""
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        if source.rank:
            numbers = [self.constants.get(name) for name in node.input[1:]]
            columns = _columns(node, attributes, numbers, source)
            if columns is not None:
                return tuple(
                    Carried(tuple(source.elements[place] for place in places), "", rank) for places, rank in columns
                )
        if source.mixed:
            return ()
        keeps = node.op_type in {"Gather", "Slice", "Split"}
        return tuple(self._moved(source, output, keeps=keeps) for output in node.output)

    def _elementwise(self, node: onnx.NodeProto) -> tuple[Carried, ...]:
        carried = [self.carried[name] for name in node.input if name in self.carried]
        if not carried or len({each.layout for each in carried}) > 1:
            return ()
        first = carried[0]
        elements: list[Element] = []
        for place, element in enumerate(first.elements):
            operands = [self._operand(name, place, first) if name else None for name in node.input]
            lacking = any(name and operand is None for name, operand in zip(node.input, operands, strict=True))
            whole = element.whole or (node.op_type == "Cast" and node.attribute[0].i in _WHOLE_TYPES)
            rounded = element.whole or node.op_type in {"Cast", "Clip", "Identity"}
            formula = None if lacking or not rounded else applied(node, operands)
            if formula is None:
                return ()
            elements.append(replace(element, formula=formula, whole=whole))
        return (Carried(tuple(elements), first.layout, first.rank),)

    def _operand(self, name: str, place: int, beside: Carried) -> Formula | None:
        if name in self.carried:
            return self.carried[name].elements[place].formula
        array = self.constants.get(name)
        if array is None or array.dtype.kind not in "iufb" or not array.size:
            return None
        flat = array.reshape(-1)
        if (flat == flat[0]).all():
            return constant(float(flat[0]))
        in_columns = beside.rank >= array.ndim and array.shape[-1] == array.size == len(beside.elements)
        return constant(float(flat[place])) if in_columns else None


def _columns(
    node: onnx.NodeProto, attributes: Mapping[str, Any], numbers: list[Array | None], source: Carried
) -> list[tuple[list[int], int]] | None:
    """Return, for each output, the columns of the last axis that it takes, and its rank if they stay an axis, else 0.

    None where constants do not name the columns, or the node selects along another axis.
    """
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


def _start(value: onnx.ValueInfoProto, *, whole: bool) -> Carried:
    """Return an input before any node: one element, or one for each column of a last axis of fixed size."""
    sizes = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
    if len(sizes) > 1 and 1 < sizes[-1] <= _MOST_COLUMNS:
        elements = tuple(Element(value.name, column, THE_NUMBER, whole) for column in range(sizes[-1]))
        return Carried(elements, value.name, rank=len(sizes))
    return Carried((Element(value.name, None, THE_NUMBER, whole),), value.name)


def _shapes(graph: onnx.GraphProto) -> dict[str, tuple[int | str, ...]]:
    """Return shapes by name; a dynamic dimension is its symbol, or 0 without one."""
    shapes: dict[str, tuple[int | str, ...]] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info):
        if value.name not in shapes and value.type.tensor_type.HasField("shape"):
            shapes[value.name] = tuple(
                axis.dim_value or axis.dim_param or 0 for axis in value.type.tensor_type.shape.dim
            )
    return shapes
