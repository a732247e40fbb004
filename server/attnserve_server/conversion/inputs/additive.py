"""Finds inputs that are masks to be added: floats that reach attention scores by addition alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import onnx

from attnserve_server.conversion.inputs.constants import folded_by, small_initializers
from attnserve_server.domain.values import Array

_PASSING: Final = frozenset(
    ("Cast", "CastLike", "Clip", "Concat", "Dropout", "Expand", "Flatten", "Identity", "Max", "Min", "Reshape", "Slice")
) | {"Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
"""Operators that leave minus infinity what it is, or make a finite number of it."""
_ASKING: Final = frozenset(("Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Shape"))
"""Operators that only compare a mask, or read its shape."""
_ADDING: Final = frozenset(("Add", "Sum"))
_SCALING: Final = frozenset(("Mul", "Div"))
_SOFTMAXES: Final = frozenset(("Softmax", "LogSoftmax"))
_BIAS_OF: Final = {
    "Attention": 3,
    "com.microsoft.Attention": 5,
    "com.microsoft.GroupQueryAttention": 10,
    "com.microsoft.MultiHeadAttention": 5,
    "com.microsoft.PackedMultiHeadAttention": 6,
}
"""The input that an attention operator adds to its scores."""
_PRODUCTS: Final = frozenset(("Einsum", "FusedMatMul", "Gemm", "MatMul", "MatMulInteger"))
_BETWEEN: Final = _PASSING | _ADDING | _SCALING | {"Sub", "Tanh", "Where", "FusedMatMul"}
"""What may stand between the product of queries and keys and the place where a mask is added."""
_LOWEST_OF: Final[dict[int, float]] = {10: float(np.finfo(np.float16).min), 16: -float(2**127 * (2 - 2**-7))}
"""The lowest finite numbers of ONNX's types 10, float16, and 16, bfloat16, in which float32's is an infinity."""
_WHOLE: Final = frozenset((2, 3, 4, 5, 6, 7, 9, 12, 13))
"""ONNX's numbers of the types of integers and bools, which no mask is cast to that is added."""
_FAR: Final = 12
"""Nodes between that product and the mask, at most."""


@dataclass(slots=True)
class _Graph:
    nodes: list[onnx.NodeProto]
    outputs: frozenset[str]
    inner_outputs: frozenset[str]
    constants: dict[str, Array]
    makers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    readers: dict[str, list[tuple[onnx.NodeProto, int]]] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: onnx.GraphProto) -> _Graph:
        nodes = list(_all_nodes(graph))
        inner = frozenset(value.name for each in _inner(graph.node) for value in each.output)
        made = cls(nodes, frozenset(value.name for value in graph.output), inner, small_initializers(graph))
        made.constants |= {
            tensor.name: np.zeros(0) for tensor in graph.initializer if tensor.name not in made.constants
        }
        for node in nodes:
            for position, name in enumerate(node.input):
                made.readers.setdefault(name, []).append((node, position))
            made.makers |= dict.fromkeys(node.output, node)
            folded = folded_by(node, made.constants, {})
            if folded is not None:
                made.constants[node.output[0]] = folded
        return made

    def is_product(self, name: str, far: int = _FAR) -> bool:
        """Whether a value comes of a matrix product, through what scores go through."""
        node = self.makers.get(name)
        if node is None or not far:
            return False
        if node.op_type in _PRODUCTS:
            return True
        return node.op_type in _BETWEEN and any(self.is_product(each, far - 1) for each in node.input if each)

    def factor(self, node: onnx.NodeProto, position: int) -> float | None:
        """The greatest factor by which a node scales one of its inputs; None where it is no constant above 0."""
        arrays = [self.constants.get(name) for at, name in enumerate(node.input) if at != position]
        if node.op_type == "Div" and position:
            return None
        if any(each is None or not each.size or not ((each > 0) & np.isfinite(each)).all() for each in arrays):
            return None
        [array] = [each for each in arrays if each is not None]
        return float(1 / array.min() if node.op_type == "Div" else array.max())


def additive_masks_of(graph: onnx.GraphProto, inputs: Mapping[str, np.dtype[np.generic]]) -> dict[str, float]:
    """Those inputs of floats that are added to attention scores, and do nothing else; and what hides a key in each.

    Each way that such an input takes through the graph leads to an addition to a matrix product and on to a softmax, or
    to the bias of an attention operator. Minus infinity is then a mask, and hides what it is added to.

    Args:
        graph: of which inner graphs are followed too.
        inputs: types of inputs of floats, by name.

    Returns:
        By name the lowest number that stays finite on every way: of a row of it alone softmax makes no NaN, as it does
        of a row of infinities.
    """
    known = _Graph.of(graph)
    lowest = {name: _lowest(known, name, float(np.finfo(dtype.name).min)) for name, dtype in inputs.items()}
    return {name: number for name, number in lowest.items() if number is not None}


def _lowest(graph: _Graph, name: str, lowest: float) -> float | None:
    """The lowest number of a mask of such a type; None where the input is none."""
    waiting, seen, reached = [(name, False)], {(name, False)}, False
    while waiting:
        value, added = waiting.pop()
        if value in graph.inner_outputs or (value in graph.outputs and not added):
            return None
        for node, position in graph.readers.get(value, []):
            way = _way(graph, node, position, added=added)
            if way is None:
                return None
            reached |= way.reached
            lowest = max(lowest / max(way.factor, 1.0), way.lowest)
            following = {(output, way.added) for output in node.output if way.follows} - seen
            seen |= following
            waiting += following
    return lowest if reached else None


@dataclass(frozen=True, slots=True)
class _Way:
    """What a node does with a mask: its outputs are followed, it has been added to scores, it has reached a softmax.

    `lowest`: of the type that it is cast to; `factor`: by which it is scaled.
    """

    follows: bool
    added: bool = False
    reached: bool = False
    lowest: float = -np.inf
    factor: float = 1.0


def _way(graph: _Graph, node: onnx.NodeProto, position: int, *, added: bool) -> _Way | None:
    """The way on through one node that reads a mask; None where it does what is done to no mask."""
    kind = node.op_type if node.domain in {"", "ai.onnx"} else f"{node.domain}.{node.op_type}"
    others = [name for at, name in enumerate(node.input) if at != position and name]
    if kind in _BIAS_OF or kind in _SOFTMAXES:
        ends = added if kind in _SOFTMAXES else position == _BIAS_OF[kind]
        return _Way(follows=False, reached=True) if ends else None
    if kind in _ASKING:
        return _Way(follows=False)
    if kind in _SCALING:
        factor = graph.factor(node, position)
        return None if factor is None else _Way(follows=True, added=added, factor=factor)
    if kind in _ADDING:
        return _Way(follows=True, added=added or any(map(graph.is_product, others)))
    return _passed(node, position, added=added)


def _passed(node: onnx.NodeProto, position: int, *, added: bool) -> _Way | None:
    """The way through a node that leaves the mask's numbers what they are, or takes something from them."""
    kind = node.op_type if node.domain in {"", "ai.onnx"} else ""
    passes = kind in _PASSING and (position == 0 or kind in {"Concat", "Max", "Min"})
    to = next((each.i for each in node.attribute if each.name == "to"), 0) if kind == "Cast" else 0
    if to in _WHOLE or not (passes or (kind == "Where" and position > 0) or (kind == "Sub" and not position)):
        return None
    return _Way(follows=True, added=added, lowest=_LOWEST_OF.get(to, -np.inf))


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for inner in _inner([node]):
            yield from _all_nodes(inner)


def _inner(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    for node in nodes:
        for attribute in node.attribute:
            graphs = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else list(attribute.graphs)
            for graph in graphs:
                yield graph
                yield from _inner(graph.node)
