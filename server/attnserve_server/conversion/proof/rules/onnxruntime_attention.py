"""The rules of onnxruntime's attention operators: Attention, QAttention, MultiHeadAttention, GroupQueryAttention.

They are composed of the same parts as standard attention (`scores`). Packed inputs, a past of keys and values, and
masks of start and end positions raise `NotFollowed`.

In the proof, a varying axis differs in length between a sequence alone and in a batch (or padded); a rule returns
whether its result is equal in both. `NotFollowed` becomes the verdict unknown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from attnserve_server.conversion.proof.context import MICROSOFT, Context, rule
from attnserve_server.conversion.proof.helpers import attribute, joined, optional, required
from attnserve_server.conversion.proof.intervals import Interval
from attnserve_server.conversion.proof.layout import NotFollowed, size_of
from attnserve_server.conversion.proof.rules.products import biased, matmul
from attnserve_server.conversion.proof.rules.reshaping import with_axes
from attnserve_server.conversion.proof.rules.scores import (
    Scores,
    head_size,
    heads_first,
    heads_last,
    scores_of,
    up_to,
    weighted,
    without_bounds,
)
from attnserve_server.conversion.proof.rules.slicing import sliced
from attnserve_server.conversion.proof.sizes import Size
from attnserve_server.conversion.proof.values import Value


def _key_mask(ctx: Context, scores: Scores, mask: Value | None, filler: float) -> Scores:
    """Apply a mask: a number for each key, or for each query and key, or the number of keys that count in each row."""
    if mask is None:
        return scores
    rank = len(mask.axes)
    keys = size_of(scores.value.axes[3])
    if rank == 1:
        if mask.count is None and not ctx.is_batch:
            raise NotFollowed("the proof does not support masks of start and end positions")
        return up_to(ctx, scores, mask, "Less")
    if rank == 4:
        raise NotFollowed("the proof does not support 4-D masks, which the operator cuts")
    if size_of(mask.axes[-1]) != keys:
        raise NotFollowed("the mask's length is not known to be the keys'")
    return scores.kept(with_axes(mask, [1, 2] if rank == 2 else [1]), filler)


def _projected(ctx: Context, node: ir.Node, inputs: list[Value | None], weights: Value) -> list[Value]:
    source = ctx.as_data(required(inputs, 0))
    packed = biased(ctx, matmul(ctx, source, weights), optional(inputs, 2))
    heads = int(attribute(node, "num_heads"))
    sizes = attribute(node, "qkv_hidden_sizes")
    width = size_of(packed.axes[-1]).number
    if width is None:
        raise NotFollowed("the width of queries, keys and values is not known")
    sizes = sizes or [width // 3] * 3
    parts, start = [], 0
    for size in sizes:
        parts.append(heads_first(ctx, sliced(ctx, packed, 2, Size.of(start), Size.of(start + size), 1), heads))
        start += size
    norm = packed.norm
    return [replace(part, norm=min(part.norm, norm), norm_axis=3) for part in parts]


def _apart(ctx: Context, packed: Value, heads: Sequence[int]) -> list[Value]:
    """Return the columns of packed queries, keys and values, which have these numbers of heads of one size."""
    if len(packed.axes) != 3:
        raise NotFollowed("takes packed queries, keys and values of unexpected rank")
    width = size_of(packed.axes[-1]).number
    if width is None or width % sum(heads):
        raise NotFollowed("the width of queries, keys and values is not known")
    parts, start = [], 0
    for count in heads:
        stop = start + count * (width // sum(heads))
        part = sliced(ctx, packed, 2, Size.of(start), Size.of(stop), 1)
        parts.append(replace(part, norm=min(part.norm, packed.norm)))
        start = stop
    return parts


@rule("Attention", "QAttention", domain=MICROSOFT)
def attention_microsoft(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Return attention of projected inputs. Source: onnxruntime's contrib operators Attention and QAttention."""
    if node.op_type == "QAttention":
        places = {"mask": 5, "past": 8, "bias": -1}
        # The scales are inputs. If they are computed from a whole batch, their own values carry that.
        query, key, value = _projected(ctx, node, [inputs[0], None, None], required(inputs, 1))
        query, key, value = (
            replace(one, norm=math.inf, span=Interval(), lit=Interval()) for one in (query, key, value)
        )
    else:
        places = {"mask": 3, "past": 4, "bias": 5}
        query, key, value = _projected(ctx, node, inputs, required(inputs, 1))
    if optional(inputs, places["past"]) is not None:
        raise NotFollowed("attends to past keys and values, which the proof does not support")
    scale = attribute(node, "scale") or 1 / math.sqrt(head_size(query))
    scores = scores_of(ctx, query, key, float(scale))
    filler = float(attribute(node, "mask_filter_value", -10000.0))
    scores = _key_mask(ctx, scores, optional(inputs, places["mask"]), filler)
    bias = optional(inputs, places["bias"]) if places["bias"] >= 0 else None
    if bias is not None:
        scores = scores.added(bias)
    if attribute(node, "unidirectional", 0):
        scores = scores.causal()
    found = heads_last(ctx, weighted(ctx, scores.shares(), value))
    standing, cause = joined([found, *(ctx.as_data(one) for one in inputs if one is not None)])
    return [
        replace(found, standing=standing, cause=cause),
        *([ctx.unknown("returns past keys and values, which the proof does not support")] * (len(node.outputs) - 1)),
    ]


@rule("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Return attention of separate queries, keys and values.

    Source: onnxruntime's contrib operator MultiHeadAttention.
    """
    heads = int(attribute(node, "num_heads"))
    query = ctx.as_data(required(inputs, 0))
    if len(query.axes) != 3 or optional(inputs, 1) is None or optional(inputs, 2) is None:
        raise NotFollowed("takes packed queries, keys and values, which the proof does not support")
    key, value = ctx.as_data(required(inputs, 1)), ctx.as_data(required(inputs, 2))
    bias = optional(inputs, 3)
    if bias is not None:
        start, parts = Size.of(0), []
        for one in (query, key, value):
            width = size_of(one.axes[-1]) if len(one.axes) == 3 else size_of(one.axes[1]) * size_of(one.axes[3])
            part = sliced(ctx, bias, 0, start, start + width, 1)
            parts.append(biased(ctx, one, part) if len(one.axes) == 3 else one)
            start += width
        query, key, value = parts
    query, key, value = (heads_first(ctx, one, heads) for one in (query, key, value))
    if optional(inputs, 6) is not None:
        raise NotFollowed("attends to past keys and values, which the proof does not support")
    scale = attribute(node, "scale") or 1 / math.sqrt(head_size(query))
    scores = scores_of(ctx, query, key, float(scale))
    filler = float(attribute(node, "mask_filter_value", -10000.0))
    scores = _key_mask(ctx, scores, optional(inputs, 4), filler)
    more = optional(inputs, 5)
    if more is not None:
        scores = scores.added(more)
    if attribute(node, "unidirectional", 0):
        if size_of(query.axes[2]) != size_of(key.axes[2]):
            raise NotFollowed(
                "masks keys by how many more keys than queries there are, which the proof does not support"
            )
        scores = scores.causal()
    found = heads_last(ctx, weighted(ctx, scores.shares(), value))
    return [found, key, value, without_bounds(scores.value)][: len(node.outputs)]


@rule("GroupQueryAttention", domain=MICROSOFT)
def group_query_attention(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Return causal attention with shared heads. Source: onnxruntime's contrib operator GroupQueryAttention."""
    heads, kv_heads = int(attribute(node, "num_heads")), int(attribute(node, "kv_num_heads"))
    past = optional(inputs, 3)
    if past is not None and size_of(past.axes[2]).number != 0:
        raise NotFollowed("attends to past keys and values, which the proof does not support")
    parts = [ctx.as_data(required(inputs, 0)), *(ctx.as_data(one) for one in inputs[1:3] if one is not None)]
    if len(parts) == 1:
        parts = _apart(ctx, parts[0], [heads, kv_heads, kv_heads])
    if len(parts) != 3:
        raise NotFollowed("takes keys or values without the other, which the proof does not support")
    query, key, value = (
        heads_first(ctx, one, count) for one, count in zip(parts, (heads, kv_heads, kv_heads), strict=True)
    )
    scale = attribute(node, "scale") or 1 / math.sqrt(head_size(query))
    scores = scores_of(ctx, query, key, float(scale)).causal()
    bias = optional(inputs, 10)
    if bias is not None:
        scores = scores.added(bias)
    found = heads_last(ctx, weighted(ctx, scores.shares(), value))
    ends, total = ctx.as_data(replace(required(inputs, 5), count=None)), required(inputs, 6)
    others = [ctx.as_data(one) for at, one in enumerate(inputs) if one is not None and at in {7, 8, 9, 11}]
    standing, cause = joined([found, ends, *others])
    length = size_of(query.axes[2])
    if total.sizes is None or list(total.sizes) != [length]:
        whole = ctx.as_data(total)
        if whole.standing > standing:
            standing, cause = whole.standing, whole.cause
    # Rows that end before their padding are the sequence's own. Later rows may hold any finite number.
    result = replace(found, standing=standing, cause=cause)
    return [result, key, value, without_bounds(scores.value)][: len(node.outputs)]
