"""Decides which decomposed sites have the plain form, softmax(Q @ K^T * scale + masks) @ V. Changes nothing.

What is not plain (scores of several products, sinks, guards that change weights, weights that are used twice) is left
to the graph as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from attnserve_server.conversion.rewrite.fuse.carried import Carried, carry, constant, permutation, rank

FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE}
_HIDES = -1e4
"""A score of this or less has no weight beside any other; exporters write "masked" as this or lower."""
_NO_OPS = {"Identity", "Dropout", "Cast"}


@dataclass(frozen=True, slots=True)
class MaskStep:
    """One step on the way from scores to softmax, broadcasting to (B, H, L, S).

    `fill` None: the value is added to the scores. Else the value is boolean, and scores become `fill` where it is false
    (`inverted`: where it is true).
    """

    value: ir.Value
    fill: float | None = None
    inverted: bool = False


@dataclass(frozen=True, slots=True)
class PlainSite:
    """A site of the plain form; masks in the order in which they are applied.

    `guarded`: rows in which every key is hidden by minus infinity become zeros, where softmax would make them NaN.
    `output`: weights @ value, (B, H, L, D).
    """

    softmax: ir.Node
    query: Carried
    key: Carried
    value: Carried
    scale: float
    masks: tuple[MaskStep, ...]
    guarded: bool
    output: ir.Value


class _NotPlain(Exception):
    """This softmax belongs to no site of the plain form."""


def plain_sites(graph: ir.Graph) -> Iterator[PlainSite]:
    """All sites of the plain form in the graph itself; subgraphs are not looked into."""
    for node in graph:
        if node.op_type == "Softmax" and node.domain in {"", "ai.onnx"}:
            try:
                yield _plain_site(node, graph.opset_imports.get("", 0))
            except _NotPlain:
                continue


def _plain_site(softmax: ir.Node, opset: int) -> PlainSite:
    scores = softmax.inputs[0]
    if scores is None or rank(scores) not in {4, None}:
        raise _NotPlain
    if softmax.attributes.get_int("axis", -1 if opset >= 13 else 1) not in {-1, 3}:
        raise _NotPlain
    guarded, product = _behind(softmax)
    masks, scale, dot = _before(scores)
    query, query_scale = _unscaled(_input(dot, 0))
    key, key_scale, heads_last = _turned_key(_input(dot, 1))
    carried = (carry(query), carry(key, heads_last=heads_last), carry(_input(product, 1)))
    for one in carried:
        if (one.packed is None and rank(one.value) != 4) or one.value.dtype not in FLOATS:
            raise _NotPlain
    _refuse_fills_that_tell(masks, scores.dtype)
    _refuse_what_depends(masks, {query, key, *(one.packed for one in carried[:2] if one.packed is not None)})
    return PlainSite(
        softmax=softmax,
        query=carried[0],
        key=carried[1],
        value=carried[2],
        scale=scale * query_scale * key_scale,
        masks=masks,
        guarded=guarded,
        output=product.outputs[0],
    )


def _behind(softmax: ir.Node) -> tuple[bool, ir.Node]:
    """Whether a guard stands behind the softmax, and the product of the weights with the values."""
    weights, guarded = softmax.outputs[0], False
    while True:
        users = _users(weights)
        if len(users) == 1 and users[0].op_type in _NO_OPS:
            _refuse_change_of_type(users[0])
            weights = users[0].outputs[0]
        elif len(users) == 2 and {user.op_type for user in users} == {"IsNaN", "Where"} and not guarded:
            weights, guarded = _guarded(weights, users), True
        elif len(users) == 1 and users[0].op_type == "MatMul" and users[0].inputs[0] is weights:
            return guarded, users[0]
        else:
            raise _NotPlain


def _guarded(weights: ir.Value, users: list[ir.Node]) -> ir.Value:
    """What Where(IsNaN(weights), 0, weights) makes of the weights."""
    tells, chooses = sorted(users, key=lambda node: node.op_type)
    if tells.op_type != "IsNaN" or list(chooses.inputs)[::2] != [tells.outputs[0], weights]:
        raise _NotPlain
    if constant(chooses.inputs[1]) != 0 or _users(tells.outputs[0]) != [chooses]:
        raise _NotPlain
    return chooses.outputs[0]


def _before(scores: ir.Value) -> tuple[tuple[MaskStep, ...], float, ir.Node]:
    """The masks in the order of their application, the scale, and the product of query and key, by walking upwards."""
    masks: list[MaskStep] = []
    value, scale = scores, 1.0
    while (node := value.producer()) is not None and not value.is_graph_output():
        factor, inner = _scaling(node)
        if node.op_type == "MatMul":
            return tuple(masks[::-1]), scale, node
        if inner is not None:
            value, scale = inner, scale * factor
        elif node.op_type in _NO_OPS:
            _refuse_change_of_type(node)
            value = _input(node, 0)
        elif node.op_type in {"Add", "Where"} and scale == 1:
            value, step = _added(node) if node.op_type == "Add" else _replaced(node)
            masks.append(step)
        else:
            break
    raise _NotPlain


def _added(node: ir.Node) -> tuple[ir.Value, MaskStep]:
    """The scores and the bias of a sum: the scores are what comes from a product, and a sum of two has no one's."""
    leads = [_leads_to_product(_input(node, position)) for position in (0, 1)]
    if leads[0] == leads[1]:
        raise _NotPlain
    scores, bias = (_input(node, position) for position in ((0, 1) if leads[0] else (1, 0)))
    return scores, MaskStep(bias)


def _replaced(node: ir.Node) -> tuple[ir.Value, MaskStep]:
    keep = _input(node, 0)
    for chosen, other in ((1, 2), (2, 1)):
        fill = constant(_input(node, other))
        if fill is not None and fill <= _HIDES:
            return _input(node, chosen), MaskStep(keep, fill, inverted=chosen == 2)
    raise _NotPlain


def _refuse_fills_that_tell(masks: tuple[MaskStep, ...], dtype: ir.DataType | None) -> None:
    """Numbers for hidden keys must be as good as any other so low, for rows in which every key is hidden too.

    They are not where what is added afterwards still tells in them, nor where there are several, which rank the keys.
    """
    if any((rank(step.value) or 0) > 4 for step in masks):
        raise _NotPlain
    swallows = -3e4 if dtype is ir.DataType.FLOAT16 else -1e9
    fills = [step.fill for step in masks]
    told = {fill for fill in fills if fill is not None and fill > -1e30}
    added_to = any(fill is not None and fill > swallows and None in fills[place:] for place, fill in enumerate(fills))
    if added_to or len(told) > 1:
        raise _NotPlain


def _leads_to_product(value: ir.Value, steps: int = 8) -> bool:
    """Whether nothing but a few steps of scaling and masking stand between a value and a product of computed ones."""
    node = value.producer()
    if node is None or not steps:
        return False
    if node.op_type == "MatMul":
        return all(ir.convenience.get_const_tensor(one) is None for one in node.inputs if one is not None)
    if node.op_type in {"Add", "Where", "Mul", "Div", *_NO_OPS}:
        return any(
            _leads_to_product(one, steps - 1) for one in node.inputs if one is not None and rank(one) in {4, None}
        )
    return False


def _unscaled(value: ir.Value) -> tuple[ir.Value, float]:
    """A value before it was multiplied by numbers, and their product."""
    scale = 1.0
    while (node := value.producer()) is not None:
        factor, inner = _scaling(node)
        if inner is None and node.op_type == "Identity":
            inner = _input(node, 0)
        if inner is None:
            break
        value, scale = inner, scale * factor
    return value, scale


def _scaling(node: ir.Node) -> tuple[float, ir.Value | None]:
    """The factor of Mul or Div by a number, and what is multiplied; None for any other node."""
    if node.op_type == "Div" and (divisor := constant(node.inputs[1])):
        return 1 / divisor, node.inputs[0]
    if node.op_type == "Mul":
        for number, other in ((0, 1), (1, 0)):
            factor = constant(node.inputs[number])
            if factor is not None:
                return factor, node.inputs[other]
    return 1.0, None


def _turned_key(turned: ir.Value) -> tuple[ir.Value, float, bool]:
    """The key (B, H, S, D), or (B, S, H, D) that one permutation turns at once; its scale; and whether it is so."""
    value, outer = _unscaled(turned)
    node = value.producer()
    if node is None:
        raise _NotPlain
    if node.op_type == "Reshape":  # torch folds batch and heads into one, to turn three axes, and unfolds them again
        turn = _made_by("Transpose", _input(node, 0))
        fold = _made_by("Reshape", _input(turn, 0))
        turns_at_once = False
        if permutation(turn) != [0, 2, 1]:
            raise _NotPlain
        key, inner = _unscaled(_input(fold, 0))
    else:
        turns_at_once = permutation(node) == [0, 2, 3, 1]
        if node.op_type != "Transpose" or not (turns_at_once or permutation(node) == [0, 1, 3, 2]):
            raise _NotPlain
        key, inner = _unscaled(_input(node, 0))
    return key, outer * inner, turns_at_once


def _made_by(op_type: str, value: ir.Value) -> ir.Node:
    node = value.producer()
    if node is None or node.op_type != op_type:
        raise _NotPlain
    return node


def _refuse_what_depends(masks: tuple[MaskStep, ...], own: set[ir.Value]) -> None:
    """Biases made from the site's own queries or keys are scores of another form (disentangled attention)."""
    waiting, seen = [step.value for step in masks], set[ir.Value]()
    while waiting:
        value = waiting.pop()
        if value in own:
            raise _NotPlain
        node = value.producer()
        if node is None or node.op_type == "Shape" or value in seen:
            continue
        seen.add(value)
        waiting.extend(one for one in node.inputs if one is not None)


def _refuse_change_of_type(node: ir.Node) -> None:
    """A cast between floats is part of how attention is computed; any other is not."""
    if node.op_type == "Cast" and not {_input(node, 0).dtype, node.outputs[0].dtype} <= FLOATS:
        raise _NotPlain


def _users(value: ir.Value) -> list[ir.Node]:
    """Nodes that read a value, in no order; a graph output is read by somebody else too."""
    if value.is_graph_output():
        raise _NotPlain
    return list(dict.fromkeys(value.consumers()))


def _input(node: ir.Node, position: int) -> ir.Value:
    value = node.inputs[position] if position < len(node.inputs) else None
    if value is None:
        raise _NotPlain
    return value
