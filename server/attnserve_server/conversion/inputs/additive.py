"""Find inputs of floats that are additive masks: they only reach attention scores, by addition.

An example, and the ways that are followed from the input `mask` (B, T):

    mask -> Unsqueeze -> Cast -> Add(scores) -> Softmax     added, then a softmax: a mask
         -> Greater -> ...                                  only compared: allowed
         -> Mul by a constant above 0                       scaled: allowed, and the lowest finite number shrinks

An input that takes any other way, such as into a MatMul, is no mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import onnx

from attnserve_server.conversion.graphs.operators import STANDARD, subgraphs_of
from attnserve_server.conversion.inputs.formulas import folded_by, small_initializers
from attnserve_server.domain.values import Array

_PASSING: Final = frozenset(
    ("Cast", "CastLike", "Clip", "Concat", "Dropout", "Expand", "Flatten", "Identity", "Max", "Min", "Reshape", "Slice")
) | {"Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
"""Operators that keep minus infinity, or make it finite."""
_COMPARING: Final = frozenset(("Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Shape"))
"""Operators that compare a mask, or read its shape."""
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
"""By attention operator, the position of the input that it adds to the scores."""
_MATMULS: Final = frozenset(("Einsum", "FusedMatMul", "Gemm", "MatMul", "MatMulInteger"))
_BETWEEN: Final = _PASSING | _ADDING | _SCALING | {"Sub", "Tanh", "Where", "FusedMatMul"}
"""Operators that may be between the MatMul of queries and keys and the addition of a mask."""
_LOWEST_OF: Final[dict[int, float]] = {10: float(np.finfo(np.float16).min), 16: -float(2**127 * (2 - 2**-7))}
"""The lowest finite numbers of ONNX's types 10, float16, and 16, bfloat16, in which the lowest float32 is infinite."""
_WHOLE: Final = frozenset((2, 3, 4, 5, 6, 7, 9, 12, 13))
"""ONNX's types of integers and bools; a mask that is cast to one is not additive."""
_FAR: Final = 12
"""The most nodes between that MatMul and the mask."""


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
        inner = frozenset(value.name for each in _subgraphs(graph) for value in each.output)
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

    def has_scores(self, name: str, nodes_left: int = _FAR) -> bool:
        """Return whether a value is the result of a MatMul, possibly scaled or masked since."""
        node = self.makers.get(name)
        if node is None or not nodes_left:
            return False
        if node.op_type in _MATMULS:
            return True
        return node.op_type in _BETWEEN and any(self.has_scores(each, nodes_left - 1) for each in node.input if each)

    def factor(self, node: onnx.NodeProto, position: int) -> float | None:
        """Return the greatest factor by which a node scales an input; None where it is no constant above 0."""
        arrays = [self.constants.get(name) for at, name in enumerate(node.input) if at != position]
        if node.op_type == "Div" and position:
            return None
        if any(each is None or not each.size or not ((each > 0) & np.isfinite(each)).all() for each in arrays):
            return None
        [array] = [each for each in arrays if each is not None]
        return float(1 / array.min() if node.op_type == "Div" else array.max())


def additive_masks_of(graph: onnx.GraphProto, inputs: Mapping[str, np.dtype[np.generic]]) -> dict[str, float]:
    """Return the inputs that are additive masks, and the number that hides a key in each.

    On every way from the input, it is added to the result of a MatMul and reaches a softmax, or it is the bias of an
    attention operator. Minus infinity in such an input hides a key.

    Args:
        graph: the graph; its subgraphs are followed too.
        inputs: types of inputs of floats, by name.

    Returns:
        By name, the lowest number that stays finite on every way. Softmax of a row of it is finite, where a row of
        minus infinities would give NaN.
    """
    known = _Graph.of(graph)
    lowest = {name: _lowest(known, name, float(np.finfo(dtype.name).min)) for name, dtype in inputs.items()}
    return {name: number for name, number in lowest.items() if number is not None}


def _lowest(graph: _Graph, name: str, lowest: float) -> float | None:
    """Return the lowest finite number of a mask; None where the input is no additive mask."""
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
    """What one node does with a mask.

    Attributes:
        follows: whether the node's outputs hold the mask, and are followed.
        added: whether the mask has been added to scores, here or before.
        reached: whether the way ends here, at a softmax or an attention operator.
        lowest: the lowest finite number of the type that the node casts to.
        factor: the greatest factor by which the node scales the mask.
    """

    follows: bool
    added: bool = False
    reached: bool = False
    lowest: float = -np.inf
    factor: float = 1.0


def _way(graph: _Graph, node: onnx.NodeProto, position: int, *, added: bool) -> _Way | None:
    """Return the way through one node that reads a mask; None where masks are not used like that."""
    kind = node.op_type if node.domain in STANDARD else f"{node.domain}.{node.op_type}"
    others = [name for at, name in enumerate(node.input) if at != position and name]
    if kind in _BIAS_OF or kind in _SOFTMAXES:
        ends = added if kind in _SOFTMAXES else position == _BIAS_OF[kind]
        return _Way(follows=False, reached=True) if ends else None
    if kind in _COMPARING:
        return _Way(follows=False)
    if kind in _SCALING:
        factor = graph.factor(node, position)
        return None if factor is None else _Way(follows=True, added=added, factor=factor)
    if kind in _ADDING:
        return _Way(follows=True, added=added or any(map(graph.has_scores, others)))
    return _passed(node, position, added=added)


def _passed(node: onnx.NodeProto, position: int, *, added: bool) -> _Way | None:
    """Return the way through a node that moves, selects or casts the mask's numbers, or subtracts from them."""
    kind = node.op_type if node.domain in STANDARD else ""
    passes = kind in _PASSING and (position == 0 or kind in {"Concat", "Max", "Min"})
    to = next((each.i for each in node.attribute if each.name == "to"), 0) if kind == "Cast" else 0
    if to in _WHOLE or not (passes or (kind == "Where" and position > 0) or (kind == "Sub" and not position)):
        return None
    return _Way(follows=True, added=added, lowest=_LOWEST_OF.get(to, -np.inf))


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph, and behind each node those of its subgraphs."""
    for node in graph.node:
        yield node
        for inner in subgraphs_of(node):
            yield from _all_nodes(inner)


def _subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield the subgraphs of a graph, at any depth."""
    for node in _all_nodes(graph):
        yield from subgraphs_of(node)
