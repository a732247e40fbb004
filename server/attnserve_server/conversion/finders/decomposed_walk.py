"""How an axis fares through the nodes of a graph, one node at a time, either way. Knows nothing of attention.

Axes count from the end, -1 the last, since broadcasting leaves that count alone. None stands for an axis that is there
but can no longer be told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

Axis = int | None

ELEMENTWISE = {
    *("Add", "Sub", "Mul", "Div", "Neg", "Exp", "Min", "Max", "Sum", "Clip", "Tanh", "Pow", "Where", "Trilu"),
    *(
        "DynamicQuantizeLinear",
        "Cast",
        "CastLike",
        "Identity",
        "Dropout",
        "QuantizeLinear",
        "DequantizeLinear",
        "ScatterND",
        "ScatterElements",
    ),
    *("Relu", "LeakyRelu", "PRelu", "Elu", "Sigmoid", "Softplus", "Abs", "Sqrt", "Log"),
}
"""What changes numbers one by one, and leaves every axis in its place."""
_OF_INTEGERS = {"QLinearAdd", "QLinearMul"}
"""The runtime's own, on integers: each operand is followed by its scale and its zero."""
_KEPT = {"Expand", "Slice", "Concat", "Split", "GatherElements", "Pad", "Tile"}
"""What changes extents, and leaves every axis in its place."""
_FIRST_ONLY = {
    *("Clip", "Cast", "CastLike", "Trilu", "QuantizeLinear", "DequantizeLinear", "Pow", "Dropout", "Div"),
    *("ScatterND", "ScatterElements", "PRelu"),
}

_LIKE_THEIR_INPUT = {"Softmax", "MatMul", "Conv", "Split", "Slice", "Concat", "Pad"}
_FAR = 16
"""How many nodes back a rank is looked for."""


def rank_of(value: ir.Value | None) -> int | None:
    """How many axes a value has: as inferred, or as a few of the nodes that make it imply.

    A shape without axes is taken as unknown, which converters to float16 write like that; no scalar is asked about.
    """
    for _ in range(_FAR):
        if value is not None and value.shape is not None and len(value.shape):
            return len(value.shape)
        node = value.producer() if value is not None else None
        if node is None:
            return None
        if node.op_type == "Transpose" and "perm" in node.attributes:
            return len(node.attributes.get_ints("perm", ()))
        if node.op_type == "Reshape":
            shape = node.inputs[1].shape if node.inputs[1] is not None else None
            return shape[0] if shape is not None and isinstance(shape[0], int) else None
        if node.op_type not in ELEMENTWISE and node.op_type not in _LIKE_THEIR_INPUT:
            return None
        value = node.inputs[1] if node.op_type == "Where" else node.inputs[0]
    return None


def extent_of(value: ir.Value | None, axis: int) -> int | None:
    """The extent of an axis, where the graph says so."""
    rank = rank_of(value)
    if value is None or value.shape is None or rank is None or not -rank <= axis < rank:
        return None
    extent = value.shape[axis]
    return extent if isinstance(extent, int) else None


def constant_ints(value: ir.Value | None) -> list[int] | None:
    """The numbers of a constant, where it is one."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return [int(number) for number in tensor.numpy().reshape(-1)] if tensor is not None else None


def axes_of(node: ir.Node) -> list[int] | None:
    """The axes of Squeeze, Unsqueeze and reductions: an attribute once, an input since."""
    if "axes" in node.attributes:
        return list(node.attributes.get_ints("axes", ()))
    return constant_ints(node.inputs[1]) if len(node.inputs) > 1 else None


def carries_data(node: ir.Node, position: int) -> bool:
    """Whether an input is what the node passes on, rather than a shape, an index or a condition."""
    if node.op_type == "Where":
        return position > 0
    if node.op_type in _OF_INTEGERS:
        return position in {0, 3}
    if node.op_type in ELEMENTWISE:
        return position == 0 or node.op_type not in _FIRST_ONLY
    return position == 0 or node.op_type == "Concat"


def forward(node: ir.Node, position: int, axis: Axis) -> Axis | bool:
    """Where an axis of an input is in the outputs; False where the node is none that values merely pass through."""
    if node.domain not in _domains(node) or not carries_data(node, position):
        return False
    if node.op_type in ELEMENTWISE or node.op_type in _KEPT or node.op_type in _OF_INTEGERS:
        return axis
    move = _MOVES.get(node.op_type)
    return move(node, axis, False) if move else False


def backward(node: ir.Node, axis: Axis) -> Iterator[tuple[ir.Value, Axis]]:
    """The inputs that a node passes on, and where an axis of its output is in them; none where it does more."""
    if node.domain not in _domains(node):
        return
    move = _MOVES.get(node.op_type)
    if move is None and node.op_type not in (ELEMENTWISE | _KEPT | _OF_INTEGERS):
        return
    for position, value in enumerate(node.inputs):
        if value is not None and carries_data(node, position):
            yield value, move(node, axis, True) if move else axis


def _domains(node: ir.Node) -> set[str]:
    """Whose operator a node must be for us to know what it does."""
    return {"com.microsoft"} if node.op_type in _OF_INTEGERS else {"", "ai.onnx"}


def _transpose(node: ir.Node, axis: Axis, back: bool) -> Axis:
    rank = rank_of(node.inputs[0]) or rank_of(node.outputs[0])
    order = list(node.attributes.get_ints("perm", ())) or (list(range(rank))[::-1] if rank else [])
    if axis is None or not 1 <= -axis <= len(order):
        return None
    place = axis + len(order)
    return (order[place] if back else order.index(place)) - len(order)


def _reshape(node: ir.Node, axis: Axis, back: bool) -> Axis:  # noqa: ARG001 - it is the same both ways
    """An axis keeps its place as long as it and all behind it keep their extents, as far as the graph tells."""
    if axis is None:
        return None
    before, after = node.inputs[0], node.outputs[0]
    for place in range(axis, 0):
        one, other = extent_of(before, place), extent_of(after, place)
        if one != other and one is not None and other is not None:
            return None
        if place < -2 and one is None:
            return None
    return axis


def _inserted(node: ir.Node, axis: Axis, back: bool) -> Axis:
    """Unsqueeze, and Squeeze taken the other way."""
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
    index = node.inputs[1].shape if node.inputs[1] is not None else None
    rank = rank_of(node.inputs[0])
    if axis is None or rank is None or index is None:
        return None
    added = len(index)
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


def dynamic_values(graph: ir.Graph) -> set[ir.Value]:
    """Values that depend on what the inputs hold, not merely on their shapes. What subgraphs answer counts as such."""
    dynamic: set[ir.Value] = {value for value in graph.inputs if value.const_value is None}
    for subgraph in graph.subgraphs():
        if subgraph is not graph:
            dynamic.update(subgraph.inputs)
    for node in graph.all_nodes():
        if node.op_type in {"Shape", "Size"}:
            continue
        if node.op_type in {"If", "Loop", "Scan"} or any(value in dynamic for value in node.inputs):
            dynamic.update(node.outputs)
    return dynamic
