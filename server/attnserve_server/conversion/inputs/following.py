"""Follow the numbers of inputs through a graph, node by node, to every operator that looks rows up with them.

An example: which row of which table each number of `ids` (B, T) reads.

    ids           Carried: one element, the formula n -> n
    Sub ids, 1    Carried: one element, the formula n -> n - 1
    Max ..., 0    Carried: one element, the formula n -> max(n - 1, 0)
    Gather table  need: (that element, a table of 512 rows)      -> index_ranges.py: n may be -513 .. 512

Values that depend on an input in a way that has no formula are `tainted` with it; a lookup with such a value is `lost`.
Nothing raises for a graph that onnx has checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import onnx

from attnserve_server.conversion.graphs.operators import STANDARD, subgraphs_of
from attnserve_server.conversion.inputs.carried import Carried, Element, chosen, elementwise, moved, started
from attnserve_server.conversion.inputs.formulas import ELEMENTWISE, folded_by, small_initializers
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
                walk.carried[value.name] = started(value, whole=inputs[value.name].kind != "f")
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
            return elementwise(node, self.carried, self.constants)
        if node.op_type == "Concat":
            parts = [self.carried[name] for name in node.input if name in self.carried]
            followed = not any(name in self.tainted for name in node.input)
            elements = tuple(element for part in parts for element in part.elements)
            return (Carried(elements, ""),) if parts and followed else ()
        source = self.carried.get(node.input[0]) if node.input else None
        if source is None or node.op_type not in _CHOOSING | _MOVING:
            return ()
        if node.op_type in _CHOOSING:
            return chosen(node, source, self.shapes, self.constants)
        return (moved(source, self.shapes.get(node.output[0], ()), keeps=node.op_type in _KEEPS_ROWS),)


def _shapes(graph: onnx.GraphProto) -> dict[str, tuple[int | str, ...]]:
    """Return shapes by name; a dynamic dimension is its symbol, or 0 without one."""
    shapes: dict[str, tuple[int | str, ...]] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info):
        if value.name not in shapes and value.type.tensor_type.HasField("shape"):
            shapes[value.name] = tuple(
                axis.dim_value or axis.dim_param or 0 for axis in value.type.tensor_type.shape.dim
            )
    return shapes
