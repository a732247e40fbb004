"""Read query, key and value of attention: their scales, and the packed values that they were split from.

Kernels read and write packed heads, (B, T, H * D), in place; splitting and transposing them first only takes time.
Nothing is changed. A site, one attention computation, that no fused operator computes raises NotPlain with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from attnserve_server.conversion.graphs.walk import (
    before,
    constant_ints,
    constant_number,
    dimension_of,
    input_of,
    is_standard,
    permutation_of,
    producer_of,
    rank_of,
)

FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE}
"""The types that fused operators compute in."""
HEADS_FIRST = [0, 2, 1, 3]
"""The permutation between (B, T, H, D) and (B, H, T, D), in both directions."""


class NotPlain(Exception):
    """A site has not the plain form; the message is the reason."""


@dataclass(frozen=True, slots=True)
class SplitHeads:
    """Query, key or value, (B, H, T, D), or (B, T, H, D) with `heads_last`.

    `packed`, `heads` and `head_dim`: the (B, T, H * D) that the graph splits it from; None and 0 where it does not.
    """

    value: ir.Value
    heads_last: bool = False
    packed: ir.Value | None = None
    heads: int = 0
    head_dim: int = 0


def split_heads(value: ir.Value, *, heads_last: bool = False) -> SplitHeads:
    """Return an operand with the packed value that it was split from, where the graph states heads and head size."""
    unpacked = SplitHeads(value, heads_last)
    parts: ir.Value | None = value
    if not heads_last:
        transpose = producer_of(value, "Transpose")
        if transpose is None or permutation_of(transpose) != HEADS_FIRST:
            return unpacked
        parts = transpose.inputs[0]
    split = producer_of(parts, "Reshape")
    if parts is None or split is None:
        return unpacked
    packed, shape = split.inputs[:2]
    if packed is None or shape is None or rank_of(packed) != 3 or rank_of(parts) != 4:
        return unpacked
    width, head_dim = dimension_of(packed, 2), dimension_of(parts, 3) or _last_of(shape)
    if not width or not head_dim or head_dim < 1 or width % head_dim:
        return unpacked
    stated = [(dimension_of(packed, axis), dimension_of(parts, axis)) for axis in (0, 1)]
    stated.append((width // head_dim, dimension_of(parts, 2)))
    if any(one is not None and other is not None and one != other for one, other in stated):
        return unpacked
    return SplitHeads(value, heads_last, packed, width // head_dim, head_dim)


def unscaled(value: ir.Value) -> tuple[ir.Value, float]:
    """Return a value before it was multiplied by constants, and the product of these."""
    scale = 1.0
    while (node := value.producer()) is not None:
        factor, inner = scaling(node)
        if inner is None and node.op_type == "Identity":
            inner = required(node, 0)
        if inner is None:
            break
        value, scale = inner, scale * factor
    return value, scale


def scaling(node: ir.Node) -> tuple[float, ir.Value | None]:
    """Return the factor of a Mul or Div by a constant, and what is multiplied; None for any other node."""
    if node.op_type == "Div" and (divisor := constant_number(node.inputs[1])):
        return 1 / divisor, node.inputs[0]
    if node.op_type == "Mul":
        for number, other in ((0, 1), (1, 0)):
            factor = constant_number(node.inputs[number])
            if factor is not None:
                return factor, node.inputs[other]
    return 1.0, None


def untransposed_key(transposed: ir.Value) -> tuple[ir.Value, float, bool]:
    """Return the key before it was transposed, its scale, and whether it is (B, S, H, D) instead of (B, H, S, D).

    Raises:
        NotPlain: it is not transposed by one Transpose.
    """
    value, outer = unscaled(transposed)
    node = value.producer()
    if node is not None and node.op_type == "Reshape":
        # torch folds batch and heads into one axis, to transpose three axes, and unfolds them again.
        transpose = producer_of(node.inputs[0], "Transpose")
        fold = producer_of(transpose.inputs[0], "Reshape") if transpose is not None else None
        if transpose is None or fold is None or permutation_of(transpose) != [0, 2, 1]:
            raise NotPlain("the Reshape of its keys does not undo one before their Transpose")
        key, inner = unscaled(required(fold, 0))
        return key, outer * inner, False
    if node is None or node.op_type != "Transpose":
        raise NotPlain("its keys are not transposed by a Transpose before the MatMul")
    permutation = permutation_of(node)
    if permutation not in ([0, 2, 3, 1], [0, 1, 3, 2]):
        raise NotPlain(f"its keys are transposed by {permutation}, not by [0, 1, 3, 2] or [0, 2, 3, 1]")
    key, inner = unscaled(required(node, 0))
    return key, outer * inner, permutation == [0, 2, 3, 1]


def refuse_layout_or_type(role: str, operand: SplitHeads) -> None:
    """Raise NotPlain for an operand that is neither (B, H, T, D) nor split from a packed value, or has another type."""
    rank = rank_of(operand.value)
    if operand.packed is None and rank != 4:
        raise NotPlain(f"the rank of its {role} is {'not known' if rank is None else rank}, and should be 4")
    if operand.value.dtype not in FLOATS:
        dtype = operand.value.dtype.name.lower() if operand.value.dtype is not None else "an unknown type"
        raise NotPlain(f"its {role} is of {dtype}; float16, float and double can be fused")


def required(node: ir.Node, position: int) -> ir.Value:
    """Return an input. Raises NotPlain where it is left out."""
    value = input_of(node, position)
    if value is None:
        raise NotPlain(f"input {position} of {node.op_type} is missing")
    return value


def source_of_dimension(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """Return the value and the axis whose size a number, or a list of one, is: Gather or Slice of its Shape."""
    node = producer_of(before(value, {"Unsqueeze", "Squeeze", "Reshape", "Cast"})) if value is not None else None
    if node is None or node.op_type not in {"Gather", "Slice"}:
        return None
    position, shape = constant_number(input_of(node, 1)), producer_of(node.inputs[0], "Shape")
    if position is None or shape is None or shape.attributes or shape.inputs[0] is None:
        return None
    if node.op_type == "Slice" and constant_number(input_of(node, 2)) != position + 1:
        return None
    return shape.inputs[0], int(position)


def _last_of(shape: ir.Value) -> int | None:
    """Return the last number of the shape that a Reshape takes, where it is a constant."""
    numbers = constant_ints(shape)
    if numbers is not None:
        return numbers[-1]
    node = producer_of(shape, "Concat")
    last = constant_number(node.inputs[-1]) if node is not None else None
    return int(last) if last is not None else None


@dataclass(frozen=True, slots=True)
class PackableSite:
    """An `ai.onnx` Attention node on (B, H, T, D) whose query, key and value all were split from packed values."""

    node: ir.Node
    query: SplitHeads
    key: SplitHeads
    value: SplitHeads


def packable_sites(graph: ir.Graph) -> Iterator[PackableSite]:
    """Yield such nodes of the graph itself that keep no cache, and of which only the first output is used."""
    for node in graph:
        if node.op_type != "Attention" or not is_standard(node) or len(node.inputs) < 3:
            continue
        operands = node.inputs[:3]
        cached = any(value is not None for value in node.inputs[4:]) or any(map(_is_used, node.outputs[1:]))
        if cached or any(value is None or rank_of(value) != 4 for value in operands):
            continue
        query, key, value = (split_heads(each) for each in operands if each is not None)
        if query.packed and key.packed and value.packed and key.heads == value.heads and query.heads % key.heads == 0:
            yield PackableSite(node, query, key, value)


def _is_used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()
