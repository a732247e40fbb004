"""The rules of windows that slide along axes: convolutions and pools.

At a sequence's end a window reads what is behind it. The result is equal only if the window does not reach there, or
padding is neutral. Windows of unknown width raise `NotFollowed`.

In the proof, a varying axis differs in length between a sequence alone and in a batch (or padded); a rule returns
whether its result is equal in both. `NotFollowed` becomes the verdict unknown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from attnserve_server.conversion.proof.context import Context, rule
from attnserve_server.conversion.proof.helpers import attribute, joined, numbers, required, wild_anywhere
from attnserve_server.conversion.proof.intervals import NAN, Interval
from attnserve_server.conversion.proof.layout import (
    Axis,
    Factor,
    NotFollowed,
    is_plain,
    ordinals,
    plain,
    size_of,
    varying,
)
from attnserve_server.conversion.proof.sizes import Size, floor_div
from attnserve_server.conversion.proof.values import Entry, Standing, Value


@rule("Conv", "ConvInteger", "AveragePool", "MaxPool", "LpPool", "QLinearConv")
def window(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value | list[Value]:
    """Return a window over the axes behind rows and channels."""
    value = ctx.as_data(required(inputs, 0))
    convolution = node.op_type in {"Conv", "ConvInteger", "QLinearConv"}
    kernel, channels = attribute(node, "kernel_shape"), value.axes[1]
    if convolution:
        kernel, channels = _window_of(node, inputs)
    if kernel is None or None in kernel:
        raise NotFollowed("slides a window of unknown width")
    if not is_plain(value.axes[1]) and convolution:
        return ctx.bad(Standing.DIFFERENT, f"sums over channels, {ctx.others} included")
    others = [ctx.as_data(other) for other in inputs[1:] if other is not None]
    standing, cause = joined([value, *others])
    axes: list[Axis] = [value.axes[0], channels]
    for at, width in enumerate(kernel):
        axis, why = _slid(ctx, node, value, at, int(width))
        axes.append(axis)
        if why[0] > standing:
            standing, cause = why[0], ctx.cause(why[1])
    layout = tuple(axes)
    if len(varying(layout)) != len(varying(value.axes)):
        return ctx.unknown("slides a window along the padded axis in a way that the proof does not support")
    found = _with_intervals(value, Value(layout, standing, cause), convolution=convolution)
    if node.op_type == "AveragePool":
        found = _mask_averaged(ctx, node, value, found, kernel)
    places = ctx.bad(Standing.DIFFERENT, f"counts positions through the whole tensor, {ctx.others} included")
    return [found, places][: len(node.outputs)]


def _window_of(node: ir.Node, inputs: list[Value | None]) -> tuple[list[int | None], Axis]:
    """Return the widths of a convolution's window, and its channels."""
    weights = required(inputs, 3 if node.op_type == "QLinearConv" else 1)
    if weights.varies:
        raise NotFollowed("slides computed weights")
    shape = [size_of(axis) for axis in weights.axes]
    return [size.number for size in shape[2:]], plain(shape[0])


def _with_intervals(value: Value, found: Value, *, convolution: bool) -> Value:
    """Return the result with the intervals of its elements."""
    bits = NAN if wild_anywhere(value) else 0
    span = Interval(wild=bits) if convolution else Interval(min(value.span.low, 0), max(value.span.high, 0), bits)
    regions = {}
    for region, entry in value.regions.items():
        if region[0] == "pad":
            # The mean and the maximum of zeros are zero, also where a window begins behind the sequence's own part.
            kept = not convolution and entry.only == 0 and not bits
            regions[region] = entry if kept else Entry(Interval(span.low, span.high, bits))
    return replace(found, span=span, lit=span, regions=regions)


def _mask_averaged(ctx: Context, node: ir.Node, value: Value, found: Value, kernel: Sequence[int]) -> Value:
    """Return an averaged mask. The window around an allowed position has at least its share."""
    if not value.masks or value.lit.low <= 0 or value.structured:
        return found
    lit = Interval(value.lit.low / math.prod(kernel), found.span.high)
    # Where windows skip positions, a mask may allow only the skipped ones, so it must allow all.
    structured = frozenset() if _covers(ctx, node, value, kernel) else value.along
    return replace(found, lit=lit, masks=value.masks, along=value.along, structured=structured)


def _covers(ctx: Context, node: ir.Node, value: Value, kernel: Sequence[int]) -> bool:
    """Return whether each position is within a window."""
    count = len(kernel)
    steps, pads = attribute(node, "strides") or [1] * count, attribute(node, "pads") or [0] * (2 * count)
    if any(spread != 1 for spread in attribute(node, "dilations") or []) or attribute(node, "auto_pad", "") == "VALID":
        return False
    for at, (width, step) in enumerate(zip(kernel, steps, strict=True)):
        room = size_of(value.axes[at + 2]) + Size.of(pads[at] + pads[at + count] - width)
        whole = room.over(Size.of(step)) is not None or bool(attribute(node, "ceil_mode", 0))
        whole = whole or _filled_up(ctx, node, at + 2) >= step - 1
        if step > width or not whole:
            return False
    return True


def _filled_up(ctx: Context, node: ir.Node, axis: int) -> int:
    """Return how many positions a Pad adds behind an axis before the window. The window may skip these."""
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if source is None or source.op_type != "Pad" or len(source.inputs) > 3 or ctx.known is None:
        return 0
    amounts = attribute(source, "pads")
    if amounts is None and len(source.inputs) > 1 and source.inputs[1] is not None:
        amounts = numbers(ctx.known(source.inputs[1]))
    return int(amounts[len(amounts) // 2 + axis]) if amounts else 0


def _slid(ctx: Context, node: ir.Node, value: Value, at: int, width: int) -> tuple[Axis, tuple[Standing, str]]:
    """Return the axis that a window makes of one, and whether the window reads behind the sequence's end."""
    axis = value.axes[at + 2]
    spatial = len(value.axes) - 2
    pads = attribute(node, "pads") or [0] * (2 * spatial)
    stride = (attribute(node, "strides") or [1] * spatial)[at]
    reach = (width - 1) * (attribute(node, "dilations") or [1] * spatial)[at] + 1
    before, behind = pads[at], pads[at + spatial]
    automatic = attribute(node, "auto_pad", "NOTSET")
    up = bool(attribute(node, "ceil_mode", 0))
    if automatic in {"SAME_UPPER", "SAME_LOWER"}:
        # With a stride, the zeros at the front depend on the length: findings/same_upper_right_padding.sh.
        if stride != 1 and not is_plain(axis):
            return axis, (Standing.UNKNOWN, "pads the ends of an axis by its length")
        before = (reach - 1) // 2 if automatic == "SAME_UPPER" else reach // 2
        behind = reach - 1 - before
    if is_plain(axis):
        return plain(_count(size_of(axis), before + behind, reach, stride, up=up)), (Standing.EQUAL, "")
    if ctx.is_batch or len(axis) != 1 or axis[0].real is None or axis[0].tail:
        return axis, (Standing.UNKNOWN, "slides a window along a folded axis")
    factor, real = axis[0], axis[0].real
    new = (
        Factor(
            _count(factor.size, before + behind, reach, stride, up=up),
            _count(real, before + behind, reach, stride, up=up),
        ),
    )
    own = ordinals(value.axes, at + 2)[0]
    neutral = value.pad(own).only == 0 and node.op_type == "Conv"  # others fill up with a zero point
    averages = node.op_type == "AveragePool" and bool(attribute(node, "count_include_pad", 0)) and not up
    neutral = neutral or (averages and value.pad(own).only == 0)
    whole = behind == 0 and not up
    if whole or neutral:
        return new, (Standing.EQUAL, "")
    return new, (Standing.DIFFERENT, f"slides a window over the sequence's end, behind which {ctx.others} are")


def _count(size: Size, padded: int, reach: int, stride: int, *, up: bool) -> Size:
    """Return the number of places of a window. Source: the ONNX operators Conv-11 and AveragePool-19."""
    room = size + Size.of(padded - reach + (stride - 1 if up else 0))
    return floor_div(room + Size.of(stride), Size.of(stride)) if stride != 1 else room + Size.of(1)


@rule("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def whole(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return one number of all places."""
    value = ctx.as_data(required(inputs, 0))
    standing, cause = value.standing, value.cause
    if any(not is_plain(axis) for axis in value.axes[2:]):
        standing, cause = Standing.DIFFERENT, ctx.cause(f"reduces all places to one number, {ctx.others} included")
    layout = (*value.axes[:2], *([plain(Size.of(1))] * (len(value.axes) - 2)))
    kept = {place: place for place in range(len(varying(value.axes[:2])))}
    found = value.moved(layout, kept)
    return replace(found.bare(), standing=standing, cause=cause)
