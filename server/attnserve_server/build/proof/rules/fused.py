"""Attention as one operator, standard and onnxruntime's: scores, masks, softmax and the sum over values, in that order.

Each is taken apart into the products and the softmax that its definition has, so that nothing is known of it that is not
known of attention that is written out. onnxruntime's kernels leave rows zero, or finite, that a mask empties; no NaN
comes out of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import onnx_ir as ir

from attnserve_server.build.proof.context import (
    MICROSOFT,
    Context,
    attribute,
    index_value,
    joined,
    optional,
    required,
    rule,
    wild_anywhere,
)
from attnserve_server.build.proof.hiding import softmaxed
from attnserve_server.build.proof.intervals import BINARY, NAN, Interval, add, as_truth, chosen, number
from attnserve_server.build.proof.layout import NotFollowed, ordinals, plain, size_of, varying
from attnserve_server.build.proof.rules.counting import counted
from attnserve_server.build.proof.rules.moving import into, permuted, together, with_axes
from attnserve_server.build.proof.rules.pointwise import distance, pointwise
from attnserve_server.build.proof.rules.products import biased, matmul, product, scaled
from attnserve_server.build.proof.sizes import Size
from attnserve_server.build.proof.values import Entry, Value

LOWEST: Final = -3.4028234663852886e38
"""What stands in the place of minus infinity: these kernels make no NaN of a row that is masked from end to end."""


@dataclass(frozen=True)
class Scores:
    """Attention scores on their way: (B, H, L, S)."""

    ctx: Context
    value: Value

    def added(self, mask: Value) -> Scores:
        """With a mask or a bias added."""
        return Scores(self.ctx, pointwise(self.ctx, add, [self.value, mask], op="Add"))

    def kept(self, allowed: Value, filler: float = LOWEST) -> Scores:
        """With the filler where a mask of truth values says no."""
        low = Value((), span=number(filler), lit=number(filler))
        zero = Value((), span=number(0), lit=number(0))
        bias = pointwise(self.ctx, chosen, [pointwise(self.ctx, as_truth, [allowed]), zero, low], op="Where")
        return self.added(bias)

    def positions(self, axis: int) -> Value | None:
        """Positions along queries (2) or keys (3), if these vary."""
        layout = self.value.axes
        own = ordinals(layout, axis)
        if not own or len(layout[axis]) != 1:
            return None
        alone = (layout[axis], plain(Size.of(1))) if axis == 2 else (layout[axis],)
        return index_value(self.ctx, alone, {0: Size.of(1)}, Size.of(0))

    def causal(self, before: int = 0) -> Scores:
        """With keys hidden that stand behind their query; `before`: positions that keys have in front of queries."""
        if self.ctx.is_batch:
            return self
        queries, keys = self.positions(2), self.positions(3)
        if queries is None or keys is None:
            return self
        difference = distance(self.ctx, queries, keys)
        zero = Value((), span=number(-before), lit=number(-before))
        allowed = pointwise(self.ctx, BINARY["GreaterOrEqual"], [difference, zero])
        return self.kept(allowed)

    def shares(self) -> Value:
        """Softmax over the keys."""
        found = softmaxed(self.ctx, self.ctx.as_data(self.value), [3])
        return _tame(found)


def _tame(value: Value) -> Value:
    def without(interval: Interval) -> Interval:
        return replace(interval, wild=interval.wild & ~NAN)

    regions = {
        region: replace(entry, interval=without(entry.interval), lit=without(entry.lit))
        for region, entry in value.regions.items()
    }
    return replace(value, span=without(value.span), lit=without(value.lit), regions=regions)


def heads_first(ctx: Context, value: Value, heads: int) -> Value:
    """(B, H, T, D) of (B, T, H * D), or of what has four axes already."""
    if len(value.axes) == 4:
        return value
    if len(value.axes) != 3:
        raise NotFollowed("attention over a value of unexpected rank")
    batch, length, width = (size_of(axis) for axis in value.axes)
    size = width.over(Size.of(heads))
    if size is None:
        raise NotFollowed("a width that heads do not divide")
    split = into(ctx, value, [batch, length, Size.of(heads), size])
    return permuted(split, [0, 2, 1, 3])


def heads_last(ctx: Context, value: Value) -> Value:
    """(B, L, H * D) of (B, H, L, D)."""
    turned = permuted(value, [0, 2, 1, 3])
    batch, length, heads, size = (size_of(axis) for axis in turned.axes)
    return into(ctx, turned, [batch, length, heads * size])


def scores_of(ctx: Context, query: Value, key: Value, scale: float) -> Scores:
    """Query times key; heads of keys are repeated for the queries that share them."""
    key = _repeated(key, query)
    return Scores(ctx, scaled(ctx, product(ctx, query, "bhqd", key, "bhkd", "bhqk"), scale))


def _repeated(value: Value, like: Value) -> Value:
    return replace(value, layout=(value.axes[0], like.axes[1], *value.axes[2:]), constant=None)


def weighted(ctx: Context, shares: Value, value: Value) -> Value:
    """The sum over values by their shares."""
    return product(ctx, shares, "bhqk", _repeated(value, shares), "bhkd", "bhqd")


def head_size(value: Value) -> int:
    """D. Raises NotFollowed where it is not a number."""
    found = size_of(value.axes[-1]).number
    if found is None:
        raise NotFollowed("the head size is not known")
    return found


@rule("Attention")
def attention(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Source: ONNX Attention-23 and -24."""
    query, key, value = (ctx.as_data(required(inputs, at)) for at in range(3))
    packed = len(query.axes) == 3
    heads, kv_heads = attribute(node, "q_num_heads", 0), attribute(node, "kv_num_heads", 0)
    query, key, value = (
        heads_first(ctx, query, heads),
        heads_first(ctx, key, kv_heads),
        heads_first(ctx, value, kv_heads),
    )
    past = optional(inputs, 4), optional(inputs, 5)
    before = 0
    if past[0] is not None and past[1] is not None:
        count = size_of(past[0].axes[2]).number
        if count is None and attribute(node, "is_causal", 0):
            raise NotFollowed("a causal frontier behind a past of unknown length")
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
        boolean = node.inputs[3] is not None and node.inputs[3].dtype is ir.DataType.BOOL
        boolean = boolean or (mask.span.low >= 0 and mask.span.high <= 1 and mask.span.only is None)
        scores = scores.kept(mask) if boolean else scores.added(_lowest_for_infinite(mask))
    if attribute(node, "is_causal", 0):
        scores = scores.causal(before)
    ends = optional(inputs, 6)
    if ends is not None:
        scores = _up_to(ctx, scores, ends, "Less")
    shares = scores.shares()
    result = weighted(ctx, shares, value)
    outputs = [heads_last(ctx, result) if packed else result, key, value, shares]
    return outputs[: len(node.outputs)]


def _lowest_for_infinite(mask: Value) -> Value:
    """An added mask whose infinities the kernel answers as if they were the lowest number."""

    def finite(interval: Interval) -> Interval:
        low = LOWEST if math.isinf(interval.low) and interval.wild & 1 else interval.low
        high = LOWEST if interval.only is not None and math.isinf(interval.only) else interval.high
        return Interval(low, high, interval.wild & ~1, interval.masked)

    regions = {
        region: replace(entry, interval=finite(entry.interval), lit=finite(entry.lit))
        for region, entry in mask.regions.items()
    }
    return replace(mask, span=finite(mask.span), lit=finite(mask.lit), regions=regions)


def _up_to(ctx: Context, scores: Scores, ends: Value, op: str) -> Scores:
    """Keys before an end that each row has; behind the sequence, where the end is a count of allowed positions."""
    if ctx.is_batch:
        standing, cause = joined([scores.value, ctx.as_data(ends)])
        return Scores(ctx, replace(scores.value, standing=standing, cause=cause))
    keys = scores.positions(3)
    rank = len(ends.axes)
    wide = with_axes(ends, range(rank, 4)) if rank < 4 else ends
    if keys is None:
        standing, cause = joined([scores.value, ctx.as_data(ends)])
        return Scores(ctx, replace(scores.value, standing=standing, cause=cause))
    allowed = counted(ctx, op, [keys, wide])
    if allowed is None:
        allowed = pointwise(ctx, BINARY[op], [keys, wide])
    return scores.kept(allowed)


def _key_mask(ctx: Context, scores: Scores, mask: Value | None, filler: float) -> Scores:
    """onnxruntime's masks of keys: a number for each key, or for each query and key, or how many keys count."""
    if mask is None:
        return scores
    rank = len(mask.axes)
    keys = size_of(scores.value.axes[3])
    if rank == 1:
        if mask.count is None and not ctx.is_batch:
            raise NotFollowed("a mask by starts and ends of keys is not followed")
        return _up_to(ctx, scores, mask, "Less")
    if rank == 4:
        raise NotFollowed("a mask of the largest shape, cut by the operator, is not followed")
    if size_of(mask.axes[-1]) != keys:
        raise NotFollowed("a mask whose length is not that of the keys")
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
    from attnserve_server.build.proof.rules.moving import sliced  # noqa: PLC0415 - only here

    parts, start = [], 0
    for size in sizes:
        parts.append(heads_first(ctx, sliced(ctx, packed, 2, Size.of(start), Size.of(start + size), 1), heads))
        start += size
    norm = packed.norm
    return [replace(part, norm=min(part.norm, norm), norm_axis=3) for part in parts]


@rule("Attention", "QAttention", domain=MICROSOFT)
def attention_microsoft(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Source: onnxruntime's contrib operators Attention and QAttention."""
    if node.op_type == "QAttention":
        places = {"mask": 5, "past": 8, "bias": -1}
        # Bytes with scales that are given; where these are of a whole batch, its inputs say so.
        query, key, value = _projected(ctx, node, [inputs[0], None, None], required(inputs, 1))
        query, key, value = (
            replace(one, norm=math.inf, span=Interval(), lit=Interval()) for one in (query, key, value)
        )
    else:
        places = {"mask": 3, "past": 4, "bias": 5}
        query, key, value = _projected(ctx, node, inputs, required(inputs, 1))
    if optional(inputs, places["past"]) is not None:
        raise NotFollowed("attention over a past is not followed")
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
    return [replace(found, standing=standing, cause=cause), *([ctx.unknown("a past")] * (len(node.outputs) - 1))]


@rule("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Source: onnxruntime's contrib operator MultiHeadAttention."""
    heads = int(attribute(node, "num_heads"))
    query = ctx.as_data(required(inputs, 0))
    if len(query.axes) != 3 or optional(inputs, 1) is None or optional(inputs, 2) is None:
        raise NotFollowed("packed queries, keys and values are not followed")
    key, value = ctx.as_data(required(inputs, 1)), ctx.as_data(required(inputs, 2))
    bias = optional(inputs, 3)
    if bias is not None:
        from attnserve_server.build.proof.rules.moving import sliced  # noqa: PLC0415 - only here

        start, parts = Size.of(0), []
        for one in (query, key, value):
            width = size_of(one.axes[-1]) if len(one.axes) == 3 else size_of(one.axes[1]) * size_of(one.axes[3])
            part = sliced(ctx, bias, 0, start, start + width, 1)
            parts.append(biased(ctx, one, part) if len(one.axes) == 3 else one)
            start += width
        query, key, value = parts
    query, key, value = (heads_first(ctx, one, heads) for one in (query, key, value))
    if optional(inputs, 6) is not None:
        raise NotFollowed("attention over a past is not followed")
    scale = attribute(node, "scale") or 1 / math.sqrt(head_size(query))
    scores = scores_of(ctx, query, key, float(scale))
    filler = float(attribute(node, "mask_filter_value", -10000.0))
    scores = _key_mask(ctx, scores, optional(inputs, 4), filler)
    more = optional(inputs, 5)
    if more is not None:
        scores = scores.added(more)
    if attribute(node, "unidirectional", 0):
        scores = scores.causal()
    found = heads_last(ctx, weighted(ctx, scores.shares(), value))
    return [found, key, value, scores.value][: len(node.outputs)]


@rule("GroupQueryAttention", domain=MICROSOFT)
def group_query_attention(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Source: onnxruntime's contrib operator GroupQueryAttention, which is always causal."""
    heads, kv_heads = int(attribute(node, "num_heads")), int(attribute(node, "kv_num_heads"))
    if optional(inputs, 1) is None or optional(inputs, 2) is None:
        raise NotFollowed("packed queries, keys and values are not followed")
    query, key, value = (ctx.as_data(required(inputs, at)) for at in range(3))
    past = optional(inputs, 3)
    if past is not None and size_of(past.axes[2]).number != 0:
        raise NotFollowed("attention over a past is not followed")
    query, key, value = (
        heads_first(ctx, query, heads),
        heads_first(ctx, key, kv_heads),
        heads_first(ctx, value, kv_heads),
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
    # Rows that end before their padding are the prompt's own; what stands behind may be anything finite.
    result = replace(found, standing=standing, cause=cause)
    return [result, key, value, scores.value][: len(node.outputs)]


@rule("EmbedLayerNormalization", domain=MICROSOFT)
def embed_layer_normalization(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Tables looked up, summed and normalised; the second output counts the mask's ones."""
    from attnserve_server.build.proof.rules.gathering import from_table  # noqa: PLC0415 - as below
    from attnserve_server.build.proof.rules.reducing import normalised, reduced  # noqa: PLC0415 - a long way around

    ids = required(inputs, 0)
    total = from_table(ctx, required(inputs, 2), ids, 0)
    segments, table = optional(inputs, 1), optional(inputs, 4)
    if segments is not None and table is not None:
        total = pointwise(ctx, add, [total, from_table(ctx, table, segments, 0)])
    positions = optional(inputs, 8)
    if positions is not None:
        total = pointwise(ctx, add, [total, from_table(ctx, required(inputs, 3), positions, 0)])
    scales = [value for value in inputs[5:7] if value is not None]
    first = normalised(ctx, node, total, scales, len(total.axes) - 1)[0]
    mask = optional(inputs, 7)
    counts = Value((ids.axes[0],), span=number(0), lit=number(0))
    if mask is not None:
        counts = reduced(ctx, "ReduceSum", ctx.as_data(mask), [1], keep=False)
    return [first, counts, total][: len(node.outputs)]


@rule("RotaryEmbedding")
def rotary(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Pairs of numbers turned by angles of their own position. Source: ONNX RotaryEmbedding-23."""
    return _turned(ctx, required(inputs, 0), [value for value in inputs[1:] if value is not None])


@rule("RotaryEmbedding", domain=MICROSOFT)
def rotary_microsoft(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """As the standard one, with the positions before the tables."""
    return _turned(ctx, required(inputs, 0), [value for value in inputs[1:] if value is not None])


def _turned(ctx: Context, value: Value, others: list[Value]) -> Value:
    value = ctx.as_data(value)
    others = [ctx.as_data(other) for other in others]
    standing, cause = joined([value, *others])
    for other in others:
        for _, factor in varying(other.axes):
            if factor not in [own for _, own in varying(value.axes)]:
                raise NotFollowed("angles along an axis that the turned value does not have")
    bits = wild_anywhere(value)
    most = math.sqrt(2) * max([1.0, *(other.span.greatest for other in others if other.span.greatest < 10)])
    regions = {region: Entry(Interval(wild=entry.interval.wild)) for region, entry in value.regions.items()}
    span = Interval(-value.span.greatest * 2, value.span.greatest * 2, NAN if bits else 0)
    found = Value(value.layout, standing, cause, span=span, lit=span, regions=regions)
    last = len(value.axes) - 1
    return replace(found, norm=value.norm * most if value.norm_axis == last else math.inf, norm_axis=last)
