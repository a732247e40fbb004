"""Decide which decomposed sites have the plain form, softmax(Q @ K^T * scale + masks) @ V, and why others have not.

An example of the plain form, as it is read, from Softmax backwards to the MatMul and forwards to the other one:

    MatMul(Q, Transpose(K))      queries and keys; either may be scaled before
    Div by a constant            the scale: 1 / constant
    Where(keep, ., -1e9)         a mask that replaces scores by a low number
    Add bias                     a mask or bias that is added
    Softmax over the last axis
    Where(IsNaN(.), 0, .)        a guard: rows without a key become zeros
    MatMul(., V)                 the output

A decomposed site is attention that is written in single operators. Sites of other forms (a sum of several MatMuls,
softcap, sinks, weights that are used twice) stay as they are; the reason goes into the conversion report. Nothing is
changed.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir

from attnserve_server.conversion.base.sites import FoundSite, Probabilities
from attnserve_server.conversion.finders import find_sites
from attnserve_server.conversion.graphs.operators import SINCE
from attnserve_server.conversion.graphs.walk import constant_number, rank_of
from attnserve_server.conversion.rewrite.fuse.heads import (
    FLOATS,
    NotPlain,
    SplitHeads,
    refuse_layout_or_type,
    required,
    scaling,
    split_heads,
    unscaled,
    untransposed_key,
)

_HIDES = -1e4
"""A score of this or less has no weight beside any other; exporters write "masked" as this or lower."""
_NO_OPS = {"Identity", "Dropout", "Cast"}
_SHARED_FILL = -1e30
"""Fills up to this have the same effect: they exceed every score."""


@dataclass(frozen=True, slots=True)
class MaskStep:
    """One mask between the scores and softmax, broadcasting to (B, H, L, S).

    `fill` None: the value is added to the scores. Else the value is boolean, and scores become `fill` where it is false
    (`inverted`: where it is true).
    """

    value: ir.Value
    fill: float | None = None
    inverted: bool = False


@dataclass(frozen=True, slots=True)
class PlainSite:
    """A site of the plain form.

    Attributes:
        softmax: its Softmax node.
        query: (B, H, L, D), before it is scaled.
        key: (B, H, S, D), before it is scaled and transposed.
        value: (B, H, S, D).
        scale: the product of all scales.
        masks: in the order in which they apply.
        guarded: whether a row in which minus infinity hides every key becomes zeros, where softmax gives NaN.
        output: weights @ value, (B, H, L, D).
    """

    softmax: ir.Node
    query: SplitHeads
    key: SplitHeads
    value: SplitHeads
    scale: float
    masks: tuple[MaskStep, ...]
    guarded: bool
    output: ir.Value


def plain_sites(graph: ir.Graph) -> tuple[dict[str, PlainSite], dict[str, str]]:
    """Return the decomposed sites of the plain form by name, and, for every other decomposed site, the reason.

    Sites of attention operators, which are fused already, are in neither.
    """
    plain: dict[str, PlainSite] = {}
    reasons: dict[str, str] = {}
    opset = graph.opset_imports.get("", 0)
    for name, site in find_sites(graph).items():
        if "Attention" in site.node.op_type:
            continue
        try:
            plain[name] = _plain_site(site, opset)
        except NotPlain as why:
            reasons[name] = str(why)
    return plain, reasons


def _plain_site(site: FoundSite, opset: int) -> PlainSite:
    if site.form == "linear":
        raise NotPlain("it is linear attention, which no operator fuses")
    if not isinstance(site.attention, Probabilities):
        raise NotPlain(site.unavailable_reason)
    softmax, matmuls = site.node, site.attention.scores
    if softmax.op_type != "Softmax":
        raise NotPlain(f"its softmax ends in {softmax.op_type}, not in a Softmax node")
    scores = required(softmax, 0)
    if (rank := rank_of(scores)) not in {4, None}:
        raise NotPlain(f"its scores have rank {rank}, not 4")
    axis = softmax.attributes.get_int("axis", -1 if opset >= SINCE["Softmax over one axis"] else 1)
    if axis not in {-1, 3}:
        raise NotPlain(f"its softmax runs over axis {axis}, not over the last")
    guarded, product = _behind(softmax)
    masks, scale, dot = _before(scores, matmuls)
    query, query_scale = unscaled(required(dot, 0))
    key, key_scale, heads_last = untransposed_key(required(dot, 1))
    operands = {
        "query": split_heads(query),
        "key": split_heads(key, heads_last=heads_last),
        "value": split_heads(required(product, 1)),
    }
    for role, operand in operands.items():
        refuse_layout_or_type(role, operand)
    _refuse_fills_that_show(masks, scores.dtype)
    packed = [operands[role].packed for role in ("query", "key")]
    _refuse_biases_of(masks, {query, key, *(value for value in packed if value is not None)})
    return PlainSite(
        softmax=softmax,
        query=operands["query"],
        key=operands["key"],
        value=operands["value"],
        scale=scale * query_scale * key_scale,
        masks=masks,
        guarded=guarded,
        output=product.outputs[0],
    )


def _behind(softmax: ir.Node) -> tuple[bool, ir.Node]:
    """Return whether a guard follows the softmax, and the MatMul of the weights with the values."""
    weights, guarded = softmax.outputs[0], False
    while True:
        users = _users(weights)
        op_types = sorted(user.op_type for user in users)
        if len(users) == 1 and users[0].op_type in _NO_OPS:
            _refuse_change_of_type(users[0])
            weights = users[0].outputs[0]
        elif op_types == ["IsNaN", "Where"] and not guarded:
            weights, guarded = _guarded(weights, users), True
        elif len(users) == 1 and users[0].op_type == "MatMul" and users[0].inputs[0] is weights:
            return guarded, users[0]
        elif len(users) == 1:
            raise NotPlain(f"{op_types[0]} is between its softmax and the MatMul with the values")
        else:
            raise NotPlain(f"its weights are read by several nodes: {', '.join(op_types)}")


def _guarded(weights: ir.Value, users: list[ir.Node]) -> ir.Value:
    """Return the result of Where(IsNaN(weights), 0, weights)."""
    is_nan, where = sorted(users, key=lambda node: node.op_type)
    guards = list(where.inputs)[::2] == [is_nan.outputs[0], weights] and constant_number(where.inputs[1]) == 0
    if not guards or _users(is_nan.outputs[0]) != [where]:
        raise NotPlain("its guard against NaN is not Where(IsNaN(weights), 0, weights)")
    return where.outputs[0]


def _before(scores: ir.Value, matmuls: Collection[ir.Node]) -> tuple[tuple[MaskStep, ...], float, ir.Node]:
    """Return the masks in the order in which they apply, the scale, and the MatMul of query and key."""
    masks: list[MaskStep] = []
    value, scale = scores, 1.0
    while (node := value.producer()) is not None:
        if value.is_graph_output():
            raise NotPlain("its scores are an output of the graph")
        factor, inner = scaling(node)
        if node.op_type == "MatMul":
            return tuple(masks[::-1]), scale, node
        if inner is not None:
            value, scale = inner, scale * factor
        elif node.op_type in _NO_OPS:
            _refuse_change_of_type(node)
            value = required(node, 0)
        elif node.op_type in {"Add", "Where"} and scale == 1:
            value, step = _added(node, matmuls) if node.op_type == "Add" else _replaced(node)
            masks.append(step)
        elif node.op_type in {"Add", "Where"}:
            raise NotPlain("its scores are scaled after a mask")
        else:
            raise NotPlain(f"{node.op_type} is between the MatMul of query and key and its softmax")
    raise NotPlain("its scores are an input of the graph")


def _added(node: ir.Node, matmuls: Collection[ir.Node]) -> tuple[ir.Value, MaskStep]:
    """Return the scores and the bias of an Add: the scores are the operand that comes from a MatMul of the site."""
    from_matmul = [_comes_from(required(node, position), matmuls) for position in (0, 1)]
    if all(from_matmul):
        raise NotPlain("its scores are a sum of several MatMuls")
    if not any(from_matmul):
        raise NotPlain("its scores do not come from a MatMul by scaling and masking alone")
    scores, bias = (required(node, position) for position in ((0, 1) if from_matmul[0] else (1, 0)))
    return scores, MaskStep(bias)


def _comes_from(value: ir.Value, matmuls: Collection[ir.Node]) -> bool:
    """Return whether a value is one of these results, scaled and masked."""
    waiting, seen = [value], set[ir.Value]()
    while waiting:
        each = waiting.pop()
        node = each.producer()
        if node is None or each in seen:
            continue
        seen.add(each)
        if node in matmuls:
            return True
        if node.op_type in {"Add", "Where", "Mul", "Div", *_NO_OPS}:
            waiting.extend(one for one in node.inputs if one is not None and rank_of(one) in {4, None})
    return False


def _replaced(node: ir.Node) -> tuple[ir.Value, MaskStep]:
    """Return the scores and the mask of a Where."""
    keep = required(node, 0)
    fills = {other: constant_number(required(node, other)) for other in (2, 1)}
    for other, fill in fills.items():
        if fill is not None and fill <= _HIDES:
            return required(node, 3 - other), MaskStep(keep, fill, inverted=other == 1)
    known = [f"{fill:g}" for fill in fills.values() if fill is not None]
    raise NotPlain(
        f"a Where replaces its scores by {known[0]}, where {_HIDES:g} or less hides a key"
        if known
        else "a Where replaces its scores by numbers that are no constant"
    )


def _refuse_fills_that_show(masks: tuple[MaskStep, ...], dtype: ir.DataType | None) -> None:
    """Refuse masks whose fill changes the weights of rows in which every key is hidden.

    It does if a bias is added to it later and is not negligible beside it, and if there are several fills, which rank
    the keys.
    """
    ranks = [rank_of(step.value) or 0 for step in masks]
    if max(ranks, default=0) > 4:
        raise NotPlain(f"its mask has rank {max(ranks)}; at most 4 can be fused")
    swallows = -3e4 if dtype is ir.DataType.FLOAT16 else -1e9
    fills = [step.fill for step in masks]
    for place, fill in enumerate(fills):
        if fill is not None and fill > swallows and None in fills[place:]:
            raise NotPlain(f"a bias is added after a mask that replaces scores by {fill:g}, and shows in hidden rows")
    distinct = sorted({fill for fill in fills if fill is not None and fill > _SHARED_FILL})
    if len(distinct) > 1:
        raise NotPlain(f"its masks replace scores by {' and '.join(f'{fill:g}' for fill in distinct)}, which differ")


def _refuse_biases_of(masks: tuple[MaskStep, ...], own: set[ir.Value]) -> None:
    """Refuse biases that are computed from the site's own queries or keys, as disentangled attention does."""
    waiting, seen = [step.value for step in masks], set[ir.Value]()
    while waiting:
        value = waiting.pop()
        if value in own:
            raise NotPlain("its bias is computed from its own queries or keys")
        node = value.producer()
        if node is None or node.op_type == "Shape" or value in seen:
            continue
        seen.add(value)
        waiting.extend(one for one in node.inputs if one is not None)


def _refuse_change_of_type(node: ir.Node) -> None:
    """Refuse a Cast that is not between floating-point types."""
    types = [required(node, 0).dtype, node.outputs[0].dtype]
    if node.op_type == "Cast" and not set(types) <= FLOATS:
        names = " to ".join(dtype.name.lower() if dtype is not None else "an unknown type" for dtype in types)
        raise NotPlain(f"its scores or weights are cast from {names}")


def _users(weights: ir.Value) -> list[ir.Node]:
    """Return the nodes that read the weights, in no order. Refuse weights that callers read too."""
    if weights.is_graph_output():
        raise NotPlain("its weights are an output of the graph")
    return list(dict.fromkeys(weights.consumers()))
