"""Attention without a product of queries and keys, or of weights and value: written out in sums. Taps nothing.

Scores may be sums, f(q_i + k_j), instead of products (Bahdanau et al. 2015, "Neural Machine Translation by Jointly
Learning to Align and Translate"; Veličković et al. 2018, "Graph Attention Networks"). Products may be multiplications
of every number with a sum behind them.
"""

from __future__ import annotations

import onnx_ir as ir

from attnserve_server.conversion.finders.decomposed_products import Product
from attnserve_server.conversion.finders.decomposed_walk import Axis, axes_of, backward, extent_of, forward, rank_of

_SUMMED = "its weights are multiplied with the value number by number, which is not tapped"


def product_written_out(node: ir.Node, dynamic: set[ir.Value]) -> bool:
    """Whether a sum is that of two activations multiplied one by one."""
    factors = node.inputs[0].producer() if node.inputs[0] is not None else None
    return factors is not None and factors.op_type == "Mul" and all(value in dynamic for value in factors.inputs)


def sums_of_queries_and_keys(scores: ir.Value, axis: Axis, dynamic: set[ir.Value]) -> list[ir.Node]:
    """The sums of something of every query and something of every key that scores are made of.

    Between sum and scores numbers may be changed one by one, and a constant may make one number of each vector.
    """
    found: list[ir.Node] = []
    open_ = [(scores, axis)]
    seen: set[ir.Value] = set()
    while open_:
        value, at = open_.pop()
        node = value.producer()
        if node is None or value in seen or value not in dynamic:
            continue
        seen.add(value)
        if node.op_type == "Add" and _outer(node, at, dynamic):
            found.append(node)
        elif at is not None and at < -1 and _one_number_of_each(node, dynamic):
            assert node.inputs[0] is not None
            vectors = _changed_one_by_one(node.inputs[0], dynamic)
            found += [vectors] if vectors is not None and _outer(vectors, at, dynamic) else []
        elif Product.of(node) is None:
            open_.extend(backward(node, at))
    return found


def _outer(node: ir.Node, axis: Axis, dynamic: set[ir.Value]) -> bool:
    """Whether a sum has keys from one operand and another axis, its queries, from the other one."""
    one, other = node.inputs[0], node.inputs[1]
    rank = rank_of(node.outputs[0])
    if axis is None or rank is None or one is None or other is None or not {one, other} <= dynamic:
        return False
    if _single(one, axis) == _single(other, axis):
        return False
    queries, keys = (one, other) if _single(one, axis) else (other, one)
    places = set(range(1 - rank, 0)) - {axis}
    return any(_single(keys, place) and not _single(queries, place) for place in places)


def _single(value: ir.Value, place: int) -> bool:
    """Whether a value is the same all along an axis of what it is broadcast to."""
    rank = rank_of(value)
    return extent_of(value, place) == 1 or (rank is not None and -place > rank)


def _one_number_of_each(node: ir.Node, dynamic: set[ir.Value]) -> bool:
    product = Product.of(node)
    if product is None or product.operand(0) not in dynamic or product.operand(1) in dynamic:
        return False
    return node.op_type == "MatMul" and rank_of(product.operand(1)) == 2 and extent_of(product.operand(1), -1) == 1


def _changed_one_by_one(value: ir.Value, dynamic: set[ir.Value]) -> ir.Node | None:
    """The sum of two activations behind a function of one value at a time."""
    node = value.producer()
    while node is not None and not (node.op_type == "Add" and all(each in dynamic for each in node.inputs)):
        sources = [source for source, axis in backward(node, -1) if source in dynamic and axis == -1]
        node = sources[0].producer() if len(sources) == 1 else None
    return node


def refused_sum(weights: ir.Value, axis: Axis, dynamic: set[ir.Value]) -> str:
    """Why weights that are summed with an activation, both written out, cannot be tapped; empty where they are not.

    The activation is of vectors, of which each has one weight: masks and the weights' own sums are not.
    """
    open_ = [(weights, axis)]
    seen: set[ir.Value] = set()
    while open_:
        value, at = open_.pop()
        if value in seen or at is None:
            continue
        seen.add(value)
        for node, position in value.uses():
            if node.op_type == "Mul" and _weighs_vectors(node, position, at, dynamic):
                return _SUMMED
            moved = forward(node, position, at)
            if moved is not False and Product.of(node) is None:
                open_ += [(out, moved) for out in node.outputs]
    return ""


def _weighs_vectors(node: ir.Node, position: int, axis: int, dynamic: set[ir.Value]) -> bool:
    weights, vectors = node.inputs[position], node.inputs[1 - position]
    rank = rank_of(node.outputs[0])
    if weights is None or vectors is None or vectors not in dynamic or rank is None:
        return False
    wide = any(_single(weights, place) and (extent_of(vectors, place) or 0) > 1 for place in range(-rank, 0))
    sums = [user for user in node.outputs[0].consumers() if user.op_type == "ReduceSum"]
    return wide and any(place in {axis, axis + rank} for user in sums for place in axes_of(user) or ())
