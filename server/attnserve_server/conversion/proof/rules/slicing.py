"""The rules of operators that keep a part of an axis, or reverse it: Slice, Split, ReverseSequence.

Of the varying axis, a slice may keep its first positions. A slice counted from the end makes the result different.
Places that are not known raise `NotFollowed`.

In the proof, a varying axis differs in length between a sequence alone and in a batch (or padded); a rule returns
whether its result is equal in both. `NotFollowed` becomes the verdict unknown.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from attnserve_server.conversion.proof.context import Context, rule
from attnserve_server.conversion.proof.helpers import (
    attribute,
    constant,
    joined,
    numbers,
    optional,
    required,
    sizes_of,
)
from attnserve_server.conversion.proof.intervals import interval_of
from attnserve_server.conversion.proof.layout import (
    PLAIN_ONE,
    Factor,
    NotFollowed,
    Places,
    is_plain,
    is_plain_all,
    ordinals,
    plain,
    size_of,
    varying,
)
from attnserve_server.conversion.proof.rules.sized import of_sizes_array, sizes_array
from attnserve_server.conversion.proof.sizes import Size, floor_div, greater, lesser
from attnserve_server.conversion.proof.values import Entry, Standing, Value


@rule("Split", "SplitToSequence")
def split(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> list[Value]:
    """Return parts along an axis."""
    if node.op_type != "Split":
        raise NotFollowed("uses sequences of tensors, which the proof does not support")
    value = required(inputs, 0)
    axis = attribute(node, "axis", 0)
    axis = axis + len(value.axes) if axis < 0 else axis
    whole = size_of(value.axes[axis])
    given = attribute(node, "split")
    count = len(node.outputs)
    if given is not None:
        parts = [Size.of(part) for part in given]
    elif optional(inputs, 1) is not None:
        parts = sizes_of(inputs[1])
    else:
        each = whole.number
        if each is None:
            raise NotFollowed("splits an axis of unknown length into equal parts")
        step = -(-each // count)
        parts = [Size.of(min(step, each - step * at)) for at in range(count)]
    results, start = [], Size.of(0)
    for part in parts:
        results.append(sliced(ctx, value, axis, start, start + part, 1))
        start += part
    return results


@rule("Slice")
def slice_(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return parts along some axes, from a start to an end, with a step."""
    value = required(inputs, 0)
    rank = len(value.axes)
    if attribute(node, "starts") is not None:
        starts, ends = ([Size.of(n) for n in attribute(node, name)] for name in ("starts", "ends"))
        axes, steps = attribute(node, "axes"), None
    else:
        starts, ends = sizes_of(required(inputs, 1)), sizes_of(required(inputs, 2))
        axes, steps = numbers(optional(inputs, 3)), numbers(optional(inputs, 4))
    axes = list(range(len(starts))) if axes is None else [axis + rank if axis < 0 else axis for axis in axes]
    steps = steps or [1] * len(starts)
    sizes = sizes_array(value)
    if sizes is not None and all(size.number is not None for size in (*starts, *ends)):
        cuts = [slice(None)] * rank
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
            last = end.number or 0
            cuts[axis] = slice(start.number, None if step < 0 and last < -(1 << 30) else last, step)
        return of_sizes_array(sizes[tuple(cuts)], floating=value.floating)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        value = sliced(ctx, value, axis, start, end, step)
    return value


def sliced(ctx: Context, value: Value, axis: int, start: Size, end: Size, step: int) -> Value:
    """Return a value from a start to an end along one axis."""
    whole = size_of(value.axes[axis])
    if step < 0:
        return _reversed(ctx, value, axis, start, end, step)
    first, last = _place(start, whole), _place(end, whole)
    if first is None or last is None:
        raise NotFollowed("slices from or to a position that is not known")
    if first.number == 0 and last == whole and step == 1:
        return value
    if is_plain(value.axes[axis]):
        return _of_plain(ctx, value, axis, first, last, step)
    if ctx.is_batch:
        return selected(ctx, value, "takes fixed rows of the batch")
    return _of_varying(ctx, value, axis, first, last, step)


def _place(at: Size, whole: Size) -> Size | None:
    """Return a place along an axis, counted from its start and clipped to it. None where it is not known."""
    low, high = at.bounds()
    if low < 0 and high < 0:
        found = whole + at
        return greater(found, Size.of(0)) if found.bounds()[0] < 0 else found
    if low < 0:
        return None
    if at.number is not None and at.number >= 1 << 30:
        return whole
    return lesser(at, whole)


def _reversed(ctx: Context, value: Value, axis: int, start: Size, end: Size, step: int) -> Value:
    if not is_plain(value.axes[axis]):
        return selected(ctx, value, f"reverses the order, so that {ctx.others} come first")
    whole = size_of(value.axes[axis])
    if step == -1 and start.number in {-1, (1 << 63) - 1} and (end.number or 0) < -(1 << 30):
        places = {at: at for at in range(len(varying(value.axes)))}
        return value.moved(value.axes, places)
    if whole.number is None or start.number is None or end.number is None:
        raise NotFollowed("slices backwards, which the proof does not support")
    count = len(range(whole.number)[slice(start.number, end.number, step)])
    return with_new_axis(value, axis, plain(Size.of(count)))


def selected(ctx: Context, value: Value, reason: str) -> Value:
    """Return a value without the sequence's own positions, or with these in other places."""
    return replace(value.bare(), layout=None, standing=Standing.DIFFERENT, cause=ctx.cause(reason), regions={})


def _of_plain(ctx: Context, value: Value, axis: int, first: Size, last: Size, step: int) -> Value:
    count = last - first
    if ctx.depends(first):
        return ctx.unknown("cuts a table at a place that depends on the padded length")
    if step != 1:
        if count.number is None:
            raise NotFollowed("slices with a step, which the proof does not support")
        count = Size.of(-(-count.number // step))
    if ctx.is_batch and ctx.depends(count) and value.span.only is None:
        return selected(ctx, value, "takes as many rows of a table as the batch has, each by its place in the batch")
    # Each position is the same in both runs, so the axis is not folded.
    new = (Factor(count, count),) if ctx.depends(count) else plain(count)
    result = with_new_axis(value, axis, new)
    if value.constant is not None and first.number is not None and step == 1:
        result = _cut_constant(value, result, axis, first.number, count)
    if value.norm < math.inf:
        result = replace(result, norm=value.norm, norm_axis=value.norm_axis)
    return result


def _cut_constant(value: Value, result: Value, axis: int, first: int, count: Size) -> Value:
    """Return a part of a constant. If its length varies, the array keeps everything from the start on."""
    assert value.constant is not None
    index = [slice(None)] * value.constant.ndim
    index[axis] = slice(first, first + count.number if count.number is not None else None)
    content = value.constant[tuple(index)]
    if count.number is not None and is_plain_all(value.axes):
        whole = constant(content)
        return whole if whole.layout == result.layout else replace(result, constant=content)
    return _of_triangle(replace(result, constant=content))


def _of_triangle(value: Value) -> Value:
    """Return facts about the triangles of a constant that is cut to the sequence's length on its last two axes."""
    content, layout = value.constant, value.axes
    factors = varying(layout)
    if content is None or content.ndim < 2 or len(factors) != 2 or content.dtype.kind not in "biuf":
        return value
    axes = [axis for axis, _ in factors]
    if axes != [len(layout) - 2, len(layout) - 1] or factors[0][1].real != factors[1][1].real or content.size > 1 << 25:
        return value
    above = content[..., np.triu(np.ones(content.shape[-2:], bool), 1)]
    below = content[..., np.tril(np.ones(content.shape[-2:], bool), -1)]
    diagonal = interval_of(np.diagonal(content, axis1=-2, axis2=-1))
    regions = {
        ("above", 0, 1): Entry(interval_of(above), lit=interval_of(above)),
        ("above", 1, 0): Entry(interval_of(below), lit=interval_of(below)),
        ("pad", 1, 1): Entry(interval_of(above), lit=interval_of(above)),
        ("pad", 0, 0): Entry(interval_of(below), lit=interval_of(below)),
    }
    if interval_of(above).only is None:
        return value
    return replace(value, regions=regions, lit=diagonal, structured=frozenset({0, 1}))


def with_new_axis(value: Value, axis: int, new: tuple[Factor, ...]) -> Value:
    """Return a value with another axis instead of a plain one."""
    layout = (*value.axes[:axis], new, *value.axes[axis + 1 :])
    before = sum(1 for at, _ in varying(value.axes) if at < axis)
    added = sum(factor.varies for factor in new)
    places: Places = {place: place if place < before else place + added for place in range(len(varying(value.axes)))}
    raw = value.raw if value.raw.startswith("top of ") else ""
    return replace(value.moved(layout, places), raw=raw)


def _of_varying(ctx: Context, value: Value, axis: int, first: Size, last: Size, step: int) -> Value:
    parts = value.axes[axis]
    if len(parts) != 1 or parts[0].real is None:
        raise NotFollowed("slices an axis that was merged with others")
    factor, real = parts[0], parts[0].real
    assert real is not None
    whole = factor.size
    if factor.tail:
        return _of_tailed(value, axis, first, last, step)
    places = {place: place for place in range(len(varying(value.axes)))}
    own = ordinals(value.axes, axis)[0]
    if not ctx.depends(first) and not ctx.depends(last) and (last - first).number == 1 and first.number == 0:
        return _first_position(value, axis)
    if ctx.depends(first):
        reason = f"takes positions from the end, which {ctx.others} move"
        return selected(ctx, value, reason)
    count, kept = last - first, _kept(real, whole, first, last)
    if step != 1:
        count, kept = (_steps(size, step) for size in (count, kept))
    if not ctx.depends(count):
        return ctx.unknown("takes more positions than a short sequence has")
    layout = (*value.axes[:axis], (Factor(count, kept),), *value.axes[axis + 1 :])
    result = value.moved(layout, places)
    if last != whole:
        # The positions behind the new end were the sequence's own, or padding.
        entry = Entry(value.span.hull(value.pad(own).interval))
        gone = {region: known for region, known in result.regions.items() if own not in region[1:]}
        result = replace(result, regions={**gone, ("pad", own, own): entry})
    if value.index is not None and own in value.index and step == 1 and value.outer is None:
        index, offset = value.index, value.offset
        plus = index[own] * first
        result = replace(result, lit=value.span) if value.structured else result
        return replace(result, index=index, offset=plus if offset is None else offset + plus, regions={})
    if own in value.along or own in value.structured:
        result = replace(result, lit=value.span)  # visible elements may be cut off
    dropped = replace(result, index=None, offset=None, outer=None, below=None, symbols=value.dependence)
    found = dropped if value.index is not None else result
    return replace(found, norm=value.norm, norm_axis=value.norm_axis)


def _kept(real: Size, whole: Size, first: Size, last: Size) -> Size:
    """Return how many of the sequence's own positions a slice keeps, as in the run alone."""
    return (real if last == whole else lesser(real, last)) - first


def _steps(size: Size, step: int) -> Size:
    return floor_div(size + Size.of(step - 1), Size.of(step))


def _first_position(value: Value, axis: int) -> Value:
    layout = (*value.axes[:axis], PLAIN_ONE, *value.axes[axis + 1 :])
    gone = set(ordinals(value.axes, axis))
    left = [place for place in range(len(varying(value.axes))) if place not in gone]
    result = value.moved(layout, {place: at for at, place in enumerate(left)})
    if gone & (value.along | value.structured):
        result = replace(result, lit=value.span)  # a mask may hide the first position
    return replace(result, norm=value.norm, norm_axis=value.norm_axis)


def _of_tailed(value: Value, axis: int, first: Size, last: Size, step: int) -> Value:
    """Return an axis with plain positions behind the padding: all but these, or only these."""
    factor = value.axes[axis][0]
    assert factor.real is not None
    own = factor.size - Size.of(factor.tail)
    places = {place: place for place in range(len(varying(value.axes)))}
    if step == 1 and first.number == 0 and last == own:
        layout = (*value.axes[:axis], (Factor(own, factor.real),), *value.axes[axis + 1 :])
        return value.moved(layout, places)
    if step == 1 and first == own and last == factor.size:
        layout = (*value.axes[:axis], plain(Size.of(factor.tail)), *value.axes[axis + 1 :])
        gone = set(ordinals(value.axes, axis))
        left = [place for place in range(len(varying(value.axes))) if place not in gone]
        return value.moved(layout, {place: at for at, place in enumerate(left)})
    raise NotFollowed("slices an axis with positions behind the padding")


@rule("ReverseSequence")
def reverse_sequence(ctx: Context, node: ir.Node, inputs: list[Value | None]) -> Value:
    """Return each row reversed up to its own length. Later positions stay in place."""
    value, lengths = required(inputs, 0), required(inputs, 1)
    rows, time = attribute(node, "batch_axis", 1), attribute(node, "time_axis", 0)
    if ctx.is_batch and (not is_plain(value.axes[time]) or value.axes[rows] != lengths.axes[0]):
        return ctx.bad(Standing.DIFFERENT, "reverses the order of the batch")
    if not is_plain(value.axes[time]) and (lengths.count is None or lengths.count < 0):
        return ctx.unknown("reverses positions up to a length that the request sets")
    standing, cause = joined([value, ctx.as_data(replace(lengths, count=None))])
    return replace(value.bare(), standing=standing, cause=cause)
