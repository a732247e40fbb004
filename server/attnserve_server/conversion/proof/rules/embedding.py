"""The rules of embeddings with their normalization, and of rotary positions.

Angles along an axis that the rotated tensor does not have raise `NotFollowed`.

In the proof, a varying axis differs in length between a sequence alone and in a batch (or padded); a rule returns
whether its result is equal in both. `NotFollowed` becomes the verdict unknown.
"""

from __future__ import annotations

import math
from dataclasses import replace

import onnx_ir as ir

from attnserve_server.conversion.proof.context import MICROSOFT, Context, rule
from attnserve_server.conversion.proof.helpers import joined, optional, required, wild_anywhere
from attnserve_server.conversion.proof.intervals import NAN, Interval, add, number
from attnserve_server.conversion.proof.layout import NotFollowed, varying
from attnserve_server.conversion.proof.rules.gathering import from_table
from attnserve_server.conversion.proof.rules.normalizing import normalised
from attnserve_server.conversion.proof.rules.pointwise import pointwise
from attnserve_server.conversion.proof.rules.reducing import reduced
from attnserve_server.conversion.proof.values import Entry, Value


@rule("EmbedLayerNormalization", domain=MICROSOFT)
def embed_layer_normalization(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Return tables looked up, summed and normalised.

    The second output counts the mask's ones, wherever they are: findings/embed_layer_norm_mask_index.sh.
    """
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
    """Return pairs of numbers rotated by the angles of their position. Source: ONNX RotaryEmbedding-23."""
    return _rotated(ctx, required(inputs, 0), [value for value in inputs[1:] if value is not None])


@rule("RotaryEmbedding", domain=MICROSOFT)
def rotary_microsoft(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return onnxruntime's rotary embedding, whose positions come before the tables."""
    return _rotated(ctx, required(inputs, 0), [value for value in inputs[1:] if value is not None])


def _rotated(ctx: Context, value: Value, others: list[Value]) -> Value:
    value = ctx.as_data(value)
    others = [ctx.as_data(other) for other in others]
    standing, cause = joined([value, *others])
    for other in others:
        for _, factor in varying(other.axes):
            if factor not in [own for _, own in varying(value.axes)]:
                raise NotFollowed("rotates by angles along an axis that the rotated tensor does not have")
    bits = wild_anywhere(value)
    most = math.sqrt(2) * max([1.0, *(other.span.greatest for other in others if other.span.greatest < 10)])
    regions = {region: Entry(Interval(wild=entry.interval.wild)) for region, entry in value.regions.items()}
    span = Interval(-value.span.greatest * 2, value.span.greatest * 2, NAN if bits else 0)
    found = Value(value.layout, standing, cause, span=span, lit=span, regions=regions)
    last = len(value.axes) - 1
    return replace(found, norm=value.norm * most if value.norm_axis == last else math.inf, norm_axis=last)
