"""Values that carry heads, and the packed values behind them; small questions to a graph. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

HEADS_FIRST = [0, 2, 1, 3]
"""The permutation between (B, T, H, D) and (B, H, T, D), either way."""


@dataclass(frozen=True, slots=True)
class Carried:
    """Query, key or value: (B, H, T, D), and the (B, T, H * D) that the graph makes it from, where it does.

    `heads_last`: the value is (B, T, H, D).
    """

    value: ir.Value
    heads_last: bool = False
    packed: ir.Value | None = None
    heads: int = 0
    head_dim: int = 0


def carry(value: ir.Value, *, heads_last: bool = False) -> Carried:
    """An operand with the packed value that it was split from, where heads and their size are told by the graph."""
    unpacked = Carried(value, heads_last)
    parts: ir.Value | None = value
    if not heads_last:
        turn = value.producer()
        parts = turn.inputs[0] if turn is not None and turn.op_type == "Transpose" else None
        if turn is None or permutation(turn) != HEADS_FIRST:
            return unpacked
    split = parts.producer() if parts is not None else None
    if parts is None or split is None or split.op_type != "Reshape":
        return unpacked
    packed, shape = split.inputs[:2]
    if packed is None or shape is None or rank(packed) != 3 or (rank(parts) or extent(shape, 0)) != 4:
        return unpacked
    width, head_dim = extent(packed, 2), extent(parts, 3) or _last_of(shape)
    if not width or not head_dim or head_dim < 1 or width % head_dim:
        return unpacked
    told = [(extent(packed, axis), extent(parts, axis)) for axis in (0, 1)] + [(width // head_dim, extent(parts, 2))]
    if any(one is not None and other is not None and one != other for one, other in told):
        return unpacked
    return Carried(value, heads_last, packed, width // head_dim, head_dim)


def constant(value: ir.Value | None) -> float | None:
    """The number that a value always is, if it is one number."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or tensor.size != 1:
        return None
    return float(tensor.numpy().reshape(()))


def extent(value: ir.Value, axis: int) -> int | None:
    """A fixed extent, if the graph says it."""
    found = value.shape[axis] if value.shape is not None else None
    return found if isinstance(found, int) else None


def rank(value: ir.Value) -> int | None:
    """How many axes a value has, if the graph says it."""
    return len(value.shape) if value.shape is not None else None


def permutation(node: ir.Node) -> list[int]:
    """What a Transpose is asked for; empty where it turns all axes around, and for other nodes."""
    return list(node.attributes.get_ints("perm", ()))


def axis_of(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """The value and the axis whose extent a number (or a list of one) is, as exporters read it from a shape."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in {"Unsqueeze", "Squeeze", "Reshape", "Cast"}:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or node.op_type not in {"Gather", "Slice"}:
        return None
    position = constant(node.inputs[1])
    shape = node.inputs[0].producer() if node.inputs[0] is not None else None
    if position is None or shape is None or shape.op_type != "Shape" or shape.attributes or shape.inputs[0] is None:
        return None
    if node.op_type == "Slice" and constant(node.inputs[2]) != position + 1:
        return None
    return shape.inputs[0], int(position)


def _last_of(shape: ir.Value) -> int | None:
    """The last extent that a shape asks for, if it is a number."""
    tensor = ir.convenience.get_const_tensor(shape)
    if tensor is not None:
        return int(tensor.numpy().reshape(-1)[-1])
    node = shape.producer()
    last = constant(node.inputs[-1]) if node is not None and node.op_type == "Concat" else None
    return int(last) if last is not None else None
