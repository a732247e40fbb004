"""Find the inputs of a graph that hold a cache, by how the graph uses them: `find_pasts`.

A cache precedes new keys or values along one axis, joined by a Concat or inside an attention operator. The result is
attended to, and it is an output, which continues the cache. An input with a cache's name may lack one of these two.
Nothing is run or changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from attnserve_server.conversion.graphs.operators import STANDARD
from attnserve_server.conversion.graphs.walk import is_constant, permutation_of

PAST_INPUTS: Final[Mapping[tuple[str, str], Mapping[int, int]]] = {
    ("com.microsoft", "GroupQueryAttention"): {3: 1, 4: 2},
    ("com.microsoft", "MultiHeadAttention"): {6: 1, 7: 2},
    ("", "Attention"): {4: 1, 5: 2},
}
"""By attention operator: the position of each input of past keys or values, and that of the output that continues it.
All have the axes (B, H, P, D). Source: the schemas of onnxruntime 1.32, and ONNX operators, Attention-23."""
_POSITIONS_OF_OPERATORS: Final = 2
_NAMED = re.compile(r"(?:^|[._])(?:past|cache)", re.IGNORECASE)
_PRODUCTS = {"FusedMatMul", "MatMul", "MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul"}
_ATTENTION = {"Attention", "MultiHeadAttention"}
_KEPT = {
    *("Cast", "Concat", "DequantizeLinear", "Div", "DynamicQuantizeLinear", "Expand", "Identity", "Mul"),
    *("QuantizeLinear", "Reshape", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
}
"""Operators between joined keys or values and the product with queries or weights."""
_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}


@dataclass(frozen=True, slots=True)
class Use:
    """A node that uses an input, directly or through nodes that only move its axes.

    Attributes:
        node: the node.
        index: the position among the inputs of the node.
        order: the axis of the input that each axis of the used value is.
    """

    node: ir.Node
    index: int
    order: tuple[int, ...]

    @property
    def joined_axis(self) -> int | None:
        """The axis of the input along which the node joins it with others; None for nodes that do not."""
        if self.node.op_type == "Concat" and self.index == 0:
            return self.order[self.node.attributes.get_int("axis", 0)]
        return self.order[_POSITIONS_OF_OPERATORS] if self.present_index is not None else None

    @property
    def present_index(self) -> int | None:
        """Which output of an attention operator continues the cache; None for other nodes."""
        domain = "" if self.node.domain in STANDARD else self.node.domain
        return PAST_INPUTS.get((domain, self.node.op_type), {}).get(self.index)


@dataclass(frozen=True, slots=True)
class FoundPast:
    """An input that holds past keys or values.

    Attributes:
        value: the input.
        axis: its axis of positions, with the batch counted.
        uses: every use of it.
        present: the output that continues it; None if the graph returns none.
        crossed: whether it holds keys or values of an encoder, which nothing is joined with.
    """

    value: ir.Value
    axis: int
    uses: tuple[Use, ...]
    present: ir.Value | None
    crossed: bool = False


def find_pasts(graph: ir.Graph) -> tuple[FoundPast, ...]:
    """Return the inputs that hold a cache, in their order; empty for a graph without one.

    Beside a cache of the decoder's own keys and values, an input with a cache's name that is attended to as it is holds
    keys or values of an encoder.
    """
    values = [value for value in graph.inputs if value.const_value is None and _may_hold_keys(value)]
    found = {value: _found(value) for value in values}
    if any(found.values()):
        found |= {value: _crossed(value) for value, past in found.items() if past is None}
    return tuple(past for past in found.values() if past is not None)


def is_named_past(name: str) -> bool:
    """Return whether an input's name is one of a cache, such as `past_key_values.0.key`, `past_0` or `cache_k`."""
    return _NAMED.search(name) is not None


def is_named_present(name: str) -> bool:
    """Return whether an output's name is one that continues a cache, such as `present.0.key` or `present_key_0`."""
    return re.match(r"present(?:_keys?|_values?|_key_values)?[._]", name) is not None


def _may_hold_keys(value: ir.Value) -> bool:
    return value.dtype in _FLOATS and value.shape is not None and len(value.shape) > 2


def _found(value: ir.Value) -> FoundPast | None:
    assert value.shape is not None
    uses = tuple(_uses(value, tuple(range(len(value.shape)))))
    if not all(use.node.op_type == "Shape" or use.joined_axis is not None for use in uses):
        return None
    axes = {use.joined_axis for use in uses} - {None}
    if len(axes) != 1:
        return None
    [axis] = axes
    assert axis is not None
    if isinstance(value.shape[axis], int):
        return None  # a buffer of a fixed length, such as that of a convolution, is never empty
    presents = [present for use in uses for present in _presents(use)]
    attended = any(_attended(_joined(use)) for use in uses) or any(use.present_index is not None for use in uses)
    if bool(presents) + is_named_past(str(value.name)) + attended < 2:
        return None
    return FoundPast(value, axis, uses, presents[0] if presents else None)


def _crossed(value: ir.Value) -> FoundPast | None:
    assert value.shape is not None
    axes = [axis for axis, size in enumerate(value.shape) if axis and not isinstance(size, int)]
    if len(axes) != 1 or not is_named_past(str(value.name)) or not _attended([value]):
        return None
    return FoundPast(value, axes[0], (), None, crossed=True)


def _uses(value: ir.Value, order: tuple[int, ...]) -> Iterator[Use]:
    for node, index in value.uses():
        if node.op_type in {"Identity", "Cast"}:
            yield from _uses(node.outputs[0], order)
        elif node.op_type == "Transpose":
            moved = permutation_of(node) or list(reversed(range(len(order))))
            yield from _uses(node.outputs[0], tuple(order[axis] for axis in moved))
        else:
            yield Use(node, index, order)


def _joined(use: Use) -> list[ir.Value]:
    """Return the joined keys or values of a node; empty where it joins none, or joins them inside."""
    return [use.node.outputs[0]] if use.joined_axis is not None and use.present_index is None else []


def _attended(values: list[ir.Value]) -> bool:
    """Return whether one of these values is multiplied with another activation, as attention multiplies keys."""
    waiting, seen = [*values], set[ir.Value]()
    while waiting:
        value = waiting.pop()
        seen.add(value)
        for node, index in value.uses():
            if node.op_type in _PRODUCTS and not any(is_constant(each) for each in node.inputs[:2]):
                return True
            if (node.op_type in _ATTENTION and index in {1, 2}) or node.op_type == "Einsum":
                return True
            if node.op_type in _KEPT:
                waiting.extend(output for output in node.outputs if output not in seen)
    return False


def _presents(use: Use) -> Iterator[ir.Value]:
    """Yield the outputs of the graph that a node's joined keys or values are, through nodes that only move axes."""
    if use.joined_axis is None or (use.present_index or 0) >= len(use.node.outputs):
        return
    waiting = [use.node.outputs[use.present_index or 0]]
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            yield value
        waiting.extend(node.outputs[0] for node, _ in value.uses() if node.op_type in {"Identity", "Cast", "Transpose"})
