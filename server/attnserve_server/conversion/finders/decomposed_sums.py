"""Recognize attention whose MatMuls are written as elementwise operators and sums.

Scores may be f(q_i + k_j) instead of q_i . k_j (Bahdanau et al. 2015, "Neural Machine Translation by Jointly Learning
to Align and Translate"; Veličković et al. 2018, "Graph Attention Networks"). A MatMul may be written as Mul and
ReduceSum. Weights that are multiplied with the values like that are found, but not tapped.

`activations` are the values that depend on the numbers of the graph's inputs. Axes count from the end; None is an axis
whose place is not known. Nothing here raises.
"""

from __future__ import annotations

import onnx_ir as ir

from attnserve_server.conversion.graphs.axes import Axis, backward, forward
from attnserve_server.conversion.graphs.contraction import Contraction
from attnserve_server.conversion.graphs.walk import axes_of, dimension_of, producer_of, rank_of

_NOT_TAPPED = "its weights are multiplied with the values by Mul and ReduceSum, which is not tapped"


def sums_of_two_activations(node: ir.Node, activations: set[ir.Value]) -> bool:
    """Return whether a ReduceSum sums two activations that were multiplied elementwise."""
    factors = producer_of(node.inputs[0], "Mul")
    return factors is not None and all(value in activations for value in factors.inputs)


def sums_of_queries_and_keys(scores: ir.Value, axis: Axis, activations: set[ir.Value]) -> list[ir.Node]:
    """Return the Adds of something of every query and something of every key that scores are computed from.

    Between the Add and the scores, nodes may be elementwise, and a MatMul with a constant may reduce each vector to one
    number.
    """
    found: list[ir.Node] = []
    waiting = [(scores, axis)]
    seen: set[ir.Value] = set()
    while waiting:
        value, at = waiting.pop()
        node = value.producer()
        if node is None or value in seen or value not in activations:
            continue
        seen.add(value)
        if node.op_type == "Add" and _is_outer(node, at, activations):
            found.append(node)
        elif at is not None and at < -1 and _reduces_vectors(node, activations):
            assert node.inputs[0] is not None
            vectors = _add_behind(node.inputs[0], activations)
            found += [vectors] if vectors is not None and _is_outer(vectors, at, activations) else []
        elif Contraction.of(node) is None:
            waiting.extend(backward(node, at))
    return found


def _is_outer(node: ir.Node, axis: Axis, activations: set[ir.Value]) -> bool:
    """Return whether an Add has its keys' axis from one operand, and another axis, the queries', from the other."""
    one, other = node.inputs[0], node.inputs[1]
    rank = rank_of(node.outputs[0])
    if axis is None or rank is None or one is None or other is None or not {one, other} <= activations:
        return False
    if _broadcasts(one, axis) == _broadcasts(other, axis):
        return False
    queries, keys = (one, other) if _broadcasts(one, axis) else (other, one)
    places = set(range(1 - rank, 0)) - {axis}
    return any(_broadcasts(keys, place) and not _broadcasts(queries, place) for place in places)


def _broadcasts(value: ir.Value, place: int) -> bool:
    """Return whether a value has size 1 along an axis of the result it is broadcast to, or no such axis."""
    rank = rank_of(value)
    return dimension_of(value, place) == 1 or (rank is not None and -place > rank)


def _reduces_vectors(node: ir.Node, activations: set[ir.Value]) -> bool:
    """Return whether a node is a MatMul of an activation with a constant (D, 1)."""
    contraction = Contraction.of(node)
    if contraction is None or contraction.operand(0) not in activations or contraction.operand(1) in activations:
        return False
    constant = contraction.operand(1)
    return node.op_type == "MatMul" and rank_of(constant) == 2 and dimension_of(constant, -1) == 1


def _add_behind(value: ir.Value, activations: set[ir.Value]) -> ir.Node | None:
    """Return the Add of two activations that elementwise nodes compute a value from."""
    node = value.producer()
    while node is not None and not (node.op_type == "Add" and all(each in activations for each in node.inputs)):
        sources = [source for source, axis in backward(node, -1) if source in activations and axis == -1]
        node = sources[0].producer() if len(sources) == 1 else None
    return node


def refused_sum(weights: ir.Value, axis: Axis, activations: set[ir.Value]) -> str:
    """Return why weights that Mul and ReduceSum multiply with an activation are not tapped; empty where none are.

    The activation has a vector for each weight. A mask, or the sum of the weights, has not.
    """
    waiting = [(weights, axis)]
    seen: set[ir.Value] = set()
    while waiting:
        value, at = waiting.pop()
        if value in seen or at is None:
            continue
        seen.add(value)
        for node, position in value.uses():
            if node.op_type == "Mul" and _weighs_vectors(node, position, at, activations):
                return _NOT_TAPPED
            moved = forward(node, position, at)
            if moved is not False and Contraction.of(node) is None:
                waiting += [(each, moved) for each in node.outputs]
    return ""


def _weighs_vectors(node: ir.Node, position: int, axis: int, activations: set[ir.Value]) -> bool:
    weights, vectors = node.inputs[position], node.inputs[1 - position]
    rank = rank_of(node.outputs[0])
    if weights is None or vectors is None or vectors not in activations or rank is None:
        return False
    wide = any(_broadcasts(weights, place) and (dimension_of(vectors, place) or 0) > 1 for place in range(-rank, 0))
    sums = [user for user in node.outputs[0].consumers() if user.op_type == "ReduceSum"]
    return wide and any(place in {axis, axis + rank} for user in sums for place in axes_of(user) or ())
