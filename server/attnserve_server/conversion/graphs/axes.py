"""Follow one axis of a value through the nodes of a graph, forwards or backwards, one node at a time.

Axes count from the end (-1 is the last), so that broadcasting leaves them alone. None is an axis that exists but whose
place is not known any more. An example, with heads folded into the batch; finders follow the axis of the keys, S, from
Softmax back to the MatMul that makes the scores, and forward to the MatMul with the values:

    MatMul      (B*H, L, S)     S is -1; it comes from the transposed keys       backward
    Reshape     (B, H, L, S)    S is -1; its size is kept, none is behind it       ^
    Add mask    (B, H, L, S)    S is -1; elementwise                                |
    Softmax     (B, H, L, S)    S is -1: the axis that softmax runs over          start
    Transpose   (B, H, S, L)    S is -2; perm = 0, 1, 3, 2                          |
    Unsqueeze   (B, H, S, L, 1) S is -3; axes = -1                                  v
    ...                                                                          forward

`forward` and `backward` take one such step. They know layouts only; contraction.py knows what a MatMul sums over.
Finders name the places in a graph that compute attention (sites). Nothing here raises.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction

import onnx_ir as ir

from attnserve_server.conversion.graphs.operators import STANDARD
from attnserve_server.conversion.graphs.walk import (
    ELEMENTWISE,
    axes_of,
    dimension_of,
    input_of,
    permutation_of,
    rank_of,
)

Axis = int | None

_INTEGER_ELEMENTWISE = {"QLinearAdd", "QLinearMul"}
"""onnxruntime's own, on integers: each operand is followed by its scale and its zero point."""
_QUANTIZERS = {"DequantizeLinear", "QuantizeLinear"}
"""Operators that onnxruntime has in its own domain too, for types that older opsets lack."""
_RESIZING = {"Concat", "Expand", "GatherElements", "Pad", "Slice", "Split", "Tile"}
"""Operators that may change the sizes of axes, and leave every axis in its place."""
_DATA_FIRST = {
    *("Cast", "CastLike", "Clip", "DequantizeLinear", "Div", "Dropout", "PRelu", "Pow", "QuantizeLinear"),
    *("ScatterElements", "ScatterND", "Trilu"),
}
"""Elementwise operators of which only the first input is passed on; the others are parameters."""


def carries_data(node: ir.Node, position: int) -> bool:
    """Return whether a node passes on the numbers of an input, rather than using it as a shape, index or condition."""
    if node.op_type == "Where":
        return position > 0
    if node.op_type in _INTEGER_ELEMENTWISE:
        return position in {0, 3}
    if node.op_type in ELEMENTWISE:
        return position == 0 or node.op_type not in _DATA_FIRST
    return position == 0 or node.op_type == "Concat"


def forward(node: ir.Node, position: int, axis: Axis) -> Axis | bool:
    """Return where an axis of an input is in the outputs.

    Returns:
        The axis; None where its place is not known; False where the node does more than pass the input on.
    """
    if node.domain not in _domains(node) or not carries_data(node, position):
        return False
    if _keeps_axes(node):
        return axis
    move = _MOVES.get(node.op_type)
    return move(node, axis, False) if move else False


def backward(node: ir.Node, axis: Axis) -> Iterator[tuple[ir.Value, Axis]]:
    """Yield the inputs that a node passes on, and where an axis of its output is in each; none where it does more."""
    move = _MOVES.get(node.op_type)
    if node.domain not in _domains(node) or (move is None and not _keeps_axes(node)):
        return
    for position, value in enumerate(node.inputs):
        if value is not None and carries_data(node, position):
            yield value, move(node, axis, True) if move else axis


def _keeps_axes(node: ir.Node) -> bool:
    return node.op_type in ELEMENTWISE or node.op_type in _RESIZING or node.op_type in _INTEGER_ELEMENTWISE


def _domains(node: ir.Node) -> tuple[str, ...]:
    """Return the domains in which an operator of this name is the one that this module knows."""
    if node.op_type in _QUANTIZERS:
        return (*STANDARD, "com.microsoft")
    return ("com.microsoft",) if node.op_type in _INTEGER_ELEMENTWISE else STANDARD


def _transpose(node: ir.Node, axis: Axis, back: bool) -> Axis:
    rank = rank_of(node.inputs[0]) or rank_of(node.outputs[0])
    order = permutation_of(node) or (list(range(rank))[::-1] if rank else [])
    if axis is None or not 1 <= -axis <= len(order):
        return None
    place = axis + len(order)
    return (order[place] if back else order.index(place)) - len(order)


def _reshape(node: ir.Node, axis: Axis, back: bool) -> Axis:  # noqa: ARG001 - it is the same both ways
    """Return the same place; None where sizes show that the axis is not kept, or where they state too little.

    An axis is kept where its size, and the products of the sizes in front of it and behind it, are. Two of the three
    imply the third, because a Reshape keeps the number of elements and their order. Sizes that are not known count as
    kept for the last two axes alone: many exporters compute shapes at run time, and conversion then measures the axes
    of a site's weights by runs and compares weights @ value with the graph.
    """
    if axis is None:
        return None
    source, result = _sizes(node.inputs[0]), _sizes(node.outputs[0])
    if source and result:
        if -axis > min(len(source), len(result)):
            return None
        at, to = len(source) + axis, len(result) + axis
        pairs = ((source[:at], result[:to]), ([source[at]], [result[to]]), (source[at + 1 :], result[to + 1 :]))
        ratios = [_ratio(one, other) for one, other in pairs]
        if any(ratio not in {1, None} for ratio in ratios):
            return None
        if sum(ratio == 1 for ratio in ratios) > 1:
            return axis
    known = all(dimension_of(node.inputs[0], place) is not None for place in range(axis, -2))
    return axis if known else None


def _sizes(value: ir.Value | None) -> list[int | str | None]:
    """Return the size of each axis: a number, a symbol, or None; empty where the rank is not known."""
    shape = value.shape if value is not None else None
    return [size if isinstance(size, int) else size.value for size in shape or ()]


def _ratio(sizes: list[int | str | None], others: list[int | str | None]) -> Fraction | None:
    """Return the ratio of two products, numbers or symbols; None where it depends on symbols, or is not known."""
    numbers = [math.prod(size for size in each if isinstance(size, int)) for each in (sizes, others)]
    symbols = [Counter(size for size in each if not isinstance(size, int)) for each in (sizes, others)]
    if symbols[0] != symbols[1] or None in symbols[0] or 0 in numbers:
        return None
    return Fraction(*numbers)


def _inserted(node: ir.Node, axis: Axis, back: bool) -> Axis:
    """Unsqueeze, and Squeeze in the other direction."""
    grows = node.op_type == "Unsqueeze"
    wide, narrow = (node.outputs[0], node.inputs[0]) if grows else (node.inputs[0], node.outputs[0])
    axes, rank = axes_of(node), rank_of(wide)
    if axis is None or axes is None:
        return None
    if rank is None:
        low = rank_of(narrow)
        rank = low + len(axes) if low is not None else None
    if rank is None:
        return axis if not grows and all(0 <= place < 2 for place in axes) else None
    ones = {place % rank for place in axes}
    kept = [place - rank for place in range(rank) if place not in ones]
    if grows != back:  # from narrow to wide
        return kept[axis] if -axis <= len(kept) else None
    return kept.index(axis) - len(kept) if axis in kept else None


def _gather(node: ir.Node, axis: Axis, back: bool) -> Axis:
    """Gather puts the axes of its index in the place of one axis."""
    index = input_of(node, 1)
    rank = rank_of(node.inputs[0])
    if axis is None or rank is None or index is None or index.shape is None:
        return None
    added = len(index.shape)
    at = node.attributes.get_int("axis", 0) % rank
    behind = rank - 1 - at
    if -axis <= behind:
        return axis
    if back:
        place = axis + (rank - 1 + added)
        return (place - rank) if place < at else (at - rank if added == 1 else None)
    place = axis + rank
    if place == at:
        return axis if added == 1 else None
    return place - (rank - 1 + added)


_MOVES: dict[str, Callable[[ir.Node, Axis, bool], Axis]] = {
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Unsqueeze": _inserted,
    "Squeeze": _inserted,
    "Gather": _gather,
}
"""Operators that move axes: given the node, the axis, and whether to go backwards, the axis on the other side."""
