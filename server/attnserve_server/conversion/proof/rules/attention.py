"""The rule of `ai.onnx` Attention, composed of scores, masks, Softmax and the sum over values (`scores`).

Windows hide more keys than the rule counts as hidden, which leaves its verdicts right, because a row without a key is
zeros for any keys behind it. The rule raises `NotFollowed` for a causal mask behind a past of unknown length, and
for a mask of unknown type.

In the proof, a varying axis differs in length between a sequence alone and in a batch (or padded); a rule returns
whether its result is equal in both. `NotFollowed` becomes the verdict unknown.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Final

import onnx_ir as ir

from attnserve_server.conversion.proof.context import Context, rule
from attnserve_server.conversion.proof.helpers import attribute, optional, required
from attnserve_server.conversion.proof.intervals import Interval
from attnserve_server.conversion.proof.layout import NotFollowed, size_of
from attnserve_server.conversion.proof.rules.joining import together
from attnserve_server.conversion.proof.rules.pointwise import pointwise
from attnserve_server.conversion.proof.rules.reshaping import with_axes
from attnserve_server.conversion.proof.rules.scores import (
    Scores,
    head_size,
    heads_first,
    heads_last,
    lowest_for_infinite,
    scores_of,
    up_to,
    weighted,
    without_bounds,
)
from attnserve_server.conversion.proof.values import Standing, Value

_AFTER_SOFTMAX: Final = 3
_BOOLEAN: Final = {"And", "Or", "Not", "Xor", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "IsNaN"}


@rule("Attention")
def attention(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Return the values of attention, the present key and value, and the scores. Source: ONNX Attention-23 and -24."""
    query, key, value = (ctx.as_data(required(inputs, at)) for at in range(3))
    packed = len(query.axes) == 3
    heads, kv_heads = attribute(node, "q_num_heads", 0), attribute(node, "kv_num_heads", 0)
    query, key, value = (
        heads_first(ctx, query, heads),
        heads_first(ctx, key, kv_heads),
        heads_first(ctx, value, kv_heads),
    )
    # A right window of 0 hides the keys behind each query, as a causal mask does.
    causal = bool(attribute(node, "is_causal", 0)) or attribute(node, "right_window_size", -1) == 0
    past = optional(inputs, 4), optional(inputs, 5)
    before = 0
    if past[0] is not None and past[1] is not None:
        count = size_of(past[0].axes[2]).number
        if count is None and causal:
            raise NotFollowed("applies a causal mask behind a past of unknown length")
        before = count or 0
        key, value = together(ctx, [past[0], key], 2), together(ctx, [past[1], value], 2)
    scale = attribute(node, "scale") or 1 / math.sqrt(head_size(query))
    scores = scores_of(ctx, query, key, float(scale))
    cap = float(attribute(node, "softcap", 0.0) or 0.0)
    if cap:
        capped = pointwise(ctx, lambda _one: Interval(-cap, cap), [scores.value])
        scores = Scores(ctx, capped)
    mask = optional(inputs, 3)
    if mask is not None:
        mask = with_axes(mask, range(4 - len(mask.axes))) if len(mask.axes) < 4 else mask
        scores = scores.kept(mask) if _is_boolean(node.inputs[3]) else scores.added(lowest_for_infinite(mask))
    ends = optional(inputs, 6)
    if ends is not None:
        scores = up_to(ctx, scores, ends, "Less")
        if causal or any(attribute(node, f"{side}_window_size", -1) >= 0 for side in ("left", "right")):
            scores = _from_the_end(ctx, scores)
    elif causal:
        scores = scores.causal(before)
    shares = scores.shares()
    result = weighted(ctx, shares, value)
    products = shares if attribute(node, "qk_matmul_output_mode", 0) == _AFTER_SOFTMAX else without_bounds(shares)
    outputs = [heads_last(ctx, result) if packed else result, key, value, products]
    return outputs[: len(node.outputs)]


def _from_the_end(ctx: Context, scores: Scores) -> Scores:
    """Return scores whose last query stands at the last key that counts: padded queries move all others."""
    if not ctx.depends(size_of(scores.value.axes[2])):
        return scores
    cause = ctx.cause("counts the positions of queries from the last one, padded ones included")
    return Scores(ctx, replace(scores.value, standing=Standing.DIFFERENT, cause=cause))


def _is_boolean(mask: ir.Value | None) -> bool:
    """Return whether a mask selects keys, instead of being added to scores.

    Raises:
        NotFollowed: Its type is not known.
    """
    while mask is not None and mask.dtype is None:
        node = mask.producer()
        if node is None:
            break
        if node.op_type in _BOOLEAN or (node.op_type == "Cast" and attribute(node, "to") == ir.DataType.BOOL):
            return True
        if node.op_type in {"Cast", "Add", "Mul", "Sub", "Div"}:
            return False
        mask = node.inputs[1 if node.op_type == "Where" else 0]
    if mask is None or mask.dtype is None:
        raise NotFollowed("it is not known whether a mask is added or selects keys")
    return mask.dtype is ir.DataType.BOOL
