"""The rules of Softmax and of normalizations. A normalization over a varying axis makes the result different.

An operand that is left out, or whose axes are not known to agree with the others', raises `NotFollowed`.

In the proof, a varying axis differs in length between a sequence alone and in a batch (or padded); a rule returns
whether its result is equal in both. `NotFollowed` becomes the verdict unknown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from attnserve_server.conversion.proof.context import MICROSOFT, Context, rule
from attnserve_server.conversion.proof.helpers import attribute, joined, optional, required, wild_anywhere
from attnserve_server.conversion.proof.hiding import softmaxed
from attnserve_server.conversion.proof.intervals import NAN, Interval, add
from attnserve_server.conversion.proof.layout import is_plain, size_of
from attnserve_server.conversion.proof.rules.pointwise import pointwise
from attnserve_server.conversion.proof.sizes import product
from attnserve_server.conversion.proof.values import Entry, Standing, Value


@rule("Softmax", "LogSoftmax", "Hardmax")
def softmax(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return the softmax along an axis. Before opset 13, it is along all axes from one on."""
    value = ctx.as_data(required(inputs, 0))
    found = softmaxed(ctx, value, softmax_axes(value, node, ctx.opset))
    if node.op_type == "Softmax":
        return found
    if node.op_type == "Hardmax":
        return replace(found, norm=math.inf)
    return pointwise(ctx, lambda one: Interval(-math.inf, 0, one.wild | 1), [replace(found, masks=frozenset())])


def softmax_axes(value: Value, node: ir.Node, opset: int) -> list[int]:
    """Return the axes that a softmax of an opset runs over, without those of size 1."""
    rank = len(value.axes)
    several = opset < 13
    first = attribute(node, "axis", 1 if several else -1) % rank
    axes = list(range(first, rank if several else first + 1))
    return [at for at in axes if size_of(value.axes[at]).number != 1] or axes[-1:]


@rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def layer_normalization(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Return each vector normalised by its own mean and deviation."""
    value = required(inputs, 0)
    axis = attribute(node, "axis", -1) % len(value.axes)
    return normalised(ctx, node, value, [other for other in inputs[1:] if other is not None], axis)


@rule("SimplifiedLayerNormalization", "RMSNormalization", domain=MICROSOFT)
def simplified(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Return onnxruntime's form of the standard operator."""
    return layer_normalization(ctx, node, inputs)  # type: ignore[return-value]


@rule("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_layer_normalization(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Return a normalised sum. The fourth output is the sum."""
    simple = node.op_type.startswith("SkipSimplified")
    bias = optional(inputs, 3 if simple else 4)
    parts = [required(inputs, 0), required(inputs, 1), *([bias] if bias is not None else [])]
    total = parts[0]
    for other in parts[1:]:
        total = pointwise(ctx, add, [total, other], op="Add")
    scales = [value for value in inputs[2 : 3 if simple else 4] if value is not None]
    found = normalised(ctx, node, total, scales, len(total.axes) - 1)
    outputs = [found[0], found[0], found[0], total]
    return outputs[: len(node.outputs)]


def normalised(ctx: Context, node: ir.Node, value: Value, scales: Sequence[Value], axis: int) -> list[Value]:
    """Return a value normalised over the axes from one on, then scaled and shifted by constants."""
    value = ctx.as_data(value)
    standing, cause = joined([value, *(ctx.as_data(scale) for scale in scales)])
    for at in range(axis, len(value.axes)):
        if not is_plain(value.axes[at]):
            reason = f"normalises over {ctx.others} too"
            standing, cause = Standing.DIFFERENT, ctx.cause(reason)
    regions = {region: Entry(Interval(wild=_nan(entry.interval))) for region, entry in value.regions.items()}
    span, norm = Interval(wild=_nan(value.span)), math.inf
    width = product(size_of(axis_) for axis_ in value.axes[axis:]).number
    gains = [scale.constant for scale in scales]
    if width is not None and gains and all(gain is not None for gain in gains):
        gain = abs(gains[0]).max() if gains[0] is not None else 1.0
        shift = abs(gains[1]).max() if len(gains) > 1 and gains[1] is not None else 0.0
        most = float(gain) * math.sqrt(width) + float(shift)
        span = Interval(-most, most, span.wild)
        length = 0.0 if len(gains) < 2 or gains[1] is None else float((gains[1].astype(float) ** 2).sum() ** 0.5)
        norm = float(gain) * math.sqrt(width) + length
    layout = value.axes
    if not ctx.is_batch and standing is Standing.DIFFERENT:
        regions = {}
    result = Value(layout, standing, cause, span=span, lit=span, regions=regions, norm=norm, norm_axis=len(layout) - 1)
    if axis != len(layout) - 1:
        result = replace(result, norm=math.inf)
    rest = Value(None, standing, cause)
    return [result, *([rest] * (len(node.outputs) - 1))]


def _nan(interval: Interval) -> int:
    return NAN if interval.wild else 0


@rule("InstanceNormalization", "GroupNormalization", "LpNormalization", "MeanVarianceNormalization")
def spatial_normalization(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return a value normalised over axes other than the last."""
    value = ctx.as_data(required(inputs, 0))
    rank = len(value.axes)
    if node.op_type == "LpNormalization":
        axes = [attribute(node, "axis", -1) % rank]
    elif node.op_type == "MeanVarianceNormalization":
        axes = [axis % rank for axis in attribute(node, "axes", [0, 2, 3])]
    else:
        axes = list(range(2 if node.op_type == "InstanceNormalization" else 1, rank))
    standing, cause = joined([value, *(ctx.as_data(other) for other in inputs[1:] if other is not None)])
    if any(not is_plain(value.axes[at]) for at in axes):
        standing, cause = Standing.DIFFERENT, ctx.cause(f"normalises over {ctx.others} too")
    wild = NAN if wild_anywhere(value) else 0
    regions = {region: Entry(Interval(wild=_nan(entry.interval))) for region, entry in value.regions.items()}
    return Value(value.layout, standing, cause, span=Interval(wild=wild), regions=regions)
